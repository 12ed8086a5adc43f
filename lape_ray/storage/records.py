"""Small records: JSON files that are whole whatever ends their writer, and readers that say which file is damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lape_ray.storage.files import read_text, write_text


def write_record(address: str, values: Mapping[str, Any]) -> None:
    """Write a record; its file holds the old values or the new ones, never a part."""
    write_text(address, json.dumps(dict(values), indent=1))


def read_record(address: str, *, way_out: str) -> dict[str, Any]:
    """Read a record.

    Args:
        way_out: what a person can do about a damaged one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; names the file and `way_out`.
    """
    return parse_record(read_text(address), address, way_out=way_out)


def parse_record(text: str, address: str, *, way_out: str) -> dict[str, Any]:
    """Read a record from its text; a ValueError names the file and `way_out` where it is damaged."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "is empty" if not text.strip() else f"is damaged ({error})"
        raise ValueError(f"{address} {reason}; {way_out}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{address} is damaged (it holds a {type(values).__name__}, not an object); {way_out}"
        )
    return values
