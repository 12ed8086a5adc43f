"""One training process of a trial, which trains trial after trial; rank 0 also keeps checkpoints and tells MLflow."""

from __future__ import annotations

import contextlib
import functools
import gc
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from lape_ray import storage, tracking
from lape_ray.cluster.supervisor import StopRequest
from lape_ray.search.checkpoints import History, Trained, TrialFolder, best_of, name_of
from lape_ray.search.trial import Outcome, Part, Settings
from lape_ray.training.checkpoint import Snapshot
from lape_ray.training.flags import Flags
from lape_ray.training.loop import DivergedError, StoppedError, Training

HOPELESS = (ValueError, torch.OutOfMemoryError)
"""What would happen again; anything else is tried again from the newest checkpoint."""
DRAIN_POLL_S = 5.0
STOP_POLL_S = 0.2


def _outcome(method: Callable[..., Any]) -> Callable[..., Outcome]:
    """Return, as an `Outcome`, what a method of a worker returns, or an error that trying again does not mend."""

    @functools.wraps(method)
    def call(*arguments: Any) -> Outcome:
        try:
            return Outcome(value=method(*arguments))
        except StoppedError as error:
            return Outcome(end="stopped", reason=str(error))
        except DivergedError as error:
            return Outcome(end="diverged", reason=f"DivergedError: {error}")
        except HOPELESS as error:
            words = f"{type(error).__name__}: {error}"
            if isinstance(error, torch.OutOfMemoryError):
                words = f"{words.splitlines()[0]}; lower --data.batch_size, or raise --optim.accumulate"
            return Outcome(end="failed", reason=words)

    return call


class Worker:
    """The worker of one rank. Its methods are called by the trial's leader, on all ranks but for `find` at once."""

    def __init__(self, settings: Settings, rank: int, supervisor: Any) -> None:
        self._settings, self._rank = settings, rank
        self._device = torch.device("cuda" if settings.need.get("GPU") else "cpu")
        self._stop = StopRequest(supervisor)
        self._closing = ThreadPoolExecutor(1, thread_name_prefix="close")
        self._closed: Future[Any] | None = None
        self._keeper: Keeper | None = None
        self._training: Training | None = None
        self._opened = contextlib.ExitStack()

    def address(self) -> str:
        """Return an address of this node on which nobody listens yet, for the process group to meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    @_outcome
    def meet(self, address: str) -> None:
        """Form the process group of the trial's workers, where there are several; it serves all trials to come."""
        if self._settings.workers > 1:
            dist.init_process_group(
                "nccl" if self._device.type == "cuda" else "gloo", init_method=f"tcp://{address}",
                rank=self._rank, world_size=self._settings.workers,
                timeout=timedelta(seconds=self._settings.base.run.start_timeout_s),
            )  # fmt: skip

    @_outcome
    def find(self, part: Part) -> dict[str, Any]:
        """Find, on rank 0, the curve so far and the checkpoint to begin with, which may have to be cloned."""
        self._keeper = Keeper(self._settings, part)
        begin_with = self._keeper.find()
        return {**self._keeper.report(), "begin_with": begin_with}

    @_outcome
    def begin(self, part: Part, begin_with: str | None) -> None:
        """Build the training, or restore it from that checkpoint of the trial's folder."""
        keeper = self._keeper if self._rank == 0 else None
        if keeper is not None:
            keeper.open_tracker()
        reporter = TrialReporter(keeper, self._stop)
        folder = None
        if begin_with is not None:
            folder = self._opened.enter_context(TrialFolder(part.folder).opened(begin_with))
        self._training = Training.begin(
            part.config, device=self._device, reporter=reporter, resume_from=folder
        )
        self._opened.close()

    @_outcome
    def epoch(self) -> dict[str, Any] | None:
        """Train the next epoch; rank 0 stores the checkpoint, and returns the curve up to it."""
        assert self._training is not None
        metrics = self._training.epoch()
        if self._rank:
            return None
        assert self._keeper is not None
        self._keeper.epoch(metrics, self._training.snapshot())
        return self._keeper.report()

    def end(self) -> None:
        """Give back what the next trial of this process would inherit."""
        self._opened.close()
        if self._training is not None:
            self._training.close()
        if self._keeper is not None:
            self._closed = self._closing.submit(self._keeper.close)
        self._training = self._keeper = None
        # After eight networks of one process torch would compile no more; where nothing was compiled, asking for it
        # would import the compiler.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Wait until MLflow has everything."""
        if self._closed is not None:
            self._closed.result()


