"""Hold the formulas of `scaling_model.py` against trainings here, over a network of limited bandwidth.

The figures that the formula gets are measured apart: the bandwidth by one TCP stream, the latency by all-reduces of one
number, and the step by all workers at the same time without a group, so that they share the cores as they will; of each
step the slowest worker's time counts, for whom all others wait. The training is the loop's `train_epoch` with
DistributedDataParallel over gloo. Most of a step's arithmetic is stood in for by sleeping, in the forward and the
backward pass of each block: two cores could not compute for eight workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist
from common import Row, spread
from limited_network import DEVICE, PORT, address, enter, limited_network, measured_link
from scaling_model import all_reduce_s, buckets, exposed_s, step_s
from torch import nn
from train_step import Synthetic, training_config

from lape_ray.config import replace_fields
from lape_ray.training.flags import Flags
from lape_ray.training.loop import train_epoch
from lape_ray.training.state import TrainState, build_state

LIMIT = 0.15  # of a step's time, by which the formula may be wrong
MODEL = {
    "image_size": 32,
    "embed_dim": 384,
    "num_heads": 6,
}  # five tokens: many parameters, little arithmetic
FIRST_STEPS = (
    3  # DistributedDataParallel sends all at the end of the first one, and orders its buckets after it
)
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Setup:
    """Say what the workers of one training do.

    Attributes:
        depth: blocks of the network
        forward_s, backward_s: for which the blocks sleep in a step's passes, all together
        steps: that are timed
    """

    workers: int
    bytes_per_s: float
    depth: int
    forward_s: float
    backward_s: float
    steps: int


class Steps(Synthetic):
    """As many synthetic batches as are trained on."""

    def __init__(self, *arguments: Any, steps: int) -> None:
        super().__init__(*arguments)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps


@dataclass
class Clock:
    """A reporter that notes when each step ends."""

    ends: list[float] = field(default_factory=list)

    def poll_flags(self) -> Flags:
        self.ends.append(time.perf_counter())
        return Flags.NONE

    def step(self, metrics: dict[str, float], *, step: int) -> None: ...

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Any]) -> None: ...

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Any]) -> None: ...

    def checkpoint_stored(self) -> None: ...

    def wait_until_saved(self) -> None: ...

    def node_leaving(self) -> bool:
        return False

    def line(self, text: str) -> None: ...


def build(setup: Setup, workers: int) -> TrainState:
    """Build the state of a training of which this process is one worker; its blocks sleep."""
    config = training_config("deit_tiny", join="lape", batch_size=2 * workers, depth=setup.depth, **MODEL)
    config = replace_fields(config, {"run.num_workers": workers, "run.timeout_s": TIMEOUT_S})
    device = torch.device("cpu")
    batches = Steps(config, device, steps=FIRST_STEPS + setup.steps)
    state = build_state(config, device, loaders=(batches, batches))
    blocks = state.network.blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: time.sleep(setup.forward_s / len(blocks)))
        block.register_full_backward_hook(lambda *_: time.sleep(setup.backward_s / len(blocks)))
    return state


def step_times(state: TrainState) -> list[float]:
    """Train an epoch; returns the seconds of its steps, without the first ones."""
    clock = Clock()
    train_epoch(state, 0, clock, save=lambda progress: None)
    ends = clock.ends[FIRST_STEPS - 1 :]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def work(rank: int, setup: Setup, names: list[str], found: Queue[Row]) -> None:
    """Time this worker's steps without a group, then in a training of all."""
    enter(names[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore(address(0), PORT, setup.workers, is_master=rank == 0, timeout=timeout)
    meet(store, "alone", setup.workers)
    alone = step_times(build(setup, 1))
    meet(store, "together", setup.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=setup.workers, timeout=timeout)
    state = build(setup, setup.workers)
    latencies = [all_reduce_latency_s() for _ in range(20)]
    together = step_times(state)
    parameter_bytes = 4 * sum(parameter.numel() for parameter in state.network.parameters())
    times = {"alone": alone, "together": together, "latencies": latencies}
    found.put({"rank": rank, "gradient_bytes": parameter_bytes, **times})
    dist.barrier()  # the store is the first worker's, and ends with it
    state.flags.close()
    dist.destroy_process_group()


def all_reduce_latency_s() -> float:
    """Return the time of an all-reduce of one number."""
    began = time.perf_counter()
    dist.all_reduce(torch.zeros(1))
    return time.perf_counter() - began


def meet(store: dist.Store, place: str, workers: int) -> None:
    """Wait until all workers are there."""
    if store.add(place, 1) == workers:
        store.set(f"{place}: all", "1")
    store.wait([f"{place}: all"])


def check(setup: Setup) -> Row:
    """Train, and compare the time of a step with the formula's; `over` is measured over predicted.

    Raises:
        CannotRunError: this machine cannot make the network.
    """
    with limited_network(setup.workers, bytes_per_s=setup.bytes_per_s) as names:
        bytes_per_s = measured_link(names, payload_bytes=int(2 * setup.bytes_per_s))
        rows = run_workers(setup, names)
    measured_s = spread(rows[0]["together"])
    row = {
        "name": f"{setup.workers} workers",
        "bytes_per_s": bytes_per_s,
        "latency_s": spread(rows[0]["latencies"])["median"],
        "gradient_bytes": rows[0]["gradient_bytes"],
        "compute_s": spread([max(times) for times in zip(*(row["alone"] for row in rows), strict=True)]),
    }
    row |= predict(row, setup.workers, backward_s=setup.backward_s)
    over = measured_s["median"] / row["predicted_s"]
    return {**row, "step_s": measured_s, "over": over, "load_average": os.getloadavg()[0]}


def predict(row: Row, workers: int, *, backward_s: float) -> Row:
    """Predict the time of a step from what was measured apart."""
    sizes, speed, latency_s = buckets(row["gradient_bytes"]), row["bytes_per_s"], row["latency_s"]
    transfers = [all_reduce_s(size, workers, bytes_per_s=speed, latency_s=latency_s) for size in sizes]
    exposed = exposed_s(sizes, transfers, backward_s=backward_s)
    predicted = step_s(row["compute_s"]["median"], exposed)
    return {"all_reduce_s": sum(transfers), "exposed_s": exposed, "predicted_s": predicted}


def run_workers(setup: Setup, names: list[str]) -> list[Row]:
    """Run the workers as processes; returns what each found, by rank."""
    context = multiprocessing.get_context("spawn")
    found: Queue[Row] = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, setup, names, found), daemon=True)
        for rank in range(setup.workers)
    ]
    for process in processes:
        process.start()
    try:
        rows: list[Row] = []
        deadline = time.monotonic() + TIMEOUT_S
        while len(rows) < setup.workers:
            if not found.empty():
                rows.append(found.get())
            elif any(process.exitcode for process in processes) or time.monotonic() > deadline:
                codes = [process.exitcode for process in processes]
                raise RuntimeError(f"a worker failed or hangs, for the reason above; exit codes {codes}")
            else:
                time.sleep(0.1)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return sorted(rows, key=lambda row: int(row["rank"]))
