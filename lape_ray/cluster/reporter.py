"""Carry what a worker's training loop reports to the group, storage, the tracker, Prometheus and the job's log."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from lape_ray import storage, tracking
from lape_ray.cluster.checkpoint_list import Listed
from lape_ray.cluster.checkpoint_writer import CheckpointWriter
from lape_ray.cluster.group import Group
from lape_ray.cluster.journal import AttemptWriter
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_end import ERRORS, StorageError
from lape_ray.storage import LeaseLostError
from lape_ray.training.checkpoint import Snapshot
from lape_ray.training.distributed import World
from lape_ray.training.flags import Flags
from lape_ray.training.times import EVALUATION

WAIT_S = 1.0  # for which rank 0 waits for a checkpoint before the ranks ask each other again


@dataclass
class _Saving:
    """A checkpoint that is being stored.

    Attributes:
        where: its place in the training, in words for people
        saved: on rank 0 the name of its folder and the seconds that it took; the other ranks have none
        told: whether rank 0 has told the others that it is stored
    """

    where: str
    saved: Future[tuple[str, float]] | None
    told: bool = False


@dataclass
class _Waiting:
    """A checkpoint that is stored as soon as the one before is; `snapshot` is rank 0's."""

    entry: Listed
    where: str
    snapshot: Snapshot | None


