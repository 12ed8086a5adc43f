"""One training process of a run on Ray: finds the checkpoint to go on from, trains, and carries what it reports."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import ray.train
import ray.train.collective
import ray.train.torch
import torch

from lape_ray import storage, tracking
from lape_ray.cluster.checkpoint_list import Listed, add, recover, write_list
from lape_ray.cluster.prometheus import RunGauges
from lape_ray.cluster.supervisor import LeavingNodes, StopRequest
from lape_ray.config import TrainConfig, from_dict
from lape_ray.data.remote import stage_data
from lape_ray.storage import LeaseLostError, check_lease
from lape_ray.training.checkpoint import MARKER, DamagedError, verify
from lape_ray.training.flags import News
from lape_ray.training.loop import DivergedError, StoppedError, Take, train
from lape_ray.training.state import World

End = Literal["done", "diverged", "stopped", "storage", "failures", "lost"]


class StorageError(OSError):
    """A checkpoint could not be stored."""


def run_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train. What ends a run for good is returned on every rank: as an error, Ray Train would repeat it.

    Args:
        payload: `config` as a dict, `folder`, the run's address, `lease`, the token of its owner, `tracking_uri`,
            `mlflow_run_id` and `supervisor`, the actor's handle.

    Returns:
        end: an `End`; reason: in words, where it is not `done`
    """
    config = from_dict(TrainConfig, payload["config"])
    _quiet_ray_train()
    device = ray.train.torch.get_device()
    first = ray.train.get_context().get_world_rank() == 0
    reporter = RayReporter(config, folder=payload["folder"], lease=payload["lease"], first=first)
    end, reason = reporter.may_start(payload["supervisor"])
    if end != "done":
        return {"end": end, "reason": reason}
    try:
        _stage(config, device)
        with _whole_checkpoint(reporter, device) as folder:
            reporter.open(payload)
            train(
                config,
                device=device,
                reporter=reporter,
                resume_from=folder,
                mlflow_run_id=payload["mlflow_run_id"],
            )
    except DivergedError as error:
        end, reason = "diverged", str(error)
    except StoppedError as error:
        end, reason = "stopped", str(error)
    except StorageError as error:
        end, reason = "storage", str(error)
    except LeaseLostError as error:
        end, reason = "lost", str(error)
    except BaseException:
        reporter.close(timeout_s=1)  # what it has not sent is trained again, or in the run's folder
        raise
    reporter.close()
    return {"end": end, "reason": reason}


def _stage(config: TrainConfig, device: torch.device) -> None:
    """Fetch data that lies on S3 to this worker's node.

    Nodes are ready at different times, and some perhaps after hours. All ask each other now and then whether they are,
    so that no time limit of a collective runs out, and all end when one of them fails.
    """
    if not any(map(storage.is_remote, (config.data.train, config.data.val))):
        return
    world, pause = World.current(device), 0.2
    pool = ThreadPoolExecutor(1, thread_name_prefix="stage")
    ready = pool.submit(stage_data, config.data)
    pool.shutdown(wait=False)
    while True:
        wait([ready], timeout=pause)
        done, failed = ready.done(), ready.done() and ready.exception() is not None
        if world.any(failed):
            break
        if not world.any(not done):
            return
        pause = 5.0
    if failed:
        ready.result()
    raise OSError("another worker could not copy the data from S3; its own error says why")


@contextlib.contextmanager
def _whole_checkpoint(reporter: RayReporter, device: torch.device) -> Iterator[Path | None]:
    """Open the newest checkpoint of this run that every worker finds whole; None: the run has none yet.

    Raises:
        DamagedError: the run has checkpoints, and each is damaged.
    """
    if not reporter.listed:
        yield None
        return
    world, reasons = World.current(device), []
    for count in range(len(reporter.listed), 0, -1):
        name = reporter.listed[count - 1].name
        with contextlib.ExitStack() as stack:
            reason = ""
            try:
                folder = stack.enter_context(storage.opened(storage.join(reporter.folder, name)))
                verify(folder)
            except (ValueError, OSError) as error:
                reason = str(error)
            if not world.any(bool(reason)):
                reporter.go_on_from(count)
                yield folder
                return
        reasons.append(reason or f"{name}: damaged as another worker reads it")
        reporter.line(f"warning: a checkpoint cannot be used, trying the one before: {reasons[-1]}")
    raise DamagedError(
        f"no checkpoint of this run is whole ({'; '.join(reasons)}); "
        "restore one of them, or start again with --run.overwrite true"
    )


def _quiet_ray_train() -> None:
    """Keep Ray Train from repeating every report's metrics for every rank.

    Some of its loggers are named after their file instead of their module, so that LoggingConfig misses them.
    """
    for name in list(logging.root.manager.loggerDict):
        if "ray/train/" in name:
            logging.getLogger(name).setLevel(logging.WARNING)