class Keeper:
    """Rank 0's way to the trial's folder and to its MLflow run."""

    def __init__(self, settings: Settings, part: Part) -> None:
        self._settings, self._part = settings, part
        self._folder = TrialFolder(part.folder)
        self._history = History()
        self._protected: str | None = None
        self._tracker: tracking.Tracker | None = None
        self._lines: list[str] = []
        self._clock = time.monotonic()

    def find(self) -> str | None:
        """Find where the trial goes on; returns the name of the checkpoint, None at its beginning."""
        part, folder = self._part, self._folder
        name, self._history = folder.newest(part.config, part.lineage)
        if name is None and part.lineage:
            name, self._history = folder.clone(TrialFolder(part.source), part.config, self._history)
        self._protected = name  # another trial may be cloning it
        return name

    def report(self) -> dict[str, Any]:
        """Return what the search hears of the trial: its curve, what it was cloned from, its best checkpoint."""
        epochs = self._history.epochs
        curve = [{"epoch": one.epoch, "metrics": dict(one.metrics), "seconds": one.seconds} for one in epochs]
        best = self._best()
        checkpoint = self._folder.address(best) if best else ""
        return {
            "curve": curve,
            "checkpoint": checkpoint,
            "loaded": [dict(one) for one in self._history.loaded],
        }

    def _best(self) -> str | None:
        epochs = self._history.epochs
        best = best_of(epochs, self._settings.metric, self._settings.sign)
        return best or (name_of(epochs[-1].steps_done) if epochs else None)

    def open_tracker(self) -> None:
        """Begin to tell MLflow, first what an earlier part of the trial has left unsent."""
        settings = self._settings
        self._tracker = tracking.open_tracker(
            settings.tracking_uri,
            self._part.run_id,
            self._part.folder,
            tensorboard=settings.base.tracking.tensorboard,
            check=self._check_lease,
        )
        self._clock = time.monotonic()

    def _check_lease(self) -> None:
        storage.check_lease(self._settings.folder, self._settings.lease)

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        if self._tracker is not None:
            self._tracker.metrics(metrics, step=step)

    def line(self, text: str) -> None:
        self._lines.append(text)

    def epoch(self, metrics: dict[str, float], snapshot: Snapshot) -> None:
        """Store the checkpoint of an epoch's end, and with it the epoch."""
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        one = Trained(
            epoch=snapshot.metadata.epochs_done,
            metrics=dict(metrics),
            seconds=seconds,
            steps_done=snapshot.metadata.steps_done,
            lineage=self._part.lineage,
        )
        self.metrics(metrics, one.steps_done)
        self._history = replace(self._history, epochs=(*self._history.epochs, one))
        self.store(snapshot)

    def store(self, snapshot: Snapshot) -> None:
        """Store a checkpoint, and delete those that are neither new, nor best, nor protected."""
        metadata = replace(snapshot.metadata, mlflow_run_id=self._part.run_id)
        steps, write = metadata.steps_done, replace(snapshot, metadata=metadata).save
        kept = {name_of(steps), self._protected, self._best()}

        def put() -> None:
            self._check_lease()
            if self._tracker is not None:
                self._tracker.save_unsent()
            self._folder.put(steps, write, self._history)
            self._folder.drop_all_but({name for name in kept if name is not None})

        storage.retry(put, self._settings.base.run.outage_s, self.line)

    def close(self) -> None:
        """Add the loop's lines to the trial's log.txt, and wait until MLflow has everything."""
        if self._lines:
            address = self._folder.address("log.txt")
            before = storage.read_text(address) if storage.exists(address) else ""
            storage.write_text(address, before + "\n".join(self._lines) + "\n")
        if self._tracker is not None:
            self._tracker.close()


@dataclass
class TrialReporter:
    """Carry what the loop reports within an epoch to rank 0's keeper; the other ranks have none."""

    keeper: Keeper | None
    stop: StopRequest
    polled: float = 0.0
    looked: float = 0.0
    leaving: bool = False
    node: str = field(default_factory=lambda: ray.get_runtime_context().get_node_id())

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        if self.keeper is not None:
            self.keeper.metrics(metrics, step)

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        if self.keeper is not None:
            self.keeper.store(snapshot())

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Do nothing: the worker stores the checkpoint of an epoch's end itself."""

    def wait_until_saved(self) -> None:
        """Do nothing: every checkpoint is stored before the training continues."""

    def poll_flags(self) -> Flags:
        if self.keeper is None or time.monotonic() - self.polled < STOP_POLL_S:
            return Flags.NONE
        self.polled = time.monotonic()
        return Flags.STOP if self.stop else Flags.NONE

    def node_leaving(self) -> bool:
        """Tell once that Ray is about to take this worker's node away."""
        if self.leaving or time.monotonic() - self.looked < DRAIN_POLL_S:
            return False
        self.looked = time.monotonic()
        self.leaving = self.node in draining_nodes()
        return self.leaving

    def line(self, text: str) -> None:
        if self.keeper is not None:
            self.keeper.line(text)


def draining_nodes() -> dict[str, int]:
    """Return the ids of nodes that are about to leave the cluster, by a private name of Ray's (as Ray Train does)."""
    return ray._private.state.state.get_draining_nodes() or {}
