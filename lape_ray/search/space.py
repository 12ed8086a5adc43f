"""Define what a search goes over: axes over fields of a config, as the command line has them, and cells crossed."""

from __future__ import annotations

import itertools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lape_ray.config import (
    SECTIONS,
    TrainConfig,
    did_you_mean,
    flatten,
    parse_value,
    replace_fields,
    what_is_learned,
    write_value,
)

KINDS = "choice(a,b,...), uniform(low,high), loguniform(low,high), randint(low,high)"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """Return the value at `share`, from 0 up to but not including 1, of the way through."""
        return self.values[int(share * len(self.values))]

    def place(self, value: Any) -> float:
        """Return how far through `value` is, from 0 to 1."""
        return self.values.index(value) / max(1, len(self.values) - 1)

    def moved(self, value: Any, share: float) -> Any:
        """Return a neighbour of `value`: the one before for a `share` below one half, else the one after; ends stay."""
        index = self.values.index(value) + (1 if share >= 0.5 else -1)
        return self.values[min(max(index, 0), len(self.values) - 1)]

    def __str__(self) -> str:
        return f"choice({','.join(write_value(value) for value in self.values)})"


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; of equal ratios where `log`; whole where `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, share: float) -> float:
        """Return the value at `share` of the way through."""
        low, high = self.low, self.high
        if self.whole:
            return min(int(low) + int(share * (high - low + 1)), int(high))
        value = low * (high / low) ** share if self.log else low + share * (high - low)
        return float(f"{value:.4g}")  # short enough for a person to type again

    def place(self, value: float) -> float:
        """Return how far through `value` is, from 0 to 1: the share at which it is, or a value that rounds to it."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return min(max((scale(value) - low) / ((high - low) or 1.0), 0.0), 1.0)

    def moved(self, value: float, share: float) -> float:
        """Make `value` smaller by a fifth for a `share` below one half, else larger by a fifth; kept in the range."""
        moved = value * (1.2 if share >= 0.5 else 0.8)
        moved = min(max(moved, self.low), self.high)
        return round(moved) if self.whole else float(f"{moved:.4g}")

    def __str__(self) -> str:
        kind = "randint" if self.whole else "loguniform" if self.log else "uniform"
        return f"{kind}({self.low:g},{self.high:g})"


Axis = Choice | Range
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """The points of a search: every cell, crossed with every value of every axis."""

    cells: tuple[Cell, ...] = ({},)
    axes: Mapping[str, Axis] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return all(isinstance(axis, Choice) for axis in self.axes.values())

    def points(self) -> list[dict[str, Any]]:
        """List every combination, cells first; of a finite space only."""
        values = [axis.values for axis in self.axes.values() if isinstance(axis, Choice)]
        crossed = [dict(zip(self.axes, one, strict=True)) for one in itertools.product(*values)]
        return [{**cell, **settings} for cell in self.cells for settings in crossed]

    def examples(self) -> list[dict[str, Any]]:
        """List every combination of cells and choices, with ranges at their middle."""
        axes = {
            name: axis if isinstance(axis, Choice) else Choice((axis.at(0.5),))
            for name, axis in self.axes.items()
        }
        return Space(self.cells, axes).points()


_LENGTH = ("optim.epochs", "optim.cooldown_epochs")
_FIXED = ("training.", "model.plugin", *_LENGTH)


def parse_axes(texts: Sequence[str], base: TrainConfig) -> dict[str, Axis]:
    """Parse `FIELD=KIND(...)` for each axis, checked against the field's type and bounds.

    Raises:
        ValueError: an unknown field or kind, a value that the field does not take, or a field given twice.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        field, _, rest = text.partition("=")
        _check_field(field, base)
        if field in axes:
            raise ValueError(f"--space {field} is given twice; put all its values into one")
        try:
            axis = axes[field] = _parse_axis(field, rest.strip())
            for value in axis.values if isinstance(axis, Choice) else (axis.at(0), axis.at(1)):
                replace_fields(base, {field: value})
        except ValueError as error:
            raise ValueError(f"--space {text}: {error}") from None
    return axes


def _check_field(field: str, base: TrainConfig) -> None:
    """Refuse what is not among the fields that change what is learned, or is the seed or the length of a trial."""
    known = [name for name in what_is_learned(base) if not name.startswith(_FIXED)]
    if field in known:
        return
    if field == "training.seed":
        raise ValueError("training.seed is no axis: --seeds N repeats every cell with N seeds")
    if field == "model.plugin":
        raise ValueError(
            "model.plugin is no axis: put all embeddings into one file, and search over their names"
        )
    if field in _LENGTH:
        raise ValueError(f"{field} is the length of every trial, which schedules decide by; give --{field}")
    if field in flatten(base):
        raise ValueError(
            f"{field} does not change what is learned, so there is nothing to search; give --{field}"
        )
    raise ValueError(f"--space {field}: no such field{did_you_mean(field, known)}")


def _parse_axis(field: str, text: str) -> Axis:
    found = re.fullmatch(r"([a-z]+)\((.*)\)", text)
    if not found:
        raise ValueError(f"it is not understood; write {field}= and one of {KINDS}")
    name, inside = found.groups()
    section, _, option = field.partition(".")
    kind = typing.get_type_hints(SECTIONS[section])[option]
    # At commas in no brackets.
    parts = [part.strip() for part in re.split(r",(?![^()]*\))", inside) if part.strip()]
    if name == "choice":
        values = tuple(parse_value(kind, part) for part in parts)
        if not values:
            raise ValueError("it has no values; put some between the brackets")
        if len(set(values)) < len(values):
            raise ValueError("it holds a value twice; leave one of them out")
        return Choice(values)
    if name not in ("uniform", "loguniform", "randint"):
        raise ValueError(f"{name}(...) is no kind of axis; there are {KINDS}")
    number = next((one for one in (int, float) if one in (kind, *typing.get_args(kind))), None)
    if number is None or (name == "randint") != (number is int):
        fits = {int: "randint(low,high)", float: "uniform or loguniform", None: "choice(a,b,...)"}[number]
        raise ValueError(f"it does not fit the field's type; use {fits}")
    if len(parts) != 2:
        raise ValueError("it must hold two numbers, the lowest and the highest")
    low, high = (float(parse_value(number, part)) for part in parts)
    if not low < high:
        raise ValueError(f"it is empty: {low:g} is not below {high:g}; exchange them")
    if name == "loguniform" and low <= 0:
        raise ValueError("it must begin above 0; use uniform to include 0")
    return Range(low, high, log=name == "loguniform", whole=name == "randint")


def differing(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the fields whose values are not the same in all cells, in their order."""
    fields = list(dict.fromkeys(field for cell in cells for field in cell))
    return [field for field in fields if len({str(cell.get(field)) for cell in cells}) > 1]
