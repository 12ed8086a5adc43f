"""What is known of a search and of its trials. Knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lape_ray import storage

State = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
OVER: tuple[State, ...] = ("finished", "stopped", "failed")
RECORD = "search.json"
WAY_OUT = "choose another --run.name, or move the folder away"


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What an epoch of a trial came to; `seconds` from the report before it, or from the trial's start."""

    epoch: int
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Clone:
    """Population-based training: after `epoch`, the trial took over the weights of trial `source` and new values."""

    epoch: int
    source: int
    values: Mapping[str, Any]


@dataclass(kw_only=True)
class Trial:
    """One training run of a search.

    Attributes:
        number: its place among the trials, from 0
        point: number of the point of the space; the same for its other seeds
        label: the point in words
        first: `section.field` -> value that it began with
        crashes: times that workers died while they trained it
        lineage: whom it was cloned from, in the order of epochs
        loaded: for each clone, what it loaded: epoch, source and the weights' sha256
        checkpoint: address of its best, or newest, checkpoint
    """

    number: int
    point: int
    seed: int
    label: str
    first: dict[str, Any]
    state: State = "waiting"
    error: str = ""
    run_id: str = ""
    crashes: int = 0
    checkpoint: str = ""
    epochs: list[Epoch] = field(default_factory=list)
    lineage: list[Clone] = field(default_factory=list)
    loaded: list[dict[str, Any]] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """`section.field` -> value, as they are now."""
        return self.values_before(None)

    def values_before(self, epoch: int | None) -> dict[str, Any]:
        """Return the values with which it came to the end of `epoch`, before it was cloned there; None: the latest."""
        found = dict(self.first)
        for clone in self.lineage:
            if epoch is None or clone.epoch < epoch:
                found |= clone.values
        return found

    @property
    def id(self) -> str:
        return f"{self.number:04}"

    @property
    def done(self) -> int:
        """Epochs that have been reported."""
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def seconds(self) -> float:
        """Of training, evaluation and saving, of all epochs that were reported."""
        return sum(one.seconds for one in self.epochs)

    @property
    def over(self) -> bool:
        return self.state in OVER

    def at(self, epoch: int, metric: str) -> float | None:
        """Return the metric after `epoch`; None where it was not reported."""
        if 0 < epoch <= len(self.epochs):
            return self.epochs[epoch - 1].metrics.get(metric)
        return None

    def last(self, metric: str) -> float | None:
        """Return the metric of the last epoch that has it."""
        return next((one.metrics[metric] for one in reversed(self.epochs) if metric in one.metrics), None)

    def best(self, metric: str, sign: int) -> float | None:
        """Return the best value of any epoch."""
        values = [one.metrics[metric] for one in self.epochs if metric in one.metrics]
        return max(values, key=lambda value: sign * value) if values else None


def by_point(trials: Sequence[Trial]) -> dict[int, list[Trial]]:
    """Trials of the same point, by its number."""
    groups: dict[int, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.point, []).append(trial)
    return dict(sorted(groups.items()))


def trial_folder(folder: str, number: int) -> str:
    """Return the address of a trial's folder in that of its search; Tune's own files of the trial lie there too."""
    return storage.join(folder, f"trial-{number:04}")


# --- the search as a whole --------------------------------------------------------------------------------------


def read_search(folder: str) -> dict[str, Any] | None:
    """Read the record of the search in `folder`; None before there is one.

    Raises:
        ValueError: it is damaged, or the folder holds something else than a search.
    """
    address = storage.join(folder, RECORD)
    try:
        values: dict[str, Any] = storage.read_record(dict[str, Any], address, way_out=WAY_OUT)
    except FileNotFoundError:
        if others := [name for name in storage.names(folder) if name not in storage.LEASE_FILES]:
            raise ValueError(f"{folder} holds {others[0]!r} and no {RECORD}: {WAY_OUT}") from None
        return None
    if "definition" not in values:
        raise ValueError(f"{address} has no 'definition': {WAY_OUT}")
    return values


def write_search(folder: str, values: Mapping[str, Any]) -> None:
    """Write the record of the search in `folder`."""
    storage.write_record(storage.join(folder, RECORD), values)
