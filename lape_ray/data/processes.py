"""One way to map a function over tasks, whether processes of this machine or of a cluster do the work."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

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


class _Pool(ProcessPoolExecutor):
    """Processes that begin also where the program came through a pipe, as `python - <<END` has it."""

    def submit(self, *work: Any, **options: Any) -> Future[Any]:
        # A spawned process runs its parent's main file again, which it would look for at "<stdin>".
        main = vars(sys.modules["__main__"])
        file = main.pop("__file__") if main.get("__file__") == "<stdin>" else None
        try:
            return super().submit(*work, **options)
        finally:
            if file is not None:
                main["__file__"] = file


@contextlib.contextmanager
def processes(workers: int | None = None) -> Iterator[Mapper]:
    """Start processes of this machine; None: one for each CPU; 1: none, the caller works itself."""
    workers = workers or usable_cpus()
    if workers == 1:
        yield lambda function, tasks: map(function, tasks)
        return
    # Spawned, not forked: the parent may hold threads (arrow, torch) whose locks a fork would copy.
    pool = _Pool(workers, mp_context=multiprocessing.get_context("spawn"))

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
                "a process died: killed because memory ran out, most likely (use fewer workers), or begun by a script "
                "that lacks `if __name__ == '__main__':` (see above)"
            ) from error
        finally:
            for future in pending:
                future.cancel()

    try:
        yield ordered
    finally:
        pool.shutdown(cancel_futures=True)
