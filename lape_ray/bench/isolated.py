"""Functions in processes of their own: contenders in interleaved rounds, and whatever needs a fresh process.

In one process the peers would get in each other's way: FFCV sets the threads of numba and torch for all, DataLoader
forks, and memory and CPU time could not be told apart.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from lape_ray.bench.record import spread

T = TypeVar("T")
Work = Callable[[int], int]  # runs one round of that number and returns its images
Works = Mapping[str, Work]
START_TIMEOUT_S = 600  # for a process to import, compile and warm up on a busy machine


class CannotRunError(RuntimeError):
    """What is to be timed is installed but cannot do its job on this machine; says why."""


@dataclass(frozen=True)
class Sample:
    """One round of one contender; CPU time is user and system time of all its threads and processes."""

    images: int
    cpu_s: float
    wall_s: float


def rounds_of(
    groups: Mapping[str, tuple[Callable[[Any], Works], Any]],
    rounds: int,
    note: Callable[[str], None],
) -> dict[str, list[Sample] | str]:
    """Interleaved rounds of what several processes can do, after a round of each that is not counted.

    Args:
        groups: by name, a function and its argument. Called in a process of its own, it returns what is timed
            there, by names that no other group has; what needs long to be made, the first call may make.
        note: is told what happens.

    Returns:
        By name the samples, or why there are none: `not installed: ...` or `cannot run: ...`.

    Raises:
        RuntimeError: something failed; with its traceback.
    """
    found: dict[str, list[Sample] | str] = {}
    with contextlib.ExitStack() as stack:
        started = {
            group: stack.enter_context(_process(_serve, make, argument))
            for group, (make, argument) in groups.items()
        }
        running: dict[str, tuple[str, Connection]] = {}
        for group, connection in started.items():
            note(f"{group}: warming up")
            for name, reason in _answer(connection, group).items():
                if reason is None:
                    running[name] = (group, connection)
                found[name] = reason or []
        for number in range(1, rounds + 1):
            note(f"round {number} of {rounds}")
            for name, (group, connection) in running.items():
                connection.send((name, number))
                samples = found[name]
                assert isinstance(samples, list)
                samples.append(_answer(connection, group))
    return found


def call(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a fresh process; what it raises is a RuntimeError here, with its traceback."""
    with _process(_call, function, arguments) as connection:
        result: T = _answer(connection, function.__name__)
        return result


@contextlib.contextmanager
def _process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process that ends with the context."""
    # Spawned: a fork would take over this process's memory and threads.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments))
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()  # which ends the process's loop
        process.join(timeout=20)
        if process.is_alive():
            process.kill()
            process.join()


class _TracebackError(Exception):
    """Carries a traceback's text out of a process."""


def _answer(connection: Connection, name: str) -> Any:
    if not connection.poll(START_TIMEOUT_S):
        raise RuntimeError(f"{name} has not answered for {START_TIMEOUT_S} s")
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} died; is the machine out of memory?") from None
    if isinstance(answer, _TracebackError):
        raise RuntimeError(f"{name} failed:\n{answer}")
    return answer


def _call(connection: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    with _reporting(connection):
        connection.send(function(*arguments))


def _serve(connection: Connection, make: Callable[[Any], Works], argument: Any) -> None:
    with _reporting(connection):
        works = make(argument)
        connection.send({name: _reason_not_to(work) for name, work in works.items()})
        while True:
            try:
                name, number = connection.recv()
            except EOFError:  # the parent is done
                return
            cpu_s, wall_s = cpu_seconds(), time.perf_counter()
            images = works[name](number)
            wall_s = time.perf_counter() - wall_s
            connection.send(Sample(images, cpu_seconds() - cpu_s, wall_s))


def _reason_not_to(work: Work) -> str | None:
    """Run `work` once; why it cannot be run, or None."""
    try:
        work(0)
    except ImportError as error:
        return f"not installed: {error}"
    except CannotRunError as error:
        return f"cannot run: {error}"
    return None


@contextlib.contextmanager
def _reporting(connection: Connection) -> Iterator[None]:
    try:
        yield
    except Exception:
        import traceback

        connection.send(_TracebackError(traceback.format_exc()))


def cpu_seconds() -> float:
    """User and system time of this process, all its threads, and its children that are alive (to 10 ms each)."""
    import psutil

    spent = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            spent += times.user + times.system
    return spent


def measured(samples: Sequence[Sample]) -> dict[str, Any]:
    """`cpu_ms` of an image and `images_per_second` by the clock, as spreads."""
    return {
        "cpu_ms": spread([1e3 * sample.cpu_s / sample.images for sample in samples]),
        "images_per_second": spread([sample.images / sample.wall_s for sample in samples]),
    }
