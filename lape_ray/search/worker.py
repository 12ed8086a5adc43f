"""One training process of a trial, which trains trial after trial; rank 0 also keeps checkpoints and tells MLflow."""

from __future__ import annotations

import contextlib
import gc
import math
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from lape_ray import storage, tracking
from lape_ray.cluster.supervisor import StopRequest
from lape_ray.search.checkpoints import History, Trained, TrialFolder, best_of, name_of
from lape_ray.search.settings import Part, Settings
from lape_ray.training.checkpoint import Snapshot
from lape_ray.training.flags import Flags
from lape_ray.training.loop import Training

STOP_POLL_S, DRAIN_POLL_S = 0.2, 5.0


class Worker:
    """The worker of one rank. Its methods are called by the trial's leader, on all ranks but for `find` at once.

    What they raise ends the trial where it would come again (see `trial.LapeTrial`), or is tried again.
    """

    def __init__(self, settings: Settings, rank: int, supervisor: Any) -> None:
        self._settings, self._rank = settings, rank
        self._device = torch.device("cuda" if settings.need.get("GPU") else "cpu")
        self._stop = StopRequest(supervisor)
        self._closing = ThreadPoolExecutor(1, thread_name_prefix="close")
        self._reporter: TrialReporter | None = None
        self._training: Training | None = None

    def address(self) -> str:
        """Return an address of this node on which nobody listens yet, for the process group to meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def meet(self, address: str) -> None:
        """Form the process group of the trial's workers, where there are several; it serves all trials to come."""
        if self._settings.workers > 1:
            dist.init_process_group(
                "nccl" if self._device.type == "cuda" else "gloo", init_method=f"tcp://{address}",
                rank=self._rank, world_size=self._settings.workers,
                timeout=timedelta(seconds=self._settings.base.run.start_timeout_s),
            )  # fmt: skip

    def find(self, part: Part) -> dict[str, Any]:
        """Find, on rank 0, the curve so far and the checkpoint to begin with, which may have to be cloned."""
        self._reporter = TrialReporter(self._settings, part, self._stop)
        return self._reporter.find()

    def begin(self, part: Part, begin_with: str | None) -> None:
        """Build the training, or restore it from that checkpoint of the trial's folder."""
        if self._rank or self._reporter is None:
            self._reporter = TrialReporter(self._settings, part, None)
        else:
            self._reporter.open_tracker()
        with contextlib.ExitStack() as stack:
            folder = None
            if begin_with is not None:
                folder = stack.enter_context(TrialFolder(part.folder).opened(begin_with))
            self._training = Training.begin(
                part.config, device=self._device, reporter=self._reporter, resume_from=folder
            )

    def epoch(self) -> dict[str, Any] | None:
        """Train the next epoch; rank 0 stores it, and returns what the search hears of the trial."""
        training, reporter = self._training, self._reporter
        assert training is not None
        assert reporter is not None
        metrics = training.epoch()
        if self._rank:
            return None
        reporter.epoch(metrics, step=training.steps_done, snapshot=training.snapshot)
        return reporter.report()

    def end(self) -> None:
        """Give back what the next trial of this process would inherit."""
        if self._training is not None:
            self._training.close()
        if self._reporter is not None:
            self._closing.submit(self._reporter.close)
        self._training = self._reporter = None
        # After eight networks of one process torch would compile no more; where nothing was compiled, asking for it
        # would import the compiler.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Wait until MLflow has everything."""
        self._closing.shutdown()


class TrialReporter:
    """Carry what the loop reports to the trial's folder and its MLflow run, from rank 0.

    Args:
        stop: the request to end the search; None: this is another rank, which only looks for nodes that leave.
    """

    def __init__(self, settings: Settings, part: Part, stop: StopRequest | None) -> None:
        self._settings, self._part, self._stop = settings, part, stop
        self._folder, self._history = TrialFolder(part.folder), History()
        self._tracker: tracking.Tracker | None = None
        self._began_with: str | None = None
        self._lines: list[str] = []
        self._node = ray.get_runtime_context().get_node_id()
        self._clock = time.monotonic()
        self._polled = self._looked = 0.0

    # --- before and after --------------------------------------------------------------------------------------

    def find(self) -> dict[str, Any]:
        """Find where the trial goes on: what `report` says, and the name of the checkpoint to begin with."""
        part, folder = self._part, self._folder
        name, self._history = folder.newest(part.config, part.lineage)
        if name is None and part.lineage:
            name, self._history = folder.clone(TrialFolder(part.source), part.config, self._history)
        self._began_with = name
        return {**self.report(), "begin_with": name}

    def report(self) -> dict[str, Any]:
        """Return what the search hears of the trial: its curve, what it was cloned from, its best checkpoint."""
        curve = [
            {"epoch": one.epoch, "metrics": dict(one.metrics), "seconds": one.seconds}
            for one in self._history.epochs
        ]
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
        settings, part = self._settings, self._part
        self._tracker = tracking.open_tracker(
            settings.base.tracking, settings.tracking_uri, part.run_id, part.folder, check=self._check_lease
        )
        self._clock = time.monotonic()

    def close(self) -> None:
        """Add the loop's lines to the trial's log.txt, and wait until MLflow has everything."""
        if self._lines and self._stop is not None:
            address = self._folder.address("log.txt")
            before = storage.read_text(address) if storage.exists(address) else ""
            storage.write_text(address, before + "\n".join(self._lines) + "\n")
        if self._tracker is not None:
            self._tracker.close()

    # --- what the loop calls -----------------------------------------------------------------------------------

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        if self._tracker is not None:
            self._tracker.metrics(metrics, step=step)

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        self.step(metrics, step=step)
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        one = Trained(
            epoch=round(metrics["epoch"]), metrics=dict(metrics), seconds=seconds, steps_done=step,
            lineage=self._part.lineage,
        )  # fmt: skip
        self._history = replace(self._history, epochs=(*self._history.epochs, one))
        self.checkpoint(metrics, step=step, snapshot=snapshot)

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Store a checkpoint, and delete those that are neither new, nor best, nor what this part began with.

        Another trial may be cloning that one.
        """
        if self._stop is None:
            return
        copy = snapshot()
        copy = replace(copy, metadata=replace(copy.metadata, mlflow_run_id=self._part.run_id))
        kept = {name for name in (name_of(step), self._began_with, self._best()) if name is not None}

        def store() -> None:
            self._check_lease()
            if self._tracker is not None:
                self._tracker.save_unsent()
            self._folder.put(step, copy.save, self._history)
            self._folder.drop_all_but(kept)

        storage.retry(store, self._settings.base.run.outage_s, self.line)

    def _check_lease(self) -> None:
        storage.check_lease(self._settings.folder, self._settings.lease)

    def wait_until_saved(self) -> None:
        """Do nothing: every checkpoint is stored before the training continues."""

    def poll_flags(self) -> Flags:
        if self._stop is None or time.monotonic() - self._polled < STOP_POLL_S:
            return Flags.NONE
        self._polled = time.monotonic()
        return Flags.STOP if self._stop else Flags.NONE

    def node_leaving(self) -> bool:
        """Tell once that Ray is about to take this worker's node away."""
        if time.monotonic() - self._looked < DRAIN_POLL_S:
            return False
        leaving = self._node in draining_nodes()
        self._looked = math.inf if leaving else time.monotonic()
        return leaving

    def line(self, text: str) -> None:
        self._lines.append(text)


def draining_nodes() -> dict[str, int]:
    """Return the ids of nodes that are about to leave the cluster, by a private name of Ray's (as Ray Train does)."""
    return ray._private.state.state.get_draining_nodes() or {}
