"""Tell the supervisor of a run what Ray Train's controller hears of its workers."""

from __future__ import annotations

import warnings
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from lape_ray.cluster.supervisor import MEMORY

ANSWER_S = 30.0  # that the supervisor has, which asks those that wait whether they live


class GroupsEnd(WorkerGroupCallback):
    """Tell the supervisor when the processes of a group of workers are gone, by a private interface of Ray Train."""

    def __init__(self, supervisor: Any) -> None:
        self.supervisor = supervisor

    def after_worker_group_shutdown(self, worker_group_context: object) -> None:
        self.supervisor.torn_down.remote()

    after_worker_group_abort = after_worker_group_shutdown


class FailureCount(UserCallback):
    """Tell the supervisor of every failure that Ray Train's controller sees."""

    def __init__(self, supervisor: Any) -> None:
        self.supervisor = supervisor

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in the controller's process, whose warning of an option that Ray sets itself helps no user."""
        self.__dict__.update(state)
        warnings.filterwarnings("ignore", message=".*exclude_resources. is deprecated")

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        reasons = [
            (str(error).strip() or repr(error)).splitlines()[-1] for error in worker_exceptions.values()
        ]
        # Where one worker ran out of memory, the others say that it went away.
        reason = next((reason for reason in reasons if MEMORY in reason), reasons[0])
        controller = ray.get_runtime_context().current_actor
        # Where the supervisor is dead, the error ends the controller, and the driver starts both again.
        ray.get(self.supervisor.failed.remote(reason, tuple(worker_exceptions), controller), timeout=ANSWER_S)
