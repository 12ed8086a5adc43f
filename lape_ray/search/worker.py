"""One training process of a trial, which trains trial after trial; rank 0 also keeps checkpoints and tells MLflow."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, TypeVar

import ray
import torch

from lape_ray import storage, tracking
from lape_ray.cluster.interface import join_workers
from lape_ray.cluster.local import free_ports
from lape_ray.cluster.supervisor import LeavingNode, StopRequest
from lape_ray.search.checkpoints import History, TrialFolder, name_of
from lape_ray.search.record import Epoch, Trial, best_epoch, trial_folder
from lape_ray.search.settings import EndedError, EndedTogetherError, InterruptedTrialError, Settings
from lape_ray.training.checkpoint import Snapshot
from lape_ray.training.distributed import forget_training
from lape_ray.training.flags import Flags
from lape_ray.training.loop import DivergedError, StoppedError, Training

T = TypeVar("T")


class Worker:
    """The worker of one rank. Its methods are called by the trial's leader, on all ranks but for `find` at once."""

    def __init__(self, settings: Settings, rank: int, supervisor: Any) -> None:
        self._settings, self._rank = settings, rank
        self._device = torch.device("cuda" if settings.need.get("GPU") else "cpu")
        self._stop = StopRequest(supervisor)
        self._closing = ThreadPoolExecutor(1, thread_name_prefix="close")
        self._reporter: TrialReporter | None = None
        self._training: Training | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method; what it raises becomes an EndedError where another try would not help."""
        try:
            return getattr(self, method)(*arguments)
        except StoppedError as error:
            raise InterruptedTrialError(str(error)) from error
        except (DivergedError, ValueError) as error:
            ended = EndedTogetherError if isinstance(error, DivergedError) else EndedError
            raise ended(f"{type(error).__name__}: {error}") from error
        except torch.OutOfMemoryError as error:
            first = str(error).splitlines()[0]
            fix = "lower --data.batch_size, or raise --optim.accumulate"
            raise EndedError(f"OutOfMemoryError: {first}; {fix}") from error

    def address(self) -> str:
        """Return an address of this node on which nobody listens yet, for the process group to meet."""
        (port,) = free_ports(1)
        return f"{ray.util.get_node_ip_address()}:{port}"

    def meet(self, address: str) -> None:
        """Form the process group of the trial's workers, where there are several; it serves all trials to come."""
        plan, own_address = self._settings.plan, ray.util.get_node_ip_address()
        join_workers(
            self._device, rank=self._rank, size=plan.workers, own_address=own_address,
            timeout_s=plan.base.run.start_timeout_s, init_method=f"tcp://{address}",
        )  # fmt: skip

    def find(self, trial: Trial) -> dict[str, Any]:
        """Find, on rank 0, the curve so far and the checkpoint to begin with, which may have to be cloned."""
        self._reporter = TrialReporter(self._settings, trial, self._stop)
        return self._reporter.find()

    def begin(self, trial: Trial, begin_with: str | None) -> None:
        """Build the training, or restore it from that checkpoint of the trial's folder."""
        self._reporter = self._reporter or TrialReporter(self._settings, trial, None)
        self._training = self._reporter.begin(self._device, begin_with)

    def epoch(self) -> dict[str, Any] | None:
        """Train the next epoch; rank 0 stores it, and returns what the search hears of the trial."""
        training, reporter = self._training, self._reporter
        assert training is not None and reporter is not None
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
        forget_training(self._device)

    def close(self) -> None:
        """Wait until MLflow has everything."""
        self._closing.shutdown()


