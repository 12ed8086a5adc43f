"""What a field of a config may be in a search: a choice or a range, from the command line. Standard library only."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lape_ray.config import SECTIONS, TrainConfig, flatten, parse_value, replace_fields, what_is_learned

KINDS = "choice(a,b,...), uniform(low,high), loguniform(low,high), randint(low,high)"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """Return the value at `share`, from 0 up to but not including 1, of the way through."""
        return self.values[int(share * len(self.values))]

    def moved(self, value: Any, share: float) -> Any:
        """Return a neighbour of `value`: the one before for a `share` below one half, else the one after; ends stay."""
        index = self.values.index(value) + (1 if share >= 0.5 else -1)
        return self.values[min(max(index, 0), len(self.values) - 1)]

    def __str__(self) -> str:
        return f"choice({','.join(as_text(value) for value in self.values)})"


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; of equal ratios where `log`; whole where `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, share: float) -> float:
        """Return the value at `share` of the way through."""
        if self.whole:
            return min(int(self.low) + int(share * (self.high - self.low + 1)), int(self.high))
        if self.log:
            value = self.low * math.exp(share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.4g}")  # short enough for a person to type again

    def moved(self, value: float, share: float) -> float:
        """`value` made smaller by a fifth for a `share` below one half, else larger by a fifth; kept in the range."""
        moved = value * (1.2 if share >= 0.5 else 0.8)
        moved = min(max(moved, self.low), self.high)
        return round(moved) if self.whole else float(f"{moved:.4g}")

    def __str__(self) -> str:
        kind = "randint" if self.whole else "loguniform" if self.log else "uniform"
        return f"{kind}({self.low:g},{self.high:g})"


Axis = Choice | Range


def as_text(value: Any) -> str:
    """Write a field's value as the command line takes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"({','.join(as_text(part) for part in value)})"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


_LENGTH = ("optim.epochs", "optim.cooldown_epochs")


def searchable(config: TrainConfig) -> list[str]:
    """List the fields that an axis may go over: those that change what is learned, but seed and length."""
    return [
        name for name in what_is_learned(config) if not name.startswith("training.") and name not in _LENGTH
    ]


def parse_axes(texts: Sequence[str], base: TrainConfig) -> dict[str, Axis]:
    """`FIELD=KIND(...)` for each axis, checked against the field's type and bounds.

    Raises:
        ValueError: an unknown field or kind, a value that the field does not take, or a field given twice.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        field, _, rest = text.partition("=")
        _check_field(field, base)
        if field in axes:
            raise ValueError(f"--space {field} is given twice; put all its values into one")
        axes[field] = _parse_axis(field, rest)
        check_axis(field, axes[field], base)
    return axes


def _check_field(field: str, base: TrainConfig) -> None:
    known = searchable(base)
    if field in known:
        return
    if field == "training.seed":
        raise ValueError("training.seed is no axis: --seeds N repeats every cell with N seeds")
    if field in _LENGTH:
        raise ValueError(f"{field} is the length of every trial, which schedules decide by; give --{field}")
    if field in flatten(base):
        raise ValueError(
            f"{field} does not change what is learned, so there is nothing to search; give --{field}"
        )
    near = difflib.get_close_matches(field, known, n=3, cutoff=0.5)
    raise ValueError(
        f"--space {field}: no such field" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def _parse_axis(field: str, text: str) -> Axis:
    found = re.fullmatch(r"\s*([a-z]+)\((.*)\)\s*", text)
    if not found:
        raise ValueError(f"--space {field}={text} is not understood; write {field}= and one of {KINDS}")
    name, inside = found[1], found[2]
    kind = field_type(field)
    parts = _split(inside)
    if name == "choice":
        if not parts:
            raise ValueError(f"--space {field}=choice() has no values; put some between the brackets")
        values = tuple(_value(field, kind, part) for part in parts)
        if len(set(values)) < len(values):
            raise ValueError(f"--space {field}: choice({inside}) holds a value twice; leave one of them out")
        return Choice(values)
    if name not in ("uniform", "loguniform", "randint"):
        raise ValueError(f"--space {field}={name}(...) is no kind of axis; there are {KINDS}")
    number = _number_type(kind)
    if number is None or (name == "randint") != (number is int):
        fits = (
            "randint(low,high)" if number is int else "uniform or loguniform" if number else "choice(a,b,...)"
        )
        raise ValueError(f"--space {field}={name}(...) does not fit the field's type; use {fits}")
    if len(parts) != 2:
        raise ValueError(f"--space {field}={text} must hold two numbers, the lowest and the highest")
    low, high = (float(_value(field, number, part)) for part in parts)
    if not low < high:
        raise ValueError(f"--space {field}={text} is empty: {low:g} is not below {high:g}; exchange them")
    if name == "loguniform" and low <= 0:
        raise ValueError(f"--space {field}={text} must begin above 0; use uniform to include 0")
    return Range(low, high, log=name == "loguniform", whole=name == "randint")


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", text) if part.strip()]


def _value(field: str, kind: Any, text: str) -> Any:
    try:
        return parse_value(kind, text)
    except ValueError as error:
        raise ValueError(f"--space {field}: {error}") from None


def field_type(field: str) -> Any:
    """Return the annotated type of `section.field`."""
    section, _, name = field.partition(".")
    return typing.get_type_hints(SECTIONS[section])[name]


def _number_type(kind: Any) -> type | None:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return kind if kind in (int, float) else None


def check_axis(field: str, axis: Axis, base: TrainConfig) -> None:
    """Every choice, and both ends of a range, must be a valid value of the field."""
    ends = axis.values if isinstance(axis, Choice) else (axis.at(0), axis.at(1))
    for value in ends:
        try:
            replace_fields(base, {field: value})
        except ValueError as error:
            raise ValueError(f"--space {field}={axis}: {error}") from None


def differing(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the fields whose values are not the same in all cells, in their order."""
    fields = list(dict.fromkeys(field for cell in cells for field in cell))
    return [field for field in fields if len({str(cell.get(field)) for cell in cells}) > 1]
