"""Values that came from JSON as the types that their reader needs. Standard library only.

What is read was written by another process, perhaps of another version, perhaps by somebody who means no good. Here a
value of the wrong kind becomes one ValueError that says where it is, before any code relies on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

K = TypeVar("K")
Count = Annotated[int, lambda value: value >= 0, "not below 0"]
Sha256 = Annotated[str, re.compile("[0-9a-f]{64}").fullmatch, "of 64 hexadecimal digits"]
LARGEST = 2**63 - 1  # what numpy, torch and the servers take
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def from_json(kind: Any, text: str | bytes, file: str | Path, fix: str) -> Any:
    """Return the JSON `text` as the annotated type `kind` (see `typed`).

    Raises:
        ValueError: it is empty, no JSON, or of another kind; begins with `file`, says where, and ends with `fix`.
    """
    if not text.strip():
        raise ValueError(f"{file} is empty; {fix}")
    try:
        return typed(kind, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}; {fix}") from None


def typed(kind: Any, value: Any, place: str = "", *, defaults: bool = False) -> Any:
    """Return `value`, which JSON gave, as the annotated type `kind`: lists become tuples, objects dataclasses.

    Numbers stay as they are: 3 is a float, too, and so is NaN.

    Args:
        place: what to call the value in an error, such as `config.model`; empty: it is the whole.
        defaults: whether fields of dataclasses that are absent get their defaults; else they are an error.

    Raises:
        ValueError: the value or a part of it is of another kind; says which part, and which kind is needed.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        base, holds, words = args
        _require(holds(typed(base, value, place)), value, place, f"{WORDS[base]} {words}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(args, value, place, defaults)
    if origin is Literal:
        _require(value in args, value, place, f"one of {', '.join(args)}")
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, place, defaults)
    if origin is tuple or hasattr(kind, "_fields"):
        return _tuple(kind, value, place, defaults)
    if origin in (dict, Mapping):
        _require(isinstance(value, dict), value, place, "an object in braces")
        return {
            typed(str, name, f"a name in {place or 'it'}"): typed(
                args[1], item, f"{place or 'it'}[{reprlib.repr(name)}]", defaults=defaults
            )
            for name, item in value.items()
        }
    return _plain(kind, value, place)


def _require(ok: bool, value: Any, place: str, words: str) -> None:
    if not ok:
        raise ValueError(f"{place or 'it'} is {reprlib.repr(value)}, not {words}")


def _plain(kind: type, value: Any, place: str) -> Any:
    right = isinstance(value, (int, float) if kind is float else kind)
    _require(right and (kind is bool or not isinstance(value, bool)), value, place, WORDS[kind])
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{place or 'it'} is a number of more than 64 bits")
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, place: str, defaults: bool) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    for kind in others[:-1]:
        with contextlib.suppress(ValueError):
            return typed(kind, value, place, defaults=defaults)
    return typed(others[-1], value, place, defaults=defaults)


def _tuple(kind: Any, value: Any, place: str, defaults: bool) -> Any:
    """Convert to a NamedTuple, a `tuple[X, ...]` or a `tuple[X, Y]`."""
    _require(isinstance(value, list | tuple), value, place, "a list")
    named = hasattr(kind, "_fields")
    kinds = tuple(typing.get_type_hints(kind).values()) if named else typing.get_args(kind)
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(value)
    _require(len(value) == len(kinds), value, place, f"a list of {len(kinds)}")
    items = [
        typed(one, item, f"{place or 'it'}[{index}]", defaults=defaults)
        for index, (one, item) in enumerate(zip(kinds, value, strict=True))
    ]
    return kind(*items) if named else tuple(items)


def _dataclass(kind: type[K], value: Any, place: str, defaults: bool) -> K:
    if isinstance(value, kind):  # a part that its reader made already
        return value
    _require(isinstance(value, dict), value, place, "an object in braces")
    name, hints = place or kind.__name__, typing.get_type_hints(kind, include_extras=True)
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"{name} has no field {reprlib.repr(unknown)}; it has {', '.join(hints)}")
    if absent := [] if defaults else [one for one in hints if one not in value]:
        raise ValueError(f"{name} lacks {', '.join(absent)}")
    dot = f"{place}." if place else ""
    arguments = {
        one: typed(hints[one], item, f"{dot}{one}", defaults=defaults) for one, item in value.items()
    }
    try:
        return kind(**arguments)
    except ValueError as error:  # out of its range
        raise ValueError(f"{place}: {error}" if place else str(error)) from None
