"""Ray Train's controller of a run: built, supervised, and started again where it fails."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, LoggingConfig, ScalingConfig

from lape_ray import storage
from lape_ray.cluster.checkpoint_list import read_list
from lape_ray.cluster.failure_count import FailureCount, GroupsEnd
from lape_ray.cluster.ray_worker import run_worker
from lape_ray.cluster.rendezvous import RunSupervisor
from lape_ray.cluster.resources import room, worker_resources
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_end import RunEnd, WorkersFailedError
from lape_ray.cluster.supervisor import supervised, until_stopped
from lape_ray.storage import Lease
from lape_ray.values.redaction import shared_variables

PAUSE_S = 5.0  # before the controller is started again: what ended it may last
CONTROLLER_FAILED = (ray.train.ControllerError, ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""Ray ends it where a node is out of memory, and it ends itself where storage is away as it writes."""


def train_to_the_end(run: Run, lease: Lease, supervisor: Any) -> None:
    """Train, or complete what was trained before; raises the error of how else it ended."""
    limits = run.config.run
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(limits.outage_s + 600))
    failures, stand_by = _Failures(run.folder), limits.standby_workers
    lease.call_when_lost(lambda: supervisor.stop.remote())
    with contextlib.ExitStack() as stack:
        while True:
            try:
                end: RunEnd = until_stopped(_trainer(run, supervisor, stand_by).fit, supervisor).return_value
                return end.check()
            except CONTROLLER_FAILED as error:
                if (fields := _ended(supervisor)) is not None:
                    return RunEnd(*fields).check()
                reason = _reason(error)
                print(f"warning: Ray Train's controller failed, starting it again: {reason}", flush=True)
                time.sleep(PAUSE_S)
                _wait_for_storage(run.root, limits.outage_s)
                if failures.one_more() > limits.max_failures:
                    raise WorkersFailedError(
                        f"Ray Train's controller failed {failures.count} times without a new checkpoint "
                        f"(run.max_failures={limits.max_failures}), the last time with: {reason}"
                    ) from error
                stand_by = _room_to_stand_by(run)
                if not _lives(supervisor):
                    ray.kill(supervisor)  # which frees its name, whatever is left of it
                    supervisor = stack.enter_context(
                        supervised(RunSupervisor, run.folder, limits.max_failures)
                    )


class _Failures:
    """The count of failures of the controller of the run in `folder` since its last checkpoint."""

    def __init__(self, folder: str) -> None:
        self._folder, self.count = folder, 0
        self._reached = read_list(folder)

    def one_more(self) -> int:
        """Count a failure that just happened; returns the count."""
        reached = read_list(self._folder)
        self.count, self._reached = (self.count + 1 if reached == self._reached else 1), reached
        return self.count


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and "controller error" not in line]
    return lines[0].strip() if lines else type(error).__name__


def _wait_for_storage(root: str, outage_s: float) -> None:
    """Wait until `root` can be written; raises its error after `outage_s`."""
    deadline = time.monotonic() + outage_s
    while True:
        try:
            storage.check_writable(root)
            return
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(2)


def _ended(supervisor: Any) -> tuple[str, str] | None:
    """Ask the supervisor how the run ended; None: it has not, or there is no answer."""
    try:
        fields: tuple[str, str] | None = ray.get(supervisor.ended.remote(), timeout=30)
    except ray.exceptions.RayError:
        return None
    return fields


def _lives(actor: Any) -> bool:
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=30)
    except ray.exceptions.RayError:  # dead, ended for want of memory, or no answer
        return False
    return True


class _RunBackend(ray.train.backend.Backend):
    """Ray Train starts processes only: workers form process groups among themselves."""

    share_cuda_visible_devices = True


class _SingleBackend(_RunBackend):
    """Ray Train replaces a worker that is lost, and leaves the others alone."""

    has_replica_groups = True


class WholeGroup(ray.train.torch.TorchConfig):
    """Workers that Ray Train starts again together, as it must where their number changes."""

    @property
    def backend_cls(self) -> type[_RunBackend]:
        return _RunBackend


class SingleWorkers(WholeGroup):
    """Workers of which each is started again alone.

    Each is what Ray Train calls a replica group, made for torchft. That library is not used: in it, survivors go on
    without the lost worker's share of the batch, and the newcomer takes its weights from them, so that the losses would
    not be those of an undisturbed run.
    """

    @property
    def backend_cls(self) -> type[_RunBackend]:
        return _SingleBackend


def _room_to_stand_by(run: Run) -> int:
    """Return how many workers can stand by beside those that train: a node may be gone that nothing replaces."""
    limits = run.config.run
    found = min(
        limits.standby_workers,
        max(0, room(worker_resources(limits, int(run.use_gpu)), 1) - limits.workers.low),
    )
    if found < limits.standby_workers:
        print(
            f"warning: there is room for {found} of {limits.standby_workers} workers that stand by",
            flush=True,
        )
    return found


def _trainer(run: Run, supervisor: Any, stand_by: int) -> ray.train.torch.TorchTrainer:
    limits = run.config.run
    low, high = limits.workers
    return ray.train.torch.TorchTrainer(
        run_worker,
        train_loop_config={"run": run, "supervisor": supervisor, "stand_by": stand_by},
        torch_config=WholeGroup() if low < high else SingleWorkers(),
        scaling_config=ScalingConfig(
            num_workers=(low, high) if low < high else low + stand_by,
            use_gpu=run.use_gpu,
            resources_per_worker=worker_resources(limits, int(run.use_gpu)),
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=run.root,
            failure_config=FailureConfig(max_failures=-1),  # the supervisor counts
            callbacks=[FailureCount(supervisor), GroupsEnd(supervisor)],
            worker_runtime_env={"env_vars": variables()},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def variables() -> dict[str, str]:
    """Return those of the driver's environment variables that the other processes of a run need.

    Secrets are not among them: Ray writes environments into its logs and shows them in its dashboard. Each node has
    them in its own environment, or the job in its runtime environment. Relative paths become absolute, as these
    processes run in other folders.
    """
    shared = shared_variables()
    for name in ("LAPE_RAY_HOME", "LAPE_RAY_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        if shared.get(name):
            shared[name] = storage.absolute(shared[name])
    if uri := shared.get("MLFLOW_TRACKING_URI"):
        shared["MLFLOW_TRACKING_URI"] = storage.absolute_store(uri)
    return shared
