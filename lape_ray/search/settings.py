"""Carry what the driver of a search and the processes of its trials tell each other. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ray import tune
from ray.exceptions import RayTaskError

from lape_ray.cluster.resources import worker_resources
from lape_ray.cluster.supervisor import Supervisor
from lape_ray.config import RunConfig
from lape_ray.search.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold what all trials of a search share while one driver is at work on it.

    Attributes:
        folder: address of the search's folder
        lease: token of the driver that owns the folder
        need: what each worker takes of its node, Ray's resource -> amount
        variables: environment of the workers
    """

    plan: Plan
    folder: str
    lease: str
    tracking_uri: str
    need: dict[str, float]
    variables: dict[str, str]

    @property
    def resources(self) -> tune.PlacementGroupFactory:
        """Say what a trial takes of the cluster: nothing for its leader, `need` for each worker."""
        return tune.PlacementGroupFactory([{}] + [self.need] * self.plan.workers)


class SearchSupervisor(Supervisor):
    """Hold what a search's driver and its trials share: the wish to end it, and its settings."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(max_failures=0)
        self._settings = settings

    async def settings(self) -> Settings:
        """Return what all trials share."""
        return self._settings


class EndedError(Exception):
    """A trial ended before its last epoch, in a way that would come again; its workers can go on to another one."""


class EndedTogetherError(EndedError):
    """It comes to all workers of the trial at the same step."""


class InterruptedTrialError(EndedTogetherError):
    """The search is to end, and the trial has left a checkpoint."""


def cause_of(error: BaseException) -> BaseException:
    """Return what was raised in the process that an error comes from."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def worker_need(run: RunConfig, *, use_gpu: bool, gpus_per_worker: float | None) -> dict[str, float]:
    """Return what each worker of a trial takes, Ray's resource -> amount; a part of a GPU only for single workers.

    Raises:
        ValueError: the share of a GPU cannot be had.
    """
    gpus = 1.0 if gpus_per_worker is None else gpus_per_worker
    if gpus_per_worker is not None and not use_gpu:
        raise ValueError("--gpus-per-worker needs GPUs, but trials run on CPUs; leave it out")
    if use_gpu and not (0 < gpus <= 1):
        raise ValueError(f"--gpus-per-worker {gpus:g} must be above 0 and at most 1: a worker uses one GPU")
    if gpus < 1 and use_gpu and run.workers.high > 1:
        raise ValueError(
            f"--gpus-per-worker {gpus:g} would put workers of one trial on one GPU, which NCCL refuses: "
            "set --run.num_workers 1, or leave it out"
        )
    return worker_resources(run, gpus if use_gpu else 0)
