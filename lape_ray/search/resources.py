"""Compare what a trial takes of the cluster with what the cluster has room for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import ray

from lape_ray.config import RunConfig


def worker_need(run: RunConfig, *, use_gpu: bool, gpus_per_worker: float | None) -> dict[str, float]:
    """Return what each worker of a trial takes, Ray's resource -> amount; a part of a GPU only for single workers.

    Raises:
        ValueError: the share of a GPU cannot be had.
    """
    gpus = 1.0 if gpus_per_worker is None else gpus_per_worker
    if gpus_per_worker is not None and not use_gpu:
        raise ValueError("--gpus-per-worker needs GPUs, but trials run on CPUs; leave it out")
    if use_gpu and not (0 < gpus <= 1):
        raise ValueError(f"--gpus-per-worker {gpus:g} must be above 0 and at most 1: a worker uses one GPU")
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
    return {"CPU": run.cpus_per_worker} | ({"GPU": gpus} if use_gpu else {})


def places(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float], workers: int) -> int:
    """Return how many trials of so many workers the nodes (resource -> amount of each) can hold at once."""

    def fitting(node: Mapping[str, float]) -> int:
        counts = []
        for kind, amount in need.items():
            have = node.get(kind, 0.0)
            if kind == "GPU" and amount < 1:  # Ray gives no share that spreads over two GPUs
                counts.append(math.floor(have) * math.floor(1 / amount + 1e-9))
            else:
                counts.append(math.floor(have / amount + 1e-9))
        return min(counts)

    return sum(fitting(node) for node in nodes) // workers


def room(need: Mapping[str, float], workers: int) -> int:
    """Return how many trials the connected cluster can hold at once."""
    return places([node["Resources"] for node in ray.nodes() if node["Alive"]], need, workers)


def in_words(need: Mapping[str, float], workers: int) -> str:
    """Compare what a trial takes with what the cluster has."""
    have = ray.cluster_resources()
    needed = ", ".join(f"{workers * amount:g} {kind}" for kind, amount in need.items())
    return f"a trial needs {needed}, but the cluster has " + ", ".join(
        f"{have.get(kind, 0):g} {kind}" for kind in need
    )


def wait_for_room(
    need: Mapping[str, float], workers: int, *, asked: int | None, wait_s: float, tell: Callable[[str], None]
) -> int:
    """Wait until one trial, or `asked` at once, could fit; returns how many then do.

    Raises:
        ValueError: they do not within `wait_s`; says what to change.
    """
    deadline, told = time.monotonic() + wait_s, False
    while (found := room(need, workers)) < (asked or 1):
        words = in_words(need, workers)
        if time.monotonic() > deadline:
            if found:
                raise ValueError(
                    f"--concurrent {asked} is more than fits: {words}, which is room for {found}; lower it, or leave "
                    "it out"
                )
            raise ValueError(
                f"{words}: lower --run.num_workers, --run.cpus_per_worker or --gpus-per-worker, add nodes, or wait "
                "longer with --run.wait_s"
            )
        if not told:
            tell(f"waiting up to {wait_s:g} s: {words}")
        told = True
        time.sleep(1)
    return found
