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
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lape_ray.cluster.connection import NAMESPACE
from lape_ray.search.record import Trial
from lape_ray.search.settings import EndedError, EndedTogetherError, InterruptedTrialError, Settings, cause_of

FAIL_TOGETHER_S = 1.0  # in which all workers of a trial meet the same error, where it is not of one alone
CLOSE_S = 8.0  # of the ten that Tune gives an actor to end


class WorkerProcess:
    """Hand calls to a `Worker` of this process, which takes seconds to import."""

    def __init__(self, settings: Settings, rank: int, supervisor: Any) -> None:
        from lape_ray.search.worker import Worker

        self._worker = Worker(settings, rank, supervisor)

    def call(self, method: str, *arguments: Any) -> Any:
        return self._worker.call(method, *arguments)


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
        self._trial, self._done, self._idle_s = Trial.of(new_config), new_config["done"], 0.0
        self._found: dict[str, Any] = {}
        return True

    def step(self) -> dict[str, Any]:
        """Report the trial's next epoch: the one that is stored already, else the one that is trained now."""
        self._idle_s = self._idle_s or time.monotonic() - self._left
        try:
            self._next_epoch()
            complete = self._done >= self._settings.plan.epochs
            more: dict[str, Any] = {"complete": complete, "done": complete}
        except InterruptedTrialError:
            more = {"interrupted": True}
        except EndedError as error:
            more = {"failed": str(error), "done": True}
        curve = self._found.get("curve", [])[: self._done]
        last: dict[str, Any] = curve[-1] if curve else {"epoch": 0, "metrics": {}}
        self._left = time.monotonic()
        found = {name: self._found[name] for name in ("checkpoint", "loaded") if self._found}
        told = {**found, "epoch": last["epoch"], "curve": curve, "first_idle_s": self._idle_s}
        return {**last["metrics"], **told, **more}

    def _next_epoch(self) -> None:
        """Go on to the next epoch of the curve, where there is one."""
        self._found = self._found or self._find()
        known = len(self._found["curve"])
        self._done = min(self._done, known)
        if self._done == known < self._settings.plan.epochs:
            self._train_epoch()
        self._done = min(self._done + 1, len(self._found["curve"]))

    def cleanup(self) -> None:
        """End the workers; what they have not sent to MLflow yet has some seconds."""
        self._leave()
        with contextlib.suppress(RayError):
            ray.get([worker.call.remote("close") for worker in self._workers], timeout=CLOSE_S)
        self._end_workers()

    # --- what workers do --------------------------------------------------------------------------------------

    def _find(self) -> dict[str, Any]:
        """Let rank 0 find where the trial goes on: its curve so far, and the checkpoint to begin with."""
        return self._on(self._workers[:1], "find", self._trial)

    def _train_epoch(self) -> None:
        """Train the next epoch on all workers, and store it."""
        if not self._begun:
            self._begun = True
            self._on(self._workers, "begin", self._trial, self._found["begin_with"])
        self._found |= self._on(self._workers, "epoch")

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
                ended = cause_of(error)
                if not isinstance(ended, EndedError):
                    self._end_workers()  # the others may wait for this one in a collective
                    raise
                if waiting and isinstance(ended, EndedTogetherError):
                    continue
                if waiting and ray.wait(waiting, num_returns=len(waiting), timeout=FAIL_TOGETHER_S)[1]:
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
        cpus, gpus = settings.need["CPU"], settings.need.get("GPU", 0)
        environment = {"env_vars": settings.variables}
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus, runtime_env=environment)(WorkerProcess)
        for rank in range(settings.plan.workers):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            worker = actor.options(scheduling_strategy=place).remote(settings, rank, self._supervisor)
            self._workers.append(worker)
        address = self._workers[0].call.remote("address")
        self._meeting = [worker.call.remote("meet", address) for worker in self._workers]

    def _end_workers(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()
