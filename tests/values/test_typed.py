"""JSON's values as the types that their reader needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lape_ray.config import Span
from lape_ray.values.typed import Count, Sha256, from_json, typed


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    size: Count = 0


@dataclass(frozen=True, kw_only=True)
class Whole:
    parts: tuple[Part, ...]
    span: int | Span
    kind: Literal["a", "b"] = "a"
    best: Part | None = None


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, -3, -3),
        (float, 3, 3),
        (bool, True, True),
        (str | None, None, None),
        (Any, {"x": [1]}, {"x": [1]}),
        (tuple[int, float], [1, 2.5], (1, 2.5)),
        (tuple[str, ...], [], ()),
        (Mapping[str, tuple[int, ...]], {"x": [1]}, {"x": (1,)}),
        (int | Span, [2, 8], Span(2, 8)),
        (int | Span, 4, 4),
        (
            Whole,
            {"parts": [{"name": "x", "size": 3}], "span": 1, "kind": "b", "best": None},
            Whole(parts=(Part(name="x", size=3),), span=1, kind="b"),
        ),
        (Part, Part(name="x"), Part(name="x")),
    ],
    ids=str,
)
def test_values_of_the_right_type(kind: Any, value: object, expected: object) -> None:
    made = typed(kind, value)
    assert made == expected
    assert type(made) is type(expected)


def test_a_number_stays_as_it_is() -> None:
    """A float that was written as a whole number has the same text and hash again."""
    assert type(typed(float, 15)) is int
    assert typed(float, float("nan")) != typed(float, float("nan"))


def test_defaults_are_for_those_who_ask() -> None:
    values = {"parts": [{"name": "x"}], "span": 1}
    assert typed(Whole, values, defaults=True) == Whole(parts=(Part(name="x"),), span=1)
    with pytest.raises(ValueError, match=r"^Whole lacks kind, best$"):
        typed(Whole, values)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "it is True, not a whole number"),
        (int, 1.0, "it is 1.0, not a whole number"),
        (bool, 1, "it is 1, not true or false"),
        (float, "1", "it is '1', not a number"),
        (int, 2**63, "it is a number of more than 64 bits"),
        (float, -(10**400), "it is a number of more than 64 bits"),
        (Count, -1, "it is -1, not a whole number not below 0"),
        (Sha256, "f" * 63 + "\ud800", "fff\\ud800', not a text of 64 hexadecimal digits"),
        (str, None, "it is None, not a text"),
        (str | None, 3, "it is 3, not a text"),
        (int | Span, [1, "2"], "it[1] is '2', not a whole number"),
        (int | Span, [1], "it is [1], not a list of 2"),
        (tuple[int, int], {"0": 1}, "it is {'0': 1}, not a list"),
        (dict[str, int], [["x", 1]], "it is [['x', 1]], not an object in braces"),
        (dict[str, dict[str, int]], {"x": {"y": "z"}}, "it['x']['y'] is 'z', not a whole number"),
        (Part, {"name": "x", "size": 1, "more": 1}, "Part has no field ['more']; it has name, size"),
        (
            Whole,
            {"parts": [{"name": 1, "size": 1}], "span": 1, "kind": "a", "best": None},
            "parts[0].name is 1",
        ),
        (Whole, {"parts": [], "span": 1, "kind": "c", "best": None}, "kind is 'c', not one of a, b"),
        (Whole, {"parts": [], "span": 1, "kind": ["a"], "best": None}, "kind is ['a'], not one of a, b"),
        (Whole, {"parts": [], "span": 1, "kind": "a", "best": []}, "best is [], not an object in braces"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else type(value).__name__,
)
def test_values_of_another_type(kind: Any, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        typed(kind, value)


def test_what_is_wrong_is_said_in_few_words() -> None:
    with pytest.raises(ValueError, match="not a whole number") as raised:
        typed(int, ["x" * 10_000] * 10_000, "somewhere")
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.json is empty; write it again"),
        (b"\n", "x.json is empty; write it again"),
        ("{", "x.json is damaged: Expecting property name enclosed"),
        (b"\xff", "x.json is damaged: 'utf-8' codec can't decode byte 0xff"),
        ("[" * 100_000, "x.json is damaged: maximum recursion depth exceeded"),
        ("9" * 5000, "x.json is damaged: Exceeds the limit"),
        ("[1]", "x.json is damaged: it is [1], not an object in braces; write it again"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_texts_that_are_no_such_values(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json(dict[str, int], text, "x.json", "write it again")
    assert from_json(dict[str, int], b'{"x": 1}', "x.json", "write it again") == {"x": 1}
