"""A trial of a search as Ray Tune runs it: an actor that leads the trial's workers, one epoch a step.

The leader computes nothing and sits in no collective: a worker that dies would leave it hanging there, while here the
first worker that fails ends the step. The workers stay warm from trial to trial; a process imports torch, meets its
companions and opens MLflow once. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lape_ray.search.record import trial_folder
from lape_ray.search.settings import Part, Settings, train_config

NAMESPACE = "lape_ray"
OF_ALL = ("StoppedError", "DivergedError")
"""Errors that come to all workers of a trial at the same step; by name, as their module takes seconds to import."""
FAIL_TOGETHER_S = 1.0  # in which all workers of a trial meet the same error, where it is not of one alone
CLOSE_S = 8.0  # of the ten that Tune gives an actor to end


class EndedError(Exception):
    """A trial ended before its epoch did, in a way that comes again."""


class StoppedTrialError(EndedError):
    """It was asked to end, and left a checkpoint."""


class WorkerProcess:
    """Hand calls to a `Worker` of this process, which takes seconds to import."""

    def __init__(self, settings: Settings, rank: int, supervisor: Any) -> None:
        from lape_ray.search.worker import Worker

        self._worker = Worker(settings, rank, supervisor)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._worker, method)(*arguments)


class LapeTrial(tune.Trainable):
    """Train a trial of a search, one epoch a step.

    A step's result holds the trial's whole curve so far. Tune keeps no checkpoints: they are in the trial's folder, and
    with each the curve up to it. Epochs that are stored there, but that the search has not heard of because it goes on
    from an older snapshot, are reported again and not trained again.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Start the workers in the trial's placement group, without waiting for them."""
        logging.getLogger("ray.tune").setLevel(logging.WARNING)
        self._supervisor = ray.get_actor(config["folder"], namespace=NAMESPACE)
        self._settings: Settings = ray.get(self._supervisor.settings.remote())
        self._workers: list[Any] = []
        self._meeting: list[Any] = []
        self._begun = False
        self._left = time.monotonic()
        self._start_workers()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make ready for another trial, or for another part of one."""
        self._leave()
        self._trial, self._idle_s = new_config, 0.0
        self._found: dict[str, Any] = {}
        self._curve: list[dict[str, Any]] = []
        return True

    def step(self) -> dict[str, Any]:
        """Report the trial's next epoch: the one that is stored already, else the one that is trained now."""
        self._idle_s = self._idle_s or time.monotonic() - self._left
        try:
            self._next_epoch()
            complete = len(self._curve) >= self._settings.base.optim.total_epochs
            more: dict[str, Any] = {"complete": complete, "done": complete}
        except StoppedTrialError:
            more = {"interrupted": True}
        except EndedError as error:
            more = {"failed": str(error), "done": True}
        last: dict[str, Any] = self._curve[-1] if self._curve else {"epoch": 0, "metrics": {}}
        found = {name: self._found[name] for name in ("checkpoint", "loaded") if self._found}
        self._left = time.monotonic()
        return {
            **last["metrics"], "epoch": last["epoch"], "curve": list(self._curve), **found, **more,
            "first_idle_s": self._idle_s,
        }  # fmt: skip

    def _next_epoch(self) -> None:
        """Add the next epoch to the curve, where there is one."""
        if not self._found:
            self._found = self._find()
            self._curve = self._found["curve"][: self._trial["done"]]
        done = len(self._curve)
        if done < len(self._found["curve"]):
            self._curve.append(self._found["curve"][done])
        elif done < self._settings.base.optim.total_epochs:
            self._train_epoch()

    def cleanup(self) -> None:
        """End the workers; what they have not sent to MLflow yet has some seconds."""
        self._leave()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([worker.call.remote("close") for worker in self._workers], timeout=CLOSE_S)
        self._end_workers()

    # --- what workers do --------------------------------------------------------------------------------------

    def _find(self) -> dict[str, Any]:
        """Let rank 0 find where the trial goes on: its curve so far, and the checkpoint to begin with."""
        try:
            self._part = self._part_of(self._trial)
        except ValueError as error:
            raise EndedError(f"ValueError: {error}") from None
        return self._on(self._workers[:1], "find", self._part)

    def _part_of(self, trial: dict[str, Any]) -> Part:
        settings, lineage = self._settings, trial["lineage"]
        return Part(
            config=train_config(settings.base, settings.name, trial),
            folder=trial_folder(settings.folder, trial["number"]),
            lineage=tuple((clone["epoch"], clone["source"]) for clone in lineage),
            source=trial_folder(settings.folder, lineage[-1]["source"]) if lineage else "",
            run_id=trial["run_id"],
        )

    def _train_epoch(self) -> None:
        """Train the next epoch on all workers, and store it."""
        if not self._begun:
            self._begun = True
            self._on(self._workers, "begin", self._part, self._found["begin_with"])
        self._found |= self._on(self._workers, "epoch")
        self._curve = list(self._found["curve"])

    def _on(self, workers: list[Any], method: str, *arguments: Any) -> Any:
        """Call a method on some workers at once; returns what the first of them does.

        Raises:
            EndedError: the trial ends here, and the workers can go on to another one.
            RayError: a worker died, or failed in a way that may not come again.
        """
        calls = [worker.call.remote(method, *arguments) for worker in workers]
        waiting, self._meeting = [*self._meeting, *calls], []
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                ray.get(ready[0])
            except Exception as error:
                ended = _ended(error)
                if not waiting and ended is not None:
                    raise ended from None
                if type(_cause(error)).__name__ in OF_ALL:
                    continue
                if ended is None:
                    self._end_workers()  # the others may wait for this one in a collective
                    raise
                if ray.wait(waiting, num_returns=len(waiting), timeout=FAIL_TOGETHER_S)[1]:
                    self._start_workers()
                raise ended from None
        return ray.get(calls[0])

    def _leave(self) -> None:
        """Let the workers give back what they hold of a trial."""
        if self._begun:
            for worker in self._workers:
                worker.call.remote("end")
        self._begun = False

    def _start_workers(self) -> None:
        """Start a process for each rank in the trial's placement group; they meet while the leader goes on."""
        self._end_workers()
        settings, group = self._settings, ray.util.get_current_placement_group()
        actor = ray.remote(WorkerProcess)
        for rank in range(settings.workers):
            self._workers.append(
                actor.options(
                    num_cpus=settings.need["CPU"],
                    num_gpus=settings.need.get("GPU", 0),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=rank
                    ),
                    runtime_env={"env_vars": settings.variables},
                ).remote(settings, rank, self._supervisor)
            )
        address = self._workers[0].call.remote("address")
        self._meeting = [worker.call.remote("meet", address) for worker in self._workers]

    def _end_workers(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()


def _cause(error: BaseException) -> BaseException:
    """Return what a worker raised."""
    while isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    return error


def _ended(error: BaseException) -> EndedError | None:
    """Say how the trial ended with what a worker raised; None where another try may help."""
    cause = _cause(error)
    name = type(cause).__name__
    if name == "StoppedError":
        return StoppedTrialError(str(cause))
    if name == "OutOfMemoryError" and not isinstance(cause, ray.exceptions.RayError):
        first = str(cause).splitlines()[0]
        return EndedError(f"{name}: {first}; lower --data.batch_size, or raise --optim.accumulate")
    if name == "DivergedError" or isinstance(cause, ValueError):
        return EndedError(f"{name}: {cause}")
    return None
