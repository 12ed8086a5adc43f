"""One way to map a function over tasks, whether processes of this machine or of a cluster do the work."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Mapper(Protocol):
    """A map like `map`: results in the order of the tasks, with a bounded number of them in memory.

    An exception of the function is raised here; OSError if a process died.
    """

    def __call__(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]: ...


def usable_cpus() -> int:
    """Count the CPUs that this process may use.

    They are those it is pinned to, and no more than its cgroup (container) pays for.
    """
    from joblib import cpu_count  # here, so that training steps can be run where torch alone is installed

    return int(cpu_count())


@contextlib.contextmanager
def processes(workers: int | None = None) -> Iterator[Mapper]:
    """Start processes of this machine; None: one for each CPU; 1: none, the caller works itself."""
    workers = workers or usable_cpus()
    if workers == 1:
        yield lambda function, tasks: map(function, tasks)
        return
    # Spawned, not forked: the parent may hold threads (arrow, torch) whose locks a fork would copy.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def ordered(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(function, task))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process died, most likely killed because memory ran out; use fewer workers"
            ) from error
        finally:
            for future in pending:
                future.cancel()

    try:
        yield ordered
    finally:
        pool.shutdown(cancel_futures=True)
