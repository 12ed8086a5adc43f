"""What tests of the benchmark run in processes of their own; apart, so that those start without torch."""

from __future__ import annotations

from typing import Any

from lape_ray.bench import isolated


def hidden(_: Any) -> isolated.Works:
    """One contender that works, one that is missing and one that cannot run."""

    def missing(number: int) -> int:
        raise ImportError("No module named 'peer'")

    def cannot(number: int) -> int:
        raise isolated.CannotRunError("its buffers take 99 GB")

    return {"works": lambda number: 10 + number, "missing": missing, "cannot": cannot}


def broken(_: Any) -> isolated.Works:
    """One that fails."""

    def fail(number: int) -> int:
        raise ZeroDivisionError("by design")

    return {"broken": fail}
