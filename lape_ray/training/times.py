"""The time of a training process, divided: every moment belongs to one part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

LOADING = "loading"  # building the network and the loaders, and reading a checkpoint
STAGING = "staging"
FIRST_STEP = "first_step"
STEPS = "steps"
DATA = "data"
CHECKPOINT = "checkpoint"
EVALUATION = "evaluation"
IDLE = "idle"  # after the training: what is left for the tracker
PROCESS_PARTS = (LOADING, STAGING, FIRST_STEP, STEPS, DATA, CHECKPOINT, EVALUATION, IDLE)


class Times:
    """The seconds of each part so far; `report.goodput` defines the parts.

    They add up to the time since the beginning, as each change of part ends one and begins the next.

    Args:
        clock: seconds of a clock that no one sets.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since = clock, clock()
        self.part = LOADING
        self._seconds = dict.fromkeys(PROCESS_PARTS, 0.0)

    def enter(self, part: str) -> None:
        """Begin a part, which lasts until another begins."""
        now = self._clock()
        self._seconds[self.part] += now - self._since
        self.part, self._since = part, now

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Begin a part, and go on with the one before at the end of the block."""
        before = self.part
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, seconds: float, part: str) -> None:
        """Count the last `seconds` of the present part to another one."""
        self._seconds[self.part] -= seconds
        self._seconds[part] += seconds

    def read(self) -> dict[str, float]:
        """Return the seconds of each part up to now."""
        self.enter(self.part)
        return dict(self._seconds)
