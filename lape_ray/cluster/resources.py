"""Compare what a training takes of the cluster with what the cluster has room for, and wait for room."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import ray

from lape_ray.config import RunConfig


def worker_resources(run: RunConfig, gpus: float) -> dict[str, float]:
    """Return what a worker of a run takes of its node, Ray's resource -> amount; it may be a part of a GPU."""
    return {"CPU": run.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def places(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float], workers: int) -> int:
    """Return how many groups of so many workers the nodes (resource -> amount of each) can hold at once.

    `need` is what each worker takes of its node, Ray's resource -> amount.
    """

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


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(need: Mapping[str, float], workers: int) -> int:
    """Return how many groups of so many workers the connected cluster can hold at once."""
    return places(_nodes(), need, workers)


def lack(need: Mapping[str, float], workers: int) -> str:
    """Compare what a group of workers takes with what the connected cluster has, in words."""
    return compared(_nodes(), need, workers)


def compared(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float], workers: int) -> str:
    """Compare what a group of workers takes with what the nodes have, in words."""

    def words(amounts: Mapping[str, float]) -> str:
        return ", ".join(f"{amount:g} {kind}" for kind, amount in amounts.items())

    whole = {kind: workers * amount for kind, amount in need.items()}
    have = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in need}
    text = f"{words(whole)}, but the cluster has {words(have)}"
    if all(have[kind] >= amount for kind, amount in whole.items()) and not places(nodes, need, workers):
        return f"{text}, though not {words(need)} on one node for each worker"
    return text


def wait_for_room(
    what: str,
    need: Mapping[str, float],
    workers: int,
    *,
    groups: int = 1,
    wait_s: float,
    tell: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Wait up to `wait_s` seconds until the cluster could hold so many groups; returns how many it then can.

    Ray Train and Ray Tune themselves would wait without a word, and for ever. `tell` hears `what` a group is, and what
    it lacks; `stop` says whether to wait no longer.

    Raises:
        ValueError: it can hold none; says what to change.
    """
    deadline, told = time.monotonic() + wait_s, False
    while (found := room(need, workers)) < groups and time.monotonic() <= deadline and not stop():
        if not told:
            tell(f"waiting up to {wait_s:g} s for nodes: {what} needs {lack(need, workers)}")
        told = True
        time.sleep(1)
    if not found:
        raise ValueError(
            f"{what} needs {lack(need, workers)}: lower --run.num_workers or --run.cpus_per_worker, add nodes, or "
            "wait longer for them with --run.wait_s"
        )
    return found
