"""One training process of a run on Ray: finds the checkpoint to go on from, trains, and carries what it reports."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from lape_ray import storage, tracking
from lape_ray.checkpoint import DamagedError, read_meta, verify
from lape_ray.config import TrainConfig, from_dict
from lape_ray.data.remote import stage_data
from lape_ray.gauges import RunGauges
from lape_ray.signals import News
from lape_ray.state import World
from lape_ray.supervision import LeavingNodes, StopRequest
from lape_ray.train import DivergedError, StoppedError, Take, train

SCORE = "score"  # of a checkpoint: its val/acc1; within an epoch, where nothing was evaluated, UNSCORED
UNSCORED = -1.0
End = Literal["done", "diverged", "stopped", "storage", "failures"]


class StorageError(OSError):
    """A checkpoint could not be stored."""


def run_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train. What ends a run for good is returned on every rank: as an error, Ray Train would repeat it.

    Args:
        payload: `config` as a dict, `folder`, the run's address, `tracking_uri`, `mlflow_run_id` and `supervisor`, the
            actor's handle.

    Returns:
        end: an `End`; reason: in words, where it is not `done`; unsent: values that MLflow did not take
    """
    config = from_dict(TrainConfig, payload["config"])
    _quiet_ray_train()
    device = ray.train.torch.get_device()
    reporter = RayReporter(
        config, folder=payload["folder"], first=ray.train.get_context().get_world_rank() == 0
    )
    if reason := reporter.may_start(payload["supervisor"]):
        return {"end": "failures", "reason": reason, "unsent": 0}
    end: End = "done"
    reason = ""
    try:
        _stage(config, device)
        with _whole_checkpoint(reporter, device) as folder:
            reporter.open(payload, folder)
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
    except BaseException:
        reporter.close(timeout_s=1)  # what it has not sent is trained again, or in the checkpoint
        raise
    return {"end": end, "reason": reason, "unsent": reporter.close()}


def _stage(config: TrainConfig, device: torch.device) -> None:
    """Have data that lies on S3 on this worker's node.

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
    """The newest checkpoint of this run that every worker finds whole; None: there is none yet.

    Raises:
        DamagedError: there are checkpoints, and each is damaged.
    """
    newest = ray.train.get_checkpoint()
    if newest is None:
        yield None
        return
    reported = [entry.checkpoint for entry in ray.train.get_all_reported_checkpoints()]
    others = [checkpoint for checkpoint in reversed(reported) if checkpoint.path != newest.path]
    world, reasons = World.current(device), []
    for checkpoint in (newest, *others):
        with contextlib.ExitStack() as stack:
            reason = ""
            try:
                folder = Path(stack.enter_context(checkpoint.as_directory()))
                verify(folder)
            except (DamagedError, OSError) as error:
                reason = str(error)
            if not world.any(bool(reason)):
                yield folder
                return
        reasons.append(reason or f"{checkpoint.path}: damaged as another worker reads it")
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
    """What a person reads of it."""
    done: Future[Checkpoint] | None
    """Rank 0's; the others only know that there is one."""


