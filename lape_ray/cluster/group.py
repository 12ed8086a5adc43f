"""The workers of a run as one of them sees the others, and as the loop's reporter needs them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from threading import Event
from typing import Protocol, TypeVar

T = TypeVar("T")


class Group(Protocol):
    """The workers of a run, of which this process is one. All call the same methods in the same order."""

    rank: int
    size: int
    address: str
    """This node's IP, at which the other nodes of the run reach it."""

    def may_start(self, newest: str | None) -> str:
        """Tell, on rank 0, from which checkpoint the workers start; returns why they should not, or nothing."""

    def moments(self) -> Mapping[str, float]:
        """Return moments in seconds since 1970 by the driver's clock, on rank 0: `now`, and those that are known.

        They are when this process was `created`, and when the failure of the workers before was noticed (`failed`) and
        they were gone (`torn_down`).
        """

    def broadcast(self, value: T) -> T:
        """Return rank 0's value, which consists of JSON's types; of a tuple the others get a list."""

    def barrier(self) -> None:
        """Wait for all workers, as long as it takes."""

    def show(self, metrics: Mapping[str, float]) -> None:
        """Set this worker's gauges."""

    def stop_asked(self) -> bool:
        """Tell, on rank 0 and without waiting, whether the run is to end."""

    def node_leaving(self) -> bool:
        """Return true once, where the machine of this worker is about to go."""


class Alone:
    """A group of one: the process that the command runs in.

    Args:
        stop: is set to end the run after a checkpoint.
    """

    rank, size, address = 0, 1, "127.0.0.1"

    def __init__(self, stop: Event) -> None:
        self._stop = stop

    def may_start(self, newest: str | None) -> str:
        return ""

    def moments(self) -> Mapping[str, float]:
        return {"now": time.time()}

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        pass

    def show(self, metrics: Mapping[str, float]) -> None:
        pass

    def stop_asked(self) -> bool:
        return self._stop.is_set()

    def node_leaving(self) -> bool:
        return False
