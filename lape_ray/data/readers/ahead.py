"""Start batches ahead of the one that is delivered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
BATCHES_AHEAD = 2


def read_ahead(started: Iterator[Callable[[], T]], count: int = BATCHES_AHEAD) -> Generator[T, None, None]:
    """Yield the results of `started` in order, while `count` later ones are under way.

    Taking an item from `started` begins its work; calling the item waits for the result, or raises its error.
    """
    pending: deque[Callable[[], T]] = deque()
    for result in started:
        pending.append(result)
        if len(pending) > count:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()
