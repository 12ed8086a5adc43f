"""What a worker's training loop reports, carried to the group, storage, the tracker, Prometheus and the job's log."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from lape_ray import storage, tracking
from lape_ray.cluster.checkpoint_list import Listed
from lape_ray.cluster.checkpoint_writer import CheckpointWriter
from lape_ray.cluster.group import Group
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_end import ERRORS, StorageError
from lape_ray.storage import LeaseLostError
from lape_ray.training.checkpoint import Snapshot
from lape_ray.training.distributed import World
from lape_ray.training.flags import Flags

WAIT_S = 1.0  # for which rank 0 waits for a checkpoint before the ranks ask each other again


@dataclass
class _Saving:
    """A checkpoint on its way to storage.

    Attributes:
        where: its place in the training, in words for people
        saved: on rank 0 the name of its folder and the seconds that it took; the other ranks have none
    """

    where: str
    saved: Future[tuple[str, float]] | None


@dataclass
class RunReporter:
    """Carry what the loop reports to the group, and from rank 0 to storage, the tracker and the job's log.

    Tracker and writer belong to rank 0; the other ranks have none.
    """

    run: Run
    group: Group
    world: World
    tracker: tracking.Tracker | None = None
    writer: CheckpointWriter | None = None
    saving: _Saving | None = None

    # --- what the loop calls --------------------------------------------------------------------------------------

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        rate = self.run.config.data.batch_size / metrics["train/step_s"]
        self.group.show({**metrics, "train/images_per_s": rate})
        if self.tracker is not None:
            self.tracker.metrics(metrics, step=step)

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        self.group.show({key: metrics[key] for key in ("epoch", "val/acc1") if key in metrics})
        if self.tracker is not None:
            self.tracker.metrics({**metrics, **self._elastic_size()}, step=step)
        self.wait_until_saved()
        number = round(metrics["epoch"])
        entry = Listed(name=f"checkpoint-epoch-{number:06}", steps_done=step, score=metrics.get("val/acc1"))
        self._save(entry, f"after epoch {number}", snapshot)
        every = self.run.config.tracking.position_report_epochs
        if every is not None and number % every == 0:
            self._position_report(range(every, number + 1, every))

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        where = f"within epoch {math.ceil(metrics['epoch'])}, after step {step}"
        if self.saving is not None:
            self.line(f"no checkpoint {where}: the one {self.saving.where} is not stored yet")
            return
        self._save(Listed(name=f"checkpoint-step-{step:09}", steps_done=step), where, snapshot)

    def wait_until_saved(self) -> None:
        """Wait for the checkpoint that is being stored, on all ranks; a restart begins with it.

        Raises:
            StorageError: it could not be stored.
            LeaseLostError: another driver continues the run.
        """
        saving, self.saving = self.saving, None
        if saving is None:
            return
        while self.world.any(not _stored(saving)):  # a worker that hangs meanwhile is noticed
            pass
        lost, reason = False, ""
        if saving.saved is not None:
            try:
                _, seconds = saving.saved.result()
                self.group.show({"checkpoint_s": seconds})
            except Exception as error:  # whatever it is, the other ranks must not wait for this one
                lost, reason = isinstance(error, LeaseLostError), str(error) or repr(error)
        lost, reason = self.group.broadcast((lost, reason))
        if lost:
            raise LeaseLostError(reason)
        if reason:
            raise StorageError(
                f"the checkpoint {saving.where} could not be stored: {reason}; free space or choose another "
                "--run.storage. Submitted again, the run continues from the checkpoint before"
            )

    def node_leaving(self) -> bool:
        return self.group.node_leaving()

    def poll_flags(self) -> Flags:
        flags = Flags.NONE
        if self.saving is not None and self.saving.saved is not None and self.saving.saved.done():
            flags |= Flags.SAVED
        if self.group.rank == 0 and self.group.stop_asked():
            flags |= Flags.STOP
        return flags

    def line(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)

    # --- what it does of it ---------------------------------------------------------------------------------------

    def line_of_size(self) -> None:
        """Say how an elastic run shares out its batch."""
        config = self.run.config
        if not isinstance(config.run.num_workers, int):
            most = -(-config.micro_batches // self.group.size)
            self.line(
                f"{self.group.size} of {config.run.num_workers} workers; the batch of {config.data.batch_size} "
                f"images is {config.micro_batches} micro-batches, {most} or fewer for each"
            )

    def _elastic_size(self) -> dict[str, float]:
        """Return the number of workers, where that changes."""
        return {} if isinstance(self.run.config.run.num_workers, int) else {"train/workers": self.group.size}

    def _save(self, entry: Listed, where: str, snapshot: Callable[[], Snapshot]) -> None:
        saved = self.writer.begin(entry, snapshot()) if self.writer is not None else None
        self.saving = _Saving(where, saved)

    def _position_report(self, epochs: range) -> None:
        """Draw the report on rank 0, in the loop's thread: its random draws must not meet those of a training step."""
        saving = self.saving
        self.wait_until_saved()
        if self.tracker is not None and saving is not None and saving.saved is not None:
            from lape_ray.report.progress import report_epoch  # only here: figures need a second to import

            name, _ = saving.saved.result()
            try:
                with storage.opened(storage.join(self.run.folder, name)) as checkpoint:
                    report_epoch(
                        checkpoint, self.run.config, epochs, folder=self.run.folder, keep=self.tracker.files
                    )
            except (OSError, ValueError) as error:  # the training continues
                self.line(f"no position report of epoch {epochs[-1]}: {error}")
        self.group.barrier()


def _stored(saving: _Saving) -> bool:
    """Tell, after a moment, whether this rank has nothing to store any more."""
    return saving.saved is None or bool(wait([saving.saved], timeout=WAIT_S).done)


@contextlib.contextmanager
def opened_reporter(
    run: Run,
    group: Group,
    listed: Sequence[Listed],
    world: World,
    *,
    store_compiled: Callable[[], None],
) -> Iterator[RunReporter]:
    """Open this worker's reporter, and close its tracker and writer at the end.

    Args:
        listed: the run's checkpoints so far, oldest first.
        store_compiled: stores what was compiled; it is called before each checkpoint.
    """
    reporter = RunReporter(run, group, world)
    if group.rank == 0:
        reporter.tracker = tracker = tracking.open_tracker(
            run.config.tracking,
            run.tracking_uri,
            run.mlflow_run_id,
            run.folder,
            check=run.check_lease,
        )

        def before_publishing() -> None:
            tracker.save_unsent()
            store_compiled()

        reporter.writer = CheckpointWriter(
            run, listed, before_publishing=before_publishing, tell=reporter.line
        )
    patience_s = 60.0
    try:
        yield reporter
    except tuple(ERRORS.values()):
        raise
    except BaseException:
        patience_s = 0  # what is not sent is in the run's folder, or is trained again
        raise
    finally:
        if reporter.writer is not None:
            reporter.writer.close()
        if reporter.tracker is not None:
            reporter.tracker.close(patience_s)