@dataclass
class RayReporter:
    """Carries what the loop reports to Ray Train, and from rank 0 to storage, MLflow and the job's log.

    A checkpoint is written and stored by a thread of rank 0 while the training goes on. All ranks report it to Ray
    Train at the step at which they hear that it is stored; from then on it is the one that a restart begins with.
    """

    config: TrainConfig
    folder: str
    """Address of the run's folder."""
    first: bool
    """Whether this is rank 0."""
    tracker: tracking.Tracker | None = None
    nodes: LeavingNodes = field(default_factory=LeavingNodes)
    storing: _Storing | None = None
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    )
    used: set[str] = field(default_factory=set)
    """Names of checkpoints that rank 0 must not write over."""
    wish: StopRequest | None = None
    looked: float = 0.0
    """When rank 0 last looked for a wish to end, on the monotonic clock."""

    # --- before and after ---------------------------------------------------------------------------------------

    def may_start(self, supervisor: Any) -> str:
        """Why this run had better not go on, the same on every rank; empty: it may."""
        reason = ""
        if self.first:
            newest = ray.train.get_checkpoint()
            reason = ray.get(supervisor.started.remote(newest.path if newest else None))
            self.wish = StopRequest(supervisor)
            self.used = {
                Path(known.checkpoint.path).name for known in ray.train.get_all_reported_checkpoints()
            }
        return str(ray.train.collective.broadcast_from_rank_zero(reason))

    def open(self, payload: dict[str, Any], folder: Path | None) -> None:
        """Begin to track, with what the checkpoint in `folder` holds of values that were not stored yet."""
        if not self.first:
            return
        unsent = read_meta(folder).notes.get("unsent", []) if folder else []
        self.tracker = tracking.Tracker(payload["tracking_uri"], payload["mlflow_run_id"], unsent)
        run, workers = self.config.run, ray.train.get_context().get_world_size()
        if not isinstance(run.num_workers, int):
            most = -(-self.config.micro_batches // workers)
            self.line(
                f"{workers} of {run.num_workers} workers; the batch of {self.config.data.batch_size} images is "
                f"{self.config.micro_batches} micro-batches, {most} or fewer for each"
            )

    def close(self, timeout_s: float = 60) -> int:
        """Wait for MLflow to have everything; returns how many values it did not take."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        return self.tracker.close(timeout_s) if self.tracker is not None else 0

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
        score = {SCORE: metrics.get("val/acc1", UNSCORED)}
        self._store({**metrics, **score}, f"checkpoint-epoch-{number:06}", f"after epoch {number}", take)
        every = self.config.run.position_report_epochs
        if every is not None and number % every == 0:
            self._position_report(range(every, number + 1, every))

    def _workers(self) -> dict[str, float]:
        """How many there are, where that changes."""
        if isinstance(self.config.run.num_workers, int):
            return {}
        return {"train/workers": ray.train.get_context().get_world_size()}

    def checkpoint(self, metrics: dict[str, float], *, step: int, take: Take) -> None:
        where = f"within epoch {math.ceil(metrics['epoch'])}, after step {step}"
        if self.storing is not None:
            self.line(f"no checkpoint {where}: the one {self.storing.where} is not stored yet")
            return
        self._store({**metrics, SCORE: UNSCORED}, f"checkpoint-step-{step:09}", where, take)

    def stored(self) -> None:
        """Wait for the checkpoint that is being stored, and make it the one to go on from.

        Raises:
            StorageError: it could not be stored.
        """
        storing, self.storing = self.storing, None
        if storing is None:
            return
        checkpoint, reason = None, ""
        if storing.done is not None:
            try:
                checkpoint = storing.done.result()
            except Exception as error:  # whatever it is, the other ranks must not wait for this one
                reason = str(error) or repr(error)
        reason = ray.train.collective.broadcast_from_rank_zero(reason)
        if reason:
            raise StorageError(
                f"the checkpoint {storing.where} could not be stored: {reason}; free space or choose another "
                "--run.storage. Submitted again, the run goes on from the checkpoint before"
            )
        ray.train.report(
            storing.metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
        )
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

    def _store(self, metrics: dict[str, float], name: str, where: str, take: Take) -> None:
        done = None
        if self.tracker is not None:
            write = take({"unsent": self.tracker.unsent()})
            name = _unused(name, self.used)
            self.used.add(name)
            place = ray.train.get_context().get_storage()
            checkpoint = Checkpoint(
                place.build_checkpoint_path_from_name(name), filesystem=place.storage_filesystem
            )
            done = self.threads.submit(self._bring, storage.join(self.folder, name), write, checkpoint)
        self.storing = _Storing(metrics, where, done)

    def _bring(self, address: str, write: Callable[[Path], None], checkpoint: Checkpoint) -> Checkpoint:
        """Write a checkpoint and store it at `address`, which Ray Train knows as `checkpoint`."""
        began = time.monotonic()

        def bring() -> None:
            with storage.staging(address) as folder:
                write(folder)
                storage.publish(folder, address, last="meta.json")

        storage.patiently(bring, self.config.run.outage_s, self.line)
        self.gauges.show({"checkpoint_s": time.monotonic() - began})
        return checkpoint

    def _position_report(self, epochs: range) -> None:
        """Rank 0 draws, in its own thread: what it draws from must not meet the draws of a training step."""
        storing = self.storing
        self.stored()
        if self.tracker is not None and storing is not None and storing.done is not None:
            with (
                storing.done.result().as_directory() as folder,
                tempfile.TemporaryDirectory(prefix="lape-report-") as drawn,
            ):
                try:
                    self._draw_position(epochs, Path(folder), Path(drawn), self.tracker)
                except (OSError, ValueError) as error:  # the training goes on
                    self.line(f"no position report of epoch {epochs[-1]}: {error}")
        ray.train.collective.barrier()  # here, because a collective of the training has less patience

    def _draw_position(self, epochs: range, checkpoint: Path, drawn: Path, tracker: tracking.Tracker) -> None:
        """A report of the last of these epochs, and one page that follows the run through them."""
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
    """`name`, with a number where a checkpoint has it that was damaged and is trained again."""
    number, free = 2, name
    while free in used:
        free, number = f"{name}-{number}", number + 1
    return free
