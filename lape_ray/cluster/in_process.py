"""A run in the process of its command, without Ray: for a debugger, a notebook, or one GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from lape_ray.cluster.group import Alone
from lape_ray.cluster.pages import hand_over
from lape_ray.cluster.run import Run
from lape_ray.cluster.signals import signals_ask
from lape_ray.cluster.worker import train_run
from lape_ray.config import TrainConfig
from lape_ray.storage import Lease


class InProcess:
    """This process as the one worker of a run."""

    def __init__(self, device: torch.device) -> None:
        self.use_gpu, self._device = device.type == "cuda", device

    def train(self, run: Run, lease: Lease) -> None:
        """Train with the arithmetic of a worker that has `cpus_per_worker` CPUs, so that losses are the same."""
        stop, threads = threading.Event(), torch.get_num_threads()
        lease.call_when_lost(stop.set)
        torch.set_num_threads(run.config.run.cpus_per_worker)
        try:
            with signals_ask(stop.set):
                train_run(run, Alone(stop), self._device).check()
        finally:
            torch.set_num_threads(threads)

    def make_pages(self, run: Run, checkpoint: str) -> None:
        """Hand the pages to a process that outlives this one."""
        hand_over(run, checkpoint)


@contextlib.contextmanager
def in_process(config: TrainConfig) -> Iterator[InProcess]:
    """Find the device; a ValueError where it is asked for and not there."""
    there = torch.cuda.is_available()
    if config.run.device == "gpu" and not there:
        raise ValueError("run.device is gpu, but torch finds no GPU here: set --run.device cpu")
    yield InProcess(torch.device("cuda", 0) if there and config.run.device != "cpu" else torch.device("cpu"))