@dataclass
class RunReporter:
    """Carry what the loop reports to the group, and from rank 0 to storage, the tracker and the job's log.

    Tracker, writer and attempt belong to rank 0; the other ranks have none.

    At most one checkpoint is being stored, and the training does not wait for it. One that is due meanwhile is left
    out, unless its accuracy is the best so far: that one waits in memory, and is stored next. All ranks decide alike.
    """

    run: Run
    group: Group
    world: World
    tracker: tracking.Tracker | None = None
    writer: CheckpointWriter | None = None
    attempt: AttemptWriter | None = None
    best: float = -math.inf
    saving: _Saving | None = None
    waiting: _Waiting | None = None
    left_out: bool = False
    begun: float = field(default_factory=time.monotonic)

    # --- what the loop calls --------------------------------------------------------------------------------------

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        rate = self.run.config.data.batch_size / metrics["train/step_s"]
        self.group.show({**metrics, "train/images_per_s": rate})
        if self.tracker is not None:
            self.tracker.metrics(metrics, step=step)
        self._mark(step)

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        self.group.show({key: metrics[key] for key in ("epoch", "val/acc1") if key in metrics})
        self._mark(step)
        if self.tracker is not None and self.attempt is not None:
            of_time = self.attempt.division().metrics()
            self.tracker.metrics({**metrics, **self._elastic_size(), **of_time}, step=step)
        number = round(metrics["epoch"])
        every = self.run.config.tracking.position_report_epochs
        report = every is not None and number % every == 0
        if report or number == self.run.config.last_epoch:
            self.wait_until_saved()
        score = metrics.get("val/acc1") if self.run.config.has_last_size(number - 1) else None
        entry = Listed(name=f"checkpoint-epoch-{number:06}", steps_done=step, score=score)
        self._store(entry, f"after epoch {number}", snapshot)
        if report and every is not None:
            self._position_report(range(every, number + 1, every))

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        self._mark(step)
        where = f"within epoch {math.ceil(metrics['epoch'])}, after step {step}"
        self._store(Listed(name=f"checkpoint-step-{step:09}", steps_done=step), where, snapshot)

    def checkpoint_stored(self) -> None:
        saving, self.saving = self.saving, None
        if saving is not None and saving.saved is not None:
            _, seconds = saving.saved.result()
            self.group.show({"checkpoint_s": seconds})
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self._begin(waiting)

    def wait_until_saved(self) -> None:
        """Wait for the checkpoint that is being stored, and the one that waits, on all ranks.

        Raises:
            StorageError: one could not be stored.
            LeaseLostError: another driver continues the run.
        """
        while self.saving is not None:
            while self.world.any(not _stored(self.saving)):  # a worker that hangs meanwhile is noticed
                pass
            self._refuse_failure(self.saving)
            self.checkpoint_stored()

    def _refuse_failure(self, saving: _Saving) -> None:
        """Raise what went wrong with a checkpoint, on all ranks alike."""
        error = None if saving.saved is None else saving.saved.exception()
        if not self.world.any(error is not None):
            return
        told = (isinstance(error, LeaseLostError), str(error) or repr(error))
        lost, reason = self.group.broadcast(told)
        if lost:
            raise LeaseLostError(reason)
        raise StorageError(
            f"the checkpoint {saving.where} could not be stored: {reason}; free space or choose another "
            "--run.storage. Submitted again, the run continues from the checkpoint before"
        )

    def node_leaving(self) -> bool:
        return self.group.node_leaving()

    def poll_flags(self) -> Flags:
        flags = Flags.NONE
        if self.attempt is not None:
            self.attempt.step_done()
        saving = self.saving
        if saving is not None and not saving.told and saving.saved is not None and saving.saved.done():
            saving.told = True  # once: the next flag is the next checkpoint's
            flags |= Flags.SAVED if saving.saved.exception() is None else Flags.UNSAVED
        if self.group.rank == 0 and self.group.stop_asked():
            flags |= Flags.STOP
        return flags | self._due_by_itself()

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

    def _mark(self, step: int) -> None:
        """Note in the run's journal, and now and then for Prometheus, what the time went into until this step."""
        if self.attempt is not None and (division := self.attempt.mark(step)) is not None:
            self.group.show({"goodput": division.metrics()["goodput"]})
            self.group.show({f"time/{part}": seconds for part, seconds in division.seconds.items()})

    def _elastic_size(self) -> dict[str, float]:
        """Return the number of workers, where that changes."""
        return {} if isinstance(self.run.config.run.num_workers, int) else {"train/workers": self.group.size}

    def _due_by_itself(self) -> Flags:
        """Ask, on rank 0 and once, for a checkpoint where the interval is `auto` and over."""
        automatic = self.run.config.run.checkpoint_minutes == "auto"
        if self.attempt is None or not automatic or self.saving is not None:
            return Flags.NONE
        if time.monotonic() - self.begun < self.attempt.checkpoint_interval_s():
            return Flags.NONE
        self.begun = time.monotonic()
        return Flags.SAVE

    def _store(self, entry: Listed, where: str, snapshot: Callable[[], Snapshot]) -> None:
        """Begin to store a checkpoint, or let it wait, or leave it out."""
        if entry.score is not None and entry.score > self.best:
            self.best = entry.score
        elif self.saving is not None:
            if not self.left_out:
                self.left_out = True
                self.line(
                    f"no checkpoint {where}: the one {self.saving.where} is not stored yet, and the training waits for "
                    "none (said once)"
                )
            return
        self.waiting = _Waiting(entry, where, snapshot() if self.writer is not None else None)
        if self.saving is None:
            self.checkpoint_stored()

    def _begin(self, waiting: _Waiting) -> None:
        saved = None
        if self.writer is not None and waiting.snapshot is not None:
            saved = self.writer.begin(waiting.entry, waiting.snapshot)
        if self.attempt is not None:
            self.attempt.checkpoints += 1
        self.begun = time.monotonic()
        self.saving = _Saving(waiting.where, saved)

    def _position_report(self, epochs: range) -> None:
        """Draw the report on rank 0, in the loop's thread: its random draws must not meet those of a training step."""
        saving = self.saving
        self.wait_until_saved()
        if (
            self.tracker is not None
            and self.attempt is not None
            and saving is not None
            and saving.saved is not None
        ):
            from lape_ray.report.progress import report_epoch  # only here: figures need a second to import

            name, _ = saving.saved.result()
            try:
                with (
                    self.attempt.times.within(EVALUATION),
                    storage.opened(storage.join(self.run.folder, name)) as checkpoint,
                ):
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
    attempt: AttemptWriter | None,
    *,
    store_compiled: Callable[[], None],
) -> Iterator[RunReporter]:
    """Open this worker's reporter, and close its tracker and writer at the end.

    Args:
        listed: the run's checkpoints so far, oldest first.
        attempt: rank 0's file of what its time goes into.
        store_compiled: stores what was compiled; it is called before each checkpoint.
    """
    best = max((one.score for one in listed if one.score is not None), default=-math.inf)
    reporter = RunReporter(run, group, world, attempt=attempt, best=best)
    if attempt is not None:
        attempt.continue_after(listed[-1].steps_done if listed else 0)
        reporter.tracker = tracker = tracking.open_tracker(
            run.config.tracking,
            run.tracking_uri,
            run.mlflow_run_id,
            run.folder,
            check=run.check_lease,
        )

        def before_publishing() -> None:
            tracker.save_unsent()
            attempt.save()
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
