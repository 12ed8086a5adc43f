"""The actor of a run that carries the request to stop it, and counts the failures of its workers."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
import ray.train
from ray.train import UserCallback

from lape_ray.cluster.signals import signals_ask

T = TypeVar("T")
MEMORY = "OutOfMemoryError"  # torch's; it would come again at the same place
LEAVE_GROUP_S = 5
"""The time that workers have to leave their process group after a failure; Ray Train's default is half a minute."""


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

    async def stop(self) -> None:
        """Ask the workers to end after a checkpoint."""
        self._stop.set()

    async def until_stop(self) -> None:
        """Wait until the workers are asked to end."""
        await self._stop.wait()

    async def failed(self, reason: str) -> None:
        """Note that workers failed."""
        self._failures.append(reason)
        if MEMORY in reason:
            self._hopeless = (
                f"a step does not fit into the device's memory: raise --optim.accumulate or --run.num_workers, which "
                f"share a step's images out and change nothing that is learned, and submit again ({reason})"
            )

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


class FailureCount(UserCallback):
    """Tell the supervisor of every failure that Ray Train's controller sees."""

    def __init__(self, supervisor: Any) -> None:
        self.supervisor = supervisor

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in the controller's process, whose warning of an option that Ray sets itself helps no user."""
        self.__dict__.update(state)
        warnings.filterwarnings("ignore", message=".*exclude_resources. is deprecated")

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        # A worker that hangs never leaves. Ray Train hands this variable on to no controller, but asks for it there.
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", str(LEAVE_GROUP_S))
        reasons = [
            (str(error).strip() or repr(error)).splitlines()[-1] for error in worker_exceptions.values()
        ]
        # Where one worker ran out of memory, the others say that it went away.
        self.supervisor.failed.remote(next((reason for reason in reasons if MEMORY in reason), reasons[0]))


class StopRequest:
    """A worker's view of the request to stop; asking costs no waiting."""

    def __init__(self, supervisor: Any) -> None:
        self._stop = supervisor.until_stop.remote()

    def __bool__(self) -> bool:
        ready, _ = ray.wait([self._stop], timeout=0)
        return bool(ready)


def until_stopped(fit: Callable[[], T], supervisor: Any) -> T:
    """Return what `fit` returns; meanwhile SIGTERM or Ctrl-C asks the workers for a checkpoint and the end.

    A second signal of either kind ends the process at once. `fit` runs in a thread: in the main thread Ray Train would
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
