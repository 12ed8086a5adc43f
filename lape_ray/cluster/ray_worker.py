"""A training process of a run on Ray: a Ray Train worker that trains in one group of workers after another.

Where another worker is lost, this one keeps its process: it leaves its group, and meets those that are left, and the
one that takes the lost place, in the next group. That begins with the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import psutil
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from lape_ray.cluster.interface import join_workers
from lape_ray.cluster.prometheus import RunGauges
from lape_ray.cluster.rendezvous import LEAVE_S, Member, Place
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_end import RunEnd
from lape_ray.cluster.supervisor import LeavingNode, StopRequest
from lape_ray.cluster.worker import make_ready, train_run
from lape_ray.config import RunConfig
from lape_ray.training.distributed import forget_training

T = TypeVar("T")
JOIN_S = 60.0  # for which workers that have just met wait for each other
LOOK_S = 1.0  # between two looks at whether the group is broken, where a worker waits for another
ABORT_S = 1.0  # after which a worker that is still in a collective of a broken group is taken out of it


class GroupBrokenError(RuntimeError):
    """Another worker of the group was lost."""


def run_worker(payload: dict[str, Any]) -> RunEnd:
    """Train on one worker of Ray Train, or stand by until one is lost.

    Args:
        payload: the `run`, its `supervisor`, the actor's handle, and how many `stand_by`.
    """
    _quiet_ray_train()
    run, supervisor, reason = payload["run"], payload["supervisor"], ""
    device = ray.train.torch.get_device()
    if payload["stand_by"]:
        make_ready(run, device)
    while True:
        place, store = _meet(supervisor, payload["stand_by"], reason)
        if place is None:
            return RunEnd(*ray.get(supervisor.ended.remote()))
        broken = threading.Event()
        try:
            with _joined(place, store, run.config.run, device, supervisor, broken):
                end = train_run(run, RayGroup(run, place, store, broken, supervisor), device)
            ray.get(supervisor.finish.remote(end.kind, end.reason))
            return end
        except Exception as error:
            if not (broken.is_set() or _of_another(error)):
                raise
            reason = str(error).strip().splitlines()[0]
        forget_training(device)


def _meet(supervisor: Any, stand_by: int, reason: str) -> tuple[Place | None, dist.Store]:
    """Wait for a place in a group; returns the store through which that group's workers find each other."""
    context, runtime = ray.train.get_context(), ray.get_runtime_context()
    own = ray.util.get_node_ip_address()
    server = dist.TCPStore(own, 0, is_master=True, wait_for_workers=False)
    process = runtime.get_node_id(), os.getpid(), psutil.Process().create_time()
    member = Member(
        context.get_world_rank(), runtime.current_actor, runtime.get_actor_id(), (own, server.port), process
    )
    size = context.get_world_size() - stand_by
    place: Place | None = ray.get(supervisor.meet.remote(member, size, reason))
    if place is None or place.rank == 0:
        return place, server
    return place, dist.TCPStore(*place.address, timeout=timedelta(seconds=JOIN_S))


def _of_another(error: Exception) -> bool:
    """Tell whether an error says that another worker is gone; gloo's errors have no class of their own."""
    return isinstance(error, (GroupBrokenError, dist.DistError)) or "/gloo/" in str(error)


@contextlib.contextmanager
def _joined(
    place: Place,
    store: dist.Store,
    run: RunConfig,
    device: torch.device,
    supervisor: Any,
    broken: threading.Event,
) -> Iterator[None]:
    """Join the process group of a place, and leave it at the end; `broken` is set where another worker is lost."""
    left = threading.Event()
    threading.Thread(target=_watch, args=(place, supervisor, broken, left), daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        join_workers(
            device, rank=place.rank, size=place.size, own_address=ray.util.get_node_ip_address(),
            timeout_s=run.start_timeout_s, store=dist.PrefixStore("group", store),
        )  # fmt: skip
        yield
    finally:
        left.set()
        if dist.is_initialized():
            dist.destroy_process_group()


def _watch(place: Place, supervisor: Any, broken: threading.Event, left: threading.Event) -> None:
    """Wait until the group is broken, and see to it that this worker leaves it."""
    while True:
        try:
            if not ray.get(supervisor.until_broken.remote(place.number)):
                return
            break
        except ray.exceptions.ActorUnavailableError:  # the network was away
            time.sleep(LOOK_S)
        except ray.exceptions.RayError:  # it is dead: the driver ends, or starts all again
            break
    broken.set()
    if left.wait(ABORT_S):
        return
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()  # NCCL's collectives do not end by themselves
    if not left.wait(LEAVE_S - ABORT_S):
        print(f"a worker cannot leave its group within {LEAVE_S:g} s, and ends", flush=True)
        os._exit(1)


class RayGroup:
    """The workers of a run on Ray, as one of them sees the others; see `group.Group`.

    Ray Train hears nothing of what is learned: a restart begins with the newest checkpoint of the run's own list.
    """

    def __init__(
        self, run: Run, place: Place, store: dist.Store, broken: threading.Event, supervisor: Any
    ) -> None:
        self.rank, self.size, self.address = place.rank, place.size, ray.util.get_node_ip_address()
        self._run, self._store, self._broken, self._supervisor = run, store, broken, supervisor
        self._exchanges = 0
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
        key = self._next_key()
        if self.rank == 0:
            self._store.set(key, json.dumps(value))
            return value
        self._wait(key)
        told: T = json.loads(self._store.get(key))
        return told

    def barrier(self) -> None:
        key = self._next_key()
        if self._store.add(f"{key}/count", 1) == self.size:
            self._store.set(key, "")
        self._wait(key)  # a collective of the training has less patience

    def _next_key(self) -> str:
        self._exchanges += 1
        return f"exchange/{self._exchanges}"

    def _wait(self, key: str) -> None:
        """Wait until a worker has set `key`, as long as it takes."""
        while not self._broken.is_set():
            with contextlib.suppress(dist.DistStoreError):
                return self._store.wait([key], timedelta(seconds=LOOK_S))
        raise GroupBrokenError("another worker was lost")

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
