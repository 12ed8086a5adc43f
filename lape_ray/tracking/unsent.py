"""The values that a service has not taken yet, as a file in the run's folder: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from lape_ray import storage
from lape_ray.values.typed import Count, from_json

log = logging.getLogger(__name__)
LONGEST_NAME = 250  # of MLflow; it refuses a whole batch for one name that is longer or has other characters
_PART = "[A-Za-z0-9_][A-Za-z0-9_.: -]*"
_NAME = re.compile(f"(?=.{{1,{LONGEST_NAME}}}$){_PART}(/{_PART})*")
Name = Annotated[str, _NAME.fullmatch, "of letters, digits and '_', with '/' between its parts"]


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of a metric; `time_ms` is in milliseconds since 1970."""

    name: Name
    value: float
    time_ms: Count
    step: Count


def address_of(service: str, folder: str) -> str:
    """Return the address of the file in the run's `folder` that holds what `service` has not taken."""
    return storage.join(folder, f"{service}_unsent.jsonl")


def read(address: str) -> list[Value] | None:
    """Read the file; None: there is none. A damaged line is left out, and a warning says which.

    Raises:
        OSError: the storage is away.
    """
    try:
        lines = storage.read_text(address).split("\n")
    except FileNotFoundError:
        return None
    values, reasons = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                values.append(from_json(Value, line, f"line {number}", "it is left out"))
        except ValueError as error:
            reasons.append(str(error))
    if reasons:
        log.warning("%s is damaged, and metrics are lost in %d lines: %s", address, len(reasons), reasons[0])
    return values


def write(address: str, values: Sequence[Value]) -> None:
    """Write the file whole."""
    storage.write_text(address, "".join(f"{json.dumps(dataclasses.asdict(value))}\n" for value in values))
