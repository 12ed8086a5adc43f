"""Failures of a tracking service: one line each, and never the end of a training."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from lape_ray.values.redaction import redacted

log = logging.getLogger(__name__)


def reason(error: Exception) -> str:
    """Return the first line of what the client or its transport says, else the kind of error."""
    remark = "(raised as a result of"  # SQLAlchemy on itself; what the database says stands below
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(remark)]
    return redacted(lines[0]) if lines else type(error).__name__


@contextlib.contextmanager
def never_raise(doing: str) -> Iterator[None]:
    """Make any error of the block a warning of one line: `doing` failed, and why."""
    try:
        yield
    except Exception as error:  # whatever a service can do, the training goes on
        log.warning("%s failed: %s", doing, reason(error))
