"""Warm worker groups: Ray Train runs that each train trial after trial.

A process of a group imports torch, meets its companions and opens MLflow once, and not once for each trial; that is
what most of a short trial's time would go into.
"""

from __future__ import annotations

import collections
import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch

from lape_ray import storage
from lape_ray.cluster.controller import variables
from lape_ray.config import RunConfig
from lape_ray.search.desk import Desk, Question
from lape_ray.search.worker import lane_worker

JOIN_S = 60.0
START_ATTEMPTS = 3  # each waits a minute for the group's resources


@dataclass(frozen=True, kw_only=True)
class Group:
    """What one worker group takes of the cluster."""

    workers: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, run: RunConfig, *, use_gpu: bool, gpus_per_worker: float | None) -> Group:
        """Of a config; a fraction of a GPU only for single workers.

        Raises:
            ValueError: the share of a GPU cannot be had.
        """
        gpus = (1.0 if gpus_per_worker is None else gpus_per_worker) if use_gpu else 0.0
        if gpus_per_worker is not None and not use_gpu:
            raise ValueError("--gpus-per-worker needs GPUs, but trials run on CPUs; leave it out")
        if use_gpu and not (0 < gpus <= 1):
            raise ValueError(
                f"--gpus-per-worker {gpus:g} must be above 0 and at most 1: a worker uses one GPU"
            )
        if not isinstance(run.num_workers, int):
            raise ValueError(
                f"--run.num_workers {run.num_workers} may not vary in a search, whose trials are to be compared; give "
                "one number"
            )
        if gpus < 1 and use_gpu and run.num_workers > 1:
            raise ValueError(
                f"--gpus-per-worker {gpus:g} would put workers of one trial on one GPU, which NCCL refuses: "
                "set --run.num_workers 1, or leave it out"
            )
        return cls(workers=run.num_workers, cpus=run.cpus_per_worker, gpus=gpus)

    @property
    def need(self) -> dict[str, float]:
        """Of one worker."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def places(nodes: list[dict[str, float]], group: Group) -> int:
    """How many groups the nodes (resource -> amount of each) can hold at once."""

    def fitting(node: dict[str, float]) -> int:
        counts = []
        for kind, amount in group.need.items():
            have = node.get(kind, 0.0)
            if kind == "GPU" and amount < 1:  # Ray gives no share that spreads over two GPUs
                counts.append(math.floor(have) * math.floor(1 / amount + 1e-9))
            else:
                counts.append(math.floor(have / amount + 1e-9))
        return min(counts)

    return sum(fitting(node) for node in nodes) // group.workers


def concurrency(group: Group, *, asked: int | None, wait_s: float) -> int:
    """Choose how many groups to start: as many as are free now, `asked` at most.

    It is at least one, for which it waits.

    Raises:
        ValueError: not even one, or not `asked`, will ever fit.
    """
    deadline, told = time.monotonic() + wait_s, False
    while True:
        nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        whole = places(nodes, group)
        if whole >= (asked or 1):
            break
        need = ", ".join(f"{group.workers * amount:g} {kind}" for kind, amount in group.need.items())
        have = ", ".join(f"{ray.cluster_resources().get(kind, 0):g} {kind}" for kind in group.need)
        if time.monotonic() > deadline:
            if whole:
                raise ValueError(
                    f"--concurrent {asked} is more than fits: one trial needs {need}, the cluster has {have}, "
                    f"which is room for {whole}; lower it, or leave it out"
                )
            raise ValueError(
                f"a trial needs {need}, but the cluster has {have}: lower --run.num_workers, "
                "--run.cpus_per_worker or --gpus-per-worker, add nodes, or wait longer with --run.wait_s"
            )
        if not told:
            print(f"waiting up to {wait_s:g} s: a trial needs {need}, the cluster has {have}", flush=True)
        told = True
        time.sleep(1)
    free = ray.available_resources()
    now = min(
        math.floor(free.get(kind, 0.0) / (amount * group.workers) + 1e-9)
        for kind, amount in group.need.items()
    )
    return min(whole, asked or max(1, now))


class Lanes:
    """The worker groups of one search, and the desk that they ask at."""

    def __init__(self, run: RunConfig, group: Group, *, folder: str) -> None:
        self._run, self._group, self._folder = run, group, storage.join(folder, "lanes")
        self._desk = ray.remote(num_cpus=0, max_concurrency=1000)(Desk).remote()
        self._threads: dict[int, threading.Thread] = {}
        self._ended: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._heard: collections.Counter[int] = collections.Counter()  # questions of each group

    def start(self, count: int) -> None:
        for lane in range(count):
            thread = threading.Thread(target=self._keep_up, args=(lane,), name=f"lane-{lane}", daemon=True)
            self._threads[lane] = thread
            thread.start()

    @property
    def alive(self) -> int:
        return len(self._threads)

    def questions(self, timeout_s: float) -> list[Question]:
        """Return what groups ask, waiting `timeout_s` at most for the first."""
        found: list[Question] = ray.get(self._desk.fetch.remote(timeout_s))
        self._heard.update(lane for _, lane, _ in found)
        return found

    def answer(self, ticket: int, value: Any, *, to_all: bool = False) -> None:
        """Answer rank 0; with `to_all`, its companions can read the answer too."""
        self._desk.answer.remote(ticket, value, to_all)

    def ended(self) -> list[tuple[int, str]]:
        """List groups that have ended since the last call, each with why: "" where the search let it go."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                lane, reason = self._ended.get_nowait()
                self._threads.pop(lane).join()
                found.append((lane, reason))
        return found

    def close(self, wait_s: float) -> None:
        """End all groups: without the desk, each leaves at its next report. Waits for those that do so soon."""
        ray.kill(self._desk)
        deadline = time.monotonic() + wait_s
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            storage.delete_folder(self._folder)

    def _keep_up(self, lane: int) -> None:
        """Train with Ray Train until the search lets the group go.

        Ray Train gives up after some crashes, whichever trials they were in. The search counts those of each trial,
        so here a group starts again as long as its workers get so far as to ask for work.
        """
        while True:
            heard = self._heard[lane]
            try:
                self._trainer(lane).fit()
            except Exception as error:  # whatever Ray Train gives up with
                if self._heard[lane] > heard:
                    continue
                self._ended.put((lane, str(error).strip() or type(error).__name__))
            else:
                self._ended.put((lane, ""))
            return

    def _trainer(self, lane: int) -> ray.train.torch.TorchTrainer:
        run = self._run
        return ray.train.torch.TorchTrainer(
            lane_worker,
            train_loop_config={"desk": self._desk, "lane": lane},
            torch_config=ray.train.torch.TorchConfig(timeout_s=run.start_timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=run.num_workers,
                use_gpu=self._group.gpus > 0,
                resources_per_worker=self._group.need,
            ),
            run_config=ray.train.RunConfig(
                name=f"{lane}-{time.time_ns()}",  # Ray Train would continue a name that it has seen
                storage_path=self._folder,
                failure_config=ray.train.FailureConfig(
                    max_failures=run.max_failures, controller_failure_limit=START_ATTEMPTS
                ),
                worker_runtime_env={"env_vars": variables()},
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )


@contextlib.contextmanager
def opened(run: RunConfig, group: Group, *, folder: str) -> Iterator[Lanes]:
    """Lanes that are closed at the end, whatever happens."""
    lanes = Lanes(run, group, folder=folder)
    try:
        yield lanes
    except BaseException:
        lanes.close(wait_s=1.0)  # the process is about to end, and they with it
        raise
    lanes.close(wait_s=JOIN_S)
