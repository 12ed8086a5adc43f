"""Small records: JSON files that no interrupted writer leaves in part, and readers that name a damaged one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lape_ray.storage.files import read_text, write_text
from lape_ray.values.typed import from_json


def write_record(address: str, values: Mapping[str, Any]) -> None:
    """Write a record; its file holds the old values or the new ones, never a part."""
    write_text(address, json.dumps(dict(values), indent=1))


def read_record(kind: Any, address: str, *, way_out: str) -> Any:
    """Read a record as the annotated type `kind` (see `typed`).

    Args:
        way_out: what a person can do about a damaged one.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is damaged; names the file, the place in it and `way_out`.
    """
    return from_json(kind, read_text(address), address, way_out)