class TrialReporter:
    """Carry what the loop reports to the trial's folder and its MLflow run, from rank 0.

    Args:
        stop: the request to end the search; None: this is another rank, which only looks for nodes that leave.

    Raises:
        ValueError: the settings of the trial contradict each other.
    """

    def __init__(self, settings: Settings, trial: Trial, stop: StopRequest | None) -> None:
        self._settings, self._trial, self._stop = settings, trial, stop
        self.config, self.folder = settings.plan.config(trial), self._folder_of(trial.number)
        self._history = History()
        self._tracker: tracking.Tracker | None = None
        self._began_with: str | None = None
        self._lines: list[str] = []
        self._node = LeavingNode()

    def _folder_of(self, number: int) -> TrialFolder:
        return TrialFolder(trial_folder(self._settings.folder, number))

    # --- before and after --------------------------------------------------------------------------------------

    def find(self) -> dict[str, Any]:
        """Find where the trial goes on: what `report` says, and the name of the checkpoint to begin with."""
        lineage = tuple((clone.epoch, clone.source) for clone in self._trial.lineage)

        def find() -> tuple[str | None, History]:
            name, history = self.folder.newest(self.config, lineage)
            if name is None and lineage:
                return self.folder.clone(self._folder_of(lineage[-1][1]), self.config, history)
            return name, history

        self._began_with, self._history = self._patiently(find)
        return {**self.report(), "begin_with": self._began_with}

    def begin(self, device: torch.device, begin_with: str | None) -> Training:
        """Begin to tell MLflow, first what an earlier part of the trial has left unsent, and make the training."""
        settings = self._settings
        if self._stop is not None:
            self._tracker = tracking.open_tracker(
                settings.plan.base.tracking, settings.tracking_uri, self._trial.run_id, self.folder.folder,
                check=self._check_lease,
            )  # fmt: skip
        self._clock = time.monotonic()
        with contextlib.ExitStack() as stack:
            enter, opened = stack.enter_context, self.folder.opened
            folder = self._patiently(lambda: enter(opened(begin_with))) if begin_with else None
            return Training.begin(self.config, device=device, reporter=self, resume_from=folder)

    def _patiently(self, work: Callable[[], T]) -> T:
        """Return what `work` does with the storage, which may be away for a while."""
        return storage.retry(work, self.config.run.outage_s, self.line)

    def report(self) -> dict[str, Any]:
        """Return what the search hears of the trial: its curve, what it was cloned from, its best checkpoint."""
        best = self._best()
        checkpoint = self.folder.address(best) if best else ""
        curve = [asdict(one) for one in self._history.epochs]
        return {"curve": curve, "checkpoint": checkpoint, "loaded": list(map(dict, self._history.loaded))}

    def _best(self) -> str | None:
        """Return the name of the best epoch's checkpoint; of the newest, where none was evaluated."""
        plan, epochs = self._settings.plan, self._history.epochs
        best = best_epoch(epochs, plan.metric, plan.sign) or (epochs[-1] if epochs else None)
        return name_of(best.steps_done) if best else None

    def close(self) -> None:
        """Add the loop's lines to the trial's log.txt, and wait until MLflow has everything."""
        if self._lines and self._stop is not None:
            address = self.folder.address("log.txt")
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
        one = Epoch(epoch=round(metrics["epoch"]), metrics=dict(metrics), seconds=seconds, steps_done=step)
        self._history = replace(self._history, epochs=(*self._history.epochs, one))
        self.checkpoint(metrics, step=step, snapshot=snapshot)

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Store a checkpoint, and delete those that are neither new, nor best, nor what this part began with.

        Another trial may be cloning that one.
        """
        if self._stop is None:
            return
        copy = snapshot()
        copy = replace(copy, metadata=replace(copy.metadata, mlflow_run_id=self._trial.run_id))
        kept = {name for name in (name_of(step), self._began_with, self._best()) if name is not None}

        def store() -> None:
            self._check_lease()
            if self._tracker is not None:
                self._tracker.save_unsent()
            self.folder.put(step, copy.save, self._history)
            self.folder.drop_all_but(kept)

        self._patiently(store)

    def _check_lease(self) -> None:
        storage.check_lease(self._settings.folder, self._settings.lease)

    def checkpoint_stored(self) -> None:
        """Do nothing: no flag tells of one."""

    def wait_until_saved(self) -> None:
        """Do nothing: every checkpoint is stored before the training continues."""

    def poll_flags(self) -> Flags:
        return Flags.STOP if self._stop else Flags.NONE

    def node_leaving(self) -> bool:
        return self._node.poll()

    def line(self, text: str) -> None:
        self._lines.append(text)
