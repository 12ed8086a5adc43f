"""CSV whose cells a spreadsheet shows and never runs."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from typing import TextIO

# What OWASP lists for "CSV injection", full-width forms too; and the apostrophe itself, so that it can be taken off.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "'")
NUMBER = re.compile(r"[+-][0-9]*\.?[0-9]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def inert(cell: object) -> object:
    """Return `cell`, with an apostrophe in front of text that a spreadsheet would run as a formula.

    Numbers stay as they are, also as text. `text.removeprefix("'")` gives back what was written.
    """
    runs = isinstance(cell, str) and cell.startswith(FORMULA) and not NUMBER.fullmatch(cell)
    return f"'{cell}" if runs else cell


def write_rows(stream: TextIO, rows: Iterable[Iterable[object]]) -> None:
    """Write rows of cells in the form of RFC 4180, inert; `stream` is opened with newline=""."""
    csv.writer(stream).writerows(map(inert, row) for row in rows)