@dataclass
class _Storing:
    """A checkpoint on its way to storage."""

    metrics: dict[str, float]
    where: str
    """The place in the training, in words for people."""
    done: Future[str] | None
    """On rank 0 the storing, which returns the folder's name; the other ranks have none."""


@dataclass
class RayReporter:
    """Carry what the loop reports to Ray Train, and from rank 0 to storage, MLflow and the job's log.

    A checkpoint is written, stored and listed by a thread of rank 0 while the training goes on; from then on it is the
    one that a restart begins with. Ray Train hears of its metrics and not of the checkpoint: its own list is written in
    place, so that a full disk or a kill can leave it empty.
    """

    config: TrainConfig
    folder: str
    """Address of the run's folder."""
    lease: str
    """Token of the owner of the run's folder; without it nothing is stored there."""
    first: bool
    """True on rank 0."""
    tracker: tracking.Tracker | None = None
    nodes: LeavingNodes = field(default_factory=LeavingNodes)
    storing: _Storing | None = None
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    )
    listed: tuple[Listed, ...] = ()
    """The run's checkpoints, oldest first. On other ranks than 0, as they were at the start."""
    used: set[str] = field(default_factory=set)
    """Names of folders that rank 0 must not write over."""
    wish: StopRequest | None = None
    looked: float = 0.0
    """The time at which rank 0 last looked for a wish to end, on the monotonic clock."""

    # --- before and after ---------------------------------------------------------------------------------------

    def may_start(self, supervisor: Any) -> tuple[End, str]:
        """Find the run's checkpoints; returns how the run ends here and why, or `done` if it goes on, on all ranks."""
        end: End = "done"
        reason = ""
        if self.first:
            try:
                storage.patiently(self._find_checkpoints, self.config.run.outage_s, self.line)
                newest = self.listed[-1].name if self.listed else None
                reason = ray.get(supervisor.started.remote(newest))
                end = "failures" if reason else "done"
                self.wish = StopRequest(supervisor)
            except LeaseLostError as error:
                end, reason = "lost", str(error)
        end, reason, self.listed = ray.train.collective.broadcast_from_rank_zero((end, reason, self.listed))
        return end, reason

    def _find_checkpoints(self) -> None:
        check_lease(self.folder, self.lease)
        self.listed = recover(self.folder, self.line)
        self.used = set(storage.folders(self.folder))

    def go_on_from(self, count: int) -> None:
        """Take the first `count` checkpoints for the run's; later ones are damaged, and their folders stay."""
        if self.first and count < len(self.listed):
            write_list(self.folder, self.listed[:count])
        self.listed = self.listed[:count]

    def open(self, payload: dict[str, Any]) -> None:
        """Begin to track."""
        if not self.first:
            return
        self.tracker = tracking.open_tracker(
            payload["tracking_uri"],
            payload["mlflow_run_id"],
            self.folder,
            tensorboard=self.config.run.tensorboard,
            check=partial(check_lease, self.folder, self.lease),
        )
        run, workers = self.config.run, ray.train.get_context().get_world_size()
        if not isinstance(run.num_workers, int):
            most = -(-self.config.micro_batches // workers)
            self.line(
                f"{workers} of {run.num_workers} workers; the batch of {self.config.data.batch_size} images is "
                f"{self.config.micro_batches} micro-batches, {most} or fewer for each"
            )

    def close(self, timeout_s: float = 60) -> None:
        """Wait for the tracker to have sent everything."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        if self.tracker is not None:
            self.tracker.close(timeout_s)

    # --- what the loop calls --------------------------------------------------------------------------------------

    @cached_property
    def gauges(self) -> RunGauges:
        return RunGauges(self.config.run.name or "", ray.train.get_context().get_world_rank())

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        rate = self.config.data.batch_size / metrics["train/step_s"]
        self.gauges.show({**metrics, "train/images_per_s": rate})
        if self.tracker is not None:
            self.tracker.metrics(metrics, step=step)

    def epoch(self, metrics: dict[str, float], *, step: int, take: Take) -> None:
        self.gauges.show({key: metrics[key] for key in ("epoch", "val/acc1") if key in metrics})
        if self.tracker is not None:
            self.tracker.metrics({**metrics, **self._workers()}, step=step)
        self.stored()
        number = round(metrics["epoch"])
        new = Listed(name=f"checkpoint-epoch-{number:06}", steps_done=step, score=metrics.get("val/acc1"))
        self._store(metrics, new, f"after epoch {number}", take)
        every = self.config.run.position_report_epochs
        if every is not None and number % every == 0:
            self._position_report(range(every, number + 1, every))

    def _workers(self) -> dict[str, float]:
        """Return the number of workers, where that changes."""
        if isinstance(self.config.run.num_workers, int):
            return {}
        return {"train/workers": ray.train.get_context().get_world_size()}

    def checkpoint(self, metrics: dict[str, float], *, step: int, take: Take) -> None:
        where = f"within epoch {math.ceil(metrics['epoch'])}, after step {step}"
        if self.storing is not None:
            self.line(f"no checkpoint {where}: the one {self.storing.where} is not stored yet")
            return
        self._store(metrics, Listed(name=f"checkpoint-step-{step:09}", steps_done=step), where, take)

    def stored(self) -> None:
        """Wait for the checkpoint that is being stored, and make it the one to go on from.

        Raises:
            StorageError: it could not be stored.
            LeaseLostError: another driver goes on with the run.
        """
        storing, self.storing = self.storing, None
        if storing is None:
            return
        lost, reason = False, ""
        if storing.done is not None:
            try:
                storing.done.result()
            except Exception as error:  # whatever it is, the other ranks must not wait for this one
                lost, reason = isinstance(error, LeaseLostError), str(error) or repr(error)
        lost, reason = ray.train.collective.broadcast_from_rank_zero((lost, reason))
        if lost:
            raise LeaseLostError(reason)
        if reason:
            raise StorageError(
                f"the checkpoint {storing.where} could not be stored: {reason}; free space or choose another "
                "--run.storage. Submitted again, the run goes on from the checkpoint before"
            )
        ray.train.report(storing.metrics)
        self.line(f"checkpoint {storing.where}")

    def leaving(self) -> bool:
        return self.nodes.news()

    def news(self) -> News:
        news = News.NONE
        if self.storing is not None and self.storing.done is not None and self.storing.done.done():
            news |= News.STORED
        if self.wish is not None and time.monotonic() - self.looked > 0.2:
            self.looked = time.monotonic()
            if self.wish:
                news |= News.STOP
        return news

    def line(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    # --- storing --------------------------------------------------------------------------------------------------

    def _store(self, metrics: dict[str, float], new: Listed, where: str, take: Take) -> None:
        done = None
        if self.tracker is not None:
            write = take({})
            new = replace(new, name=_unused(new.name, self.used))
            self.used.add(new.name)
            done = self.threads.submit(self._bring, new, write)
        self.storing = _Storing(metrics, where, done)

    def _bring(self, new: Listed, write: Callable[[Path], None]) -> str:
        """Write a checkpoint, store and list it, and delete those that it supersedes; returns its folder's name."""
        began = time.monotonic()
        address = storage.join(self.folder, new.name)

        published = False

        def bring() -> None:
            nonlocal published
            check_lease(self.folder, self.lease)
            if not published:
                with storage.staging(address) as folder:
                    write(folder)
                    if self.tracker is not None:  # before: one that is whole counts, listed or not
                        self.tracker.save_unsent()
                    storage.publish(folder, address, last=MARKER)
                published = True
            check_lease(self.folder, self.lease)
            self.listed = add(self.folder, self.listed, new, keep=self.config.run.keep_checkpoints)

        storage.patiently(bring, self.config.run.outage_s, self.line)
        self.gauges.show({"checkpoint_s": time.monotonic() - began})
        return new.name

    def _position_report(self, epochs: range) -> None:
        """Draw the report on rank 0, in the loop's thread: its random draws must not meet those of a training step."""
        storing = self.storing
        self.stored()
        if self.tracker is not None and storing is not None and storing.done is not None:
            with (
                storage.opened(storage.join(self.folder, storing.done.result())) as folder,
                tempfile.TemporaryDirectory(prefix="lape-report-") as drawn,
            ):
                try:
                    self._draw_position(epochs, folder, Path(drawn), self.tracker)
                except (OSError, ValueError) as error:  # the training goes on
                    self.line(f"no position report of epoch {epochs[-1]}: {error}")
        ray.train.collective.barrier()  # here, because a collective of the training has less patience

    def _draw_position(self, epochs: range, checkpoint: Path, drawn: Path, tracker: tracking.Tracker) -> None:
        """Draw a report of the last of these epochs, and one page that follows the run through them."""
        from lape_ray.report import progress  # only here: figures need a second to import
        from lape_ray.report.build import checkpoint_report

        epoch = epochs[-1]
        seen = checkpoint_report(checkpoint, self.config, f"epoch {epoch}", drawn / "report")
        if seen is None:
            return
        tracker.files(drawn / "report", f"position_report/epoch-{epoch:06}")
        what, maps_LYX = progress.training_maps(seen)
        progress.remember(self.folder, epoch, maps_LYX)
        maps = progress.recall(self.folder, epochs)
        progress.write_training_page(self.config.run.name or "", what, maps, drawn / "training")
        tracker.files(drawn / "training", "position_report")


def _unused(name: str, used: set[str]) -> str:
    """Return `name`, with a number where a checkpoint has it that was damaged and is trained again."""
    number, free = 2, name
    while free in used:
        free, number = f"{name}-{number}", number + 1
    return free
