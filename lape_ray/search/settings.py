"""What the driver of a search tells the processes of its trials. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray import tune

from lape_ray.cluster.supervisor import Supervisor
from lape_ray.config import TrainConfig, replace_fields


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all trials of a search share while one driver is at work on it.

    Attributes:
        base: the config that every trial starts from
        folder: address of the search's folder
        lease: token of the driver that owns the folder
        metric: what is compared; `sign` is 1 where more is better, -1 where less is
        need: what each worker takes of its node, Ray's resource -> amount
        workers: of each trial
        variables: environment of the workers
    """

    base: TrainConfig
    name: str
    folder: str
    lease: str
    tracking_uri: str
    metric: str
    sign: int
    need: dict[str, float]
    workers: int
    variables: dict[str, str]

    @property
    def resources(self) -> tune.PlacementGroupFactory:
        """What a trial takes of the cluster: nothing for its leader, `need` for each worker."""
        return tune.PlacementGroupFactory([{}] + [self.need] * self.workers)


class SearchSupervisor(Supervisor):
    """What a search's driver and its trials share: the wish to end it, and its settings."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(max_failures=0)
        self._settings = settings

    async def settings(self) -> Settings:
        """Return what all trials share."""
        return self._settings


def train_config(base: TrainConfig, name: str, trial: dict[str, Any]) -> TrainConfig:
    """Make the whole config of a trial of the search `name`; a ValueError says which settings contradict each other."""
    values = dict(trial["values"])
    for clone in trial["lineage"]:
        values |= clone["values"]
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return replace_fields(
        base, {**tuples, "training.seed": trial["seed"], "run.name": f"{name}-{trial['number']:04}"}
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """What workers are to train: a trial from its beginning, or since it was cloned.

    Attributes:
        folder: address of the trial's folder
        lineage: (epoch, source) of each time it was cloned
        source: folder of the trial that it was cloned from last
    """

    config: TrainConfig
    folder: str
    lineage: tuple[tuple[int, int], ...]
    source: str
    run_id: str
