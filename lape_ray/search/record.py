"""Record what is known of a search and of its trials. Knows no Ray and no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lape_ray import storage

State = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
RECORD = "search.json"
WAY_OUT = "choose another --run.name, or move the folder away"
Lineage = tuple[tuple[int, int], ...]
"""Of each time that a trial was cloned: after which epoch, and from which trial."""
_FACTS = ("number", "point", "seed", "label", "run_id")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Record what an epoch of a trial came to.

    Attributes:
        seconds: from the report before it, or from the trial's start
        steps_done: optimizer steps of the trial up to its end
    """

    epoch: int
    metrics: Mapping[str, float]
    seconds: float
    steps_done: int = 0


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

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Trial:
        """Read what the driver decided about a trial from the config that Ray Tune has of it."""
        facts = {name: config[name] for name in _FACTS}
        lineage = [Clone(**{**clone, "values": _tuples(clone["values"])}) for clone in config["lineage"]]
        return cls(**facts, first=_tuples(config["values"]), lineage=lineage)

    def config(self) -> dict[str, Any]:
        """Make the config that Ray Tune has of it; `done` are the epochs that the driver has heard of."""
        facts = {name: getattr(self, name) for name in _FACTS}
        lineage = [asdict(clone) for clone in self.lineage]
        return {**facts, "values": self.first, "lineage": lineage, "done": self.done}

    @property
    def values(self) -> dict[str, Any]:
        """Return `section.field` -> value, as they are now."""
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
        """Count the epochs that have been reported."""
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def seconds(self) -> float:
        """Sum up training, evaluation and saving of all epochs that were reported."""
        return sum(one.seconds for one in self.epochs)

    @property
    def over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    @property
    def reason(self) -> str:
        """Return the error in one line; "" where there is none."""
        return self.error.splitlines()[0] if self.error else ""

    def curve(self, metric: str) -> dict[int, float]:
        """Return epoch -> the metric after it, of the epochs that have it."""
        return {one.epoch: one.metrics[metric] for one in self.epochs if metric in one.metrics}

    def last(self, metric: str) -> float | None:
        """Return the metric of the last epoch that has it."""
        return next(reversed(self.curve(metric).values()), None)


def best_epoch(epochs: Sequence[Epoch], metric: str, sign: int) -> Epoch | None:
    """Return the best epoch, of equals the last; None where the metric is a number in none.

    Only those count whose images have the size of the last one's: others do not compare.
    """
    side = epochs[-1].metrics.get("train/image_size") if epochs else None
    known = [
        one
        for one in epochs
        if not math.isnan(one.metrics.get(metric, math.nan)) and one.metrics.get("train/image_size") == side
    ]
    return max(known, key=lambda one: (sign * one.metrics[metric], one.epoch), default=None)


def by_point(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Group the trials by their point, in the order of its number."""
    groups: dict[int, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.point):
        groups.setdefault(trial.point, []).append(trial)
    return list(groups.values())


def trial_folder(folder: str, number: int) -> str:
    """Return the address of a trial's folder in that of its search; Tune's own files of the trial lie there too."""
    return storage.join(folder, f"trial-{number:04}")


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make tuples of the lists that JSON has in their place."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


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
