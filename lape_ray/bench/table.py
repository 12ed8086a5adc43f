"""Aligned tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Cell = str | int | float | None
GAP = "  "
NUMBER = re.compile(r"[+-]?[\d,.]+( \([\d,.]+ to [\d,.]+\))?")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """`title`, a line of column names and the rows; text stands left, numbers and spreads right.

    A column stands right if its first cell that is not empty is a number or a `middle`.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {title!r} has {len(row)} cells for {len(columns)} columns: {row}")
    texts = [[_text(cell) for cell in row] for row in rows]
    right = [_is_numeric([row[c] for row in texts]) for c in range(len(columns))]
    widths = [max(map(len, (name, *(row[c] for row in texts)))) for c, name in enumerate(columns)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return GAP.join(padded).rstrip()

    ruler = GAP.join("-" * width for width in widths)
    return "\n".join([title, line(columns), ruler, *map(line, texts)])


def middle(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`median (low to high)` of a spread, empty for None."""
    if value is None:
        return ""
    median, low, high = (f"{value[name]:,.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:,.2f}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell


def _is_numeric(cells: Sequence[str]) -> bool:
    first = next((cell for cell in cells if cell), "")
    return NUMBER.fullmatch(first) is not None
