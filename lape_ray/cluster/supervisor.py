"""The actor of a run that carries the request to stop it, and counts the failures of its workers.

Nothing here imports Ray Train: an actor that starts while all other processes do should take little of their CPUs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lape_ray.cluster.signals import signals_ask

T = TypeVar("T")
MEMORY = "OutOfMemoryError"  # torch's; it would come again at the same place
LOOK_S, DRAIN_POLL_S = 0.2, 5.0  # between two looks at the request to stop, and at nodes that leave


class Supervisor:
    """An actor, one for each run, on the driver's node; it ends with the driver.

    Args:
        max_failures: failures of workers between two checkpoints that the run survives.
    """

    def __init__(self, max_failures: int) -> None:
        self._stop = asyncio.Event()
        self._max_failures = max_failures
        self._checkpoint: str | None = None
        self._failures: list[str] = []
        self._hopeless = ""
        self._moments: dict[str, float] = {}

    async def stop(self) -> None:
        """Ask the workers to end after a checkpoint."""
        self._stop.set()

    async def until_stop(self) -> None:
        """Wait until the workers are asked to end."""
        await self._stop.wait()

    async def failed(self, reason: str) -> None:
        """Note that workers failed."""
        self._count(reason)

    def _count(self, reason: str) -> None:
        self._failures.append(reason)
        self._moments.setdefault("failed", time.time())
        if MEMORY in reason:
            self._hopeless = (
                f"a step does not fit into the device's memory: raise --optim.accumulate or --run.num_workers, which "
                f"share a step's images out and change nothing that is learned, and submit again ({reason})"
            )

    async def torn_down(self) -> None:
        """Note that the processes of a group of workers are gone."""
        self._moments["torn_down"] = time.time()

    async def moments(self) -> dict[str, float]:
        """Return `now`, and what was noted since the last call, in seconds since 1970."""
        noted, self._moments = self._moments, {}
        return {"now": time.time(), **noted}

    async def started(self, checkpoint: str | None) -> str:
        """Note that workers start from `checkpoint`; returns why they should not, or nothing."""
        if self._hopeless:
            return self._hopeless
        if checkpoint != self._checkpoint:
            self._checkpoint, self._failures = checkpoint, []
        if len(self._failures) <= self._max_failures:
            return ""
        return (
            f"workers failed {len(self._failures)} times without a new checkpoint (run.max_failures="
            f"{self._max_failures}), the last time with: {self._failures[-1]}"
        )


@contextlib.contextmanager
def supervised(cls: type[Supervisor], folder: str, *arguments: Any) -> Iterator[Any]:
    """Start the supervisor of the run in `folder`, by whose name other processes find it; a second one is refused.

    A driver of this cluster that was killed may have left one, which is waited for.
    """
    from lape_ray.cluster.connection import (
        only_actor,  # not in the actor's own process, which is soon ready without
    )

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    supervisor = only_actor(cls, folder, *arguments, max_concurrency=10_000, scheduling_strategy=here)
    try:
        yield supervisor
    finally:
        ray.kill(supervisor)


class StopRequest:
    """A worker's view of the request to stop, up to LOOK_S old; asking costs no waiting."""

    def __init__(self, supervisor: Any) -> None:
        self._supervisor, self._stop = supervisor, supervisor.until_stop.remote()
        self._asked, self._looked = False, 0.0

    def __bool__(self) -> bool:
        """Tell whether the run is to end, as it also is where the supervisor is dead: after a checkpoint."""
        if not self._asked and time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            ready, _ = ray.wait([self._stop], timeout=0)
            if ready:
                try:
                    ray.get(self._stop)
                    self._asked = True
                except ray.exceptions.ActorUnavailableError:  # the network was away
                    self._stop = self._supervisor.until_stop.remote()
                except ray.exceptions.RayActorError:
                    self._asked = True
        return self._asked


class LeavingNode:
    """Ask Ray whether the node of this process is about to leave; it costs a look each DRAIN_POLL_S."""

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._looked = 0.0

    def poll(self) -> bool:
        """Return true once, where Ray is about to take this node away."""
        if time.monotonic() - self._looked < DRAIN_POLL_S:
            return False
        leaving = self._node in draining_nodes()
        self._looked = math.inf if leaving else time.monotonic()
        return leaving


def draining_nodes() -> dict[str, int]:
    """Return the ids of nodes that are about to leave the cluster, by a private name of Ray's (as Ray Train does)."""
    return ray._private.state.state.get_draining_nodes() or {}


def until_stopped(fit: Callable[[], T], supervisor: Any) -> T:
    """Return what `fit` returns; meanwhile SIGTERM, Ctrl-C or SIGHUP asks the workers for a checkpoint and the end.

    A second signal, SIGHUP apart, ends the process at once. `fit` runs in a thread: in the main thread Ray Train would
    put its own handler of SIGINT in place, which aborts without a checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        return fit()
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(fit())
        except BaseException as error:
            done.set_exception(error)

    with signals_ask(supervisor.stop.remote):
        threading.Thread(target=work, name="fit", daemon=True).start()
        return done.result()
