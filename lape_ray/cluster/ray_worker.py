"""A training process of a run on Ray: a Ray Train worker among others."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

import psutil
import ray
import ray.train
import ray.train.collective
import ray.train.torch

from lape_ray.cluster.prometheus import RunGauges
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_end import RunEnd
from lape_ray.cluster.supervisor import LeavingNode, StopRequest
from lape_ray.cluster.worker import train_run

T = TypeVar("T")


def run_worker(payload: dict[str, Any]) -> RunEnd:
    """Train on one worker of Ray Train.

    Args:
        payload: the `run`, and its `supervisor`, the actor's handle.
    """
    _quiet_ray_train()
    group = RayGroup(payload["run"], payload["supervisor"])
    return train_run(payload["run"], group, ray.train.torch.get_device())


class RayGroup:
    """The workers of a run on Ray, as one of them sees the others; see `group.Group`.

    Ray Train hears of no checkpoint and no metric: `ray.train.report` waits until its controller looks, which is once a
    second or two. A restart begins with the newest checkpoint of the run's own list.
    """

    def __init__(self, run: Run, supervisor: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self._run, self._supervisor = run, supervisor
        self._stop = StopRequest(supervisor) if self.rank == 0 else None
        self._node = LeavingNode()

    def may_start(self, newest: str | None) -> str:
        reason: str = ray.get(self._supervisor.started.remote(newest))
        return reason

    def moments(self) -> Mapping[str, float]:
        asked = time.time()
        told: dict[str, float] = ray.get(self._supervisor.moments.remote())
        ahead = told["now"] - (asked + time.time()) / 2  # of this machine's clock
        now = time.time() + ahead
        return {**told, "now": now, "created": now - _age()}

    def broadcast(self, value: T) -> T:
        # Plain values: the actor of Ray Train that hands them on would import torch for ours, which takes 0.5 GB.
        told: T = ray.train.collective.broadcast_from_rank_zero(value)
        return told

    def barrier(self) -> None:
        ray.train.collective.barrier()  # a collective of the training has less patience

    def show(self, metrics: Mapping[str, float]) -> None:
        self._gauges.show(metrics)

    @cached_property
    def _gauges(self) -> RunGauges:
        return RunGauges(self._run.name, self.rank)

    def stop_asked(self) -> bool:
        return bool(self._stop)

    def node_leaving(self) -> bool:
        return self._node.poll()


def _age() -> float:
    """Return the seconds since this process was made."""
    process = psutil.Process()
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time() - process.create_time()
    # psutil adds to a moment since the boot the moment of the boot, in whole seconds
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (process.create_time() - psutil.boot_time())


def _quiet_ray_train() -> None:
    """Keep Ray Train from repeating every report's metrics for every rank.

    Some of its loggers are named after their file instead of their module, so that LoggingConfig misses them.
    """
    for name in list(logging.root.manager.loggerDict):
        if "ray/train/" in name:
            logging.getLogger(name).setLevel(logging.WARNING)
