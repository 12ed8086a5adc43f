"""Predict what a training costs on many GPUs from figures that are measured on few. Pure formulas.

Names end in the unit: `_s` seconds, `_bytes`, `_per_s`. Not in it: workers that are slower than the others, for whom
all of them wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

MIB = 2**20


class Hops(NamedTuple):
    """Seconds that a message takes to the next GPU, in the node and in another node."""

    local_s: float
    network_s: float


# NCCL's own figures, by which it chooses an algorithm: hwLat of src/graph/tuning.cc, ring Simple and tree LL128.
RING = Hops(3.4e-6, 9.6e-6)
TREE = Hops(1.2e-6, 8.5e-6)


def buckets(gradient_bytes: float, *, first_bytes: float = MIB, cap_bytes: float = 25 * MIB) -> list[float]:
    """Return the bytes of DistributedDataParallel's buckets, in the order in which their gradients are ready.

    They close at 1 MiB and then at 25 MiB (torch/nn/parallel/distributed.py); parameters are not divided, which this
    neglects.
    """
    found, left = [min(first_bytes, gradient_bytes)], gradient_bytes - min(first_bytes, gradient_bytes)
    while left > 0:
        found.append(min(cap_bytes, left))
        left -= found[-1]
    return found


def all_reduce_s(payload_bytes: float, workers: int, *, bytes_per_s: float, latency_s: float = 0.0) -> float:
    """Return the time of an all-reduce in which each worker sends 2 (n-1)/n of the bytes, as in a ring.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations (2009).

    Args:
        bytes_per_s: of the slowest link, in each of its two directions.
        latency_s: of all hops together.
    """
    return 2 * (workers - 1) / workers * payload_bytes / bytes_per_s + latency_s


def latency_s(nodes: int, gpus_per_node: int) -> float:
    """Return the hops' time of an all-reduce: of a ring or of a tree, of which NCCL takes the quicker.

    Source: ncclTopoTuneModel of NCCL's src/graph/tuning.cc.
    """
    ring_hops, network_hops = 2 * (nodes * gpus_per_node - 1), 2 * (nodes - 1)
    ring = (ring_hops - network_hops) * RING.local_s + network_hops * RING.network_s
    tree = 2 * ((gpus_per_node - 1) * TREE.local_s + math.ceil(math.log2(nodes)) * TREE.network_s)
    return min(ring, tree)


def exposed_s(bucket_bytes: Sequence[float], transfers_s: Sequence[float], *, backward_s: float) -> float:
    """Return the time that the all-reduce of a step goes on after the backward pass has ended.

    A bucket is sent when its gradients are ready and the bucket before has been sent. Gradients get ready evenly, so
    that the last bucket is never hidden.

    Args:
        transfers_s: the time of each bucket's all-reduce.
        backward_s: the backward pass of the step's last micro-batch; those before send nothing.
    """
    ready_bytes, end_s = 0.0, 0.0
    for size_bytes, transfer_s in zip(bucket_bytes, transfers_s, strict=True):
        ready_bytes += size_bytes
        end_s = max(end_s, backward_s * ready_bytes / sum(bucket_bytes)) + transfer_s
    return end_s - backward_s


def step_s(compute_s: float, exposed_s: float, data_s: float = 0.0) -> float:
    """Return the time of a step; a loader makes the next batch all the time, also while gradients are sent."""
    return max(compute_s + exposed_s, data_s)


def stored_every_s(store_s: float, interval_s: float) -> float:
    """Return the time between two stored checkpoints, of which one is due at the end of each interval.

    A thread stores one at a time, and the training does not wait for it. Of what is due meanwhile the newest is stored
    next, where the accuracy grows, and the rest is left out.
    """
    return max(store_s, interval_s)


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Return the time between two checkpoints with which least is lost to them and to failures.

    Source: Young, A first order approximation to the optimum checkpoint interval (1974).
    """
    return math.sqrt(2 * stall_s * mtbf_s)


def failure_share(mtbf_s: float, restart_s: float, interval_s: float) -> float:
    """Return the share of a time that failures cost: each a restart, and half an interval that is trained again.

    It is right while both are small beside the mean time between failures. Source: Young (1974), as above.
    """
    return (restart_s + interval_s / 2) / mtbf_s
