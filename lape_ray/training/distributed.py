"""This process among the workers of a run: torch.distributed, where there are several."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This worker's place among all of them."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> World:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def mean(self, value: Tensor) -> float:
        """Compute the mean of a scalar over all workers. Synchronises with the device."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is up on any worker. Synchronises with the device."""
        return self.mean(torch.tensor(float(flag), device=self.device)) > 0

    def gather(self, text: str) -> list[str]:
        """Return each worker's text, in the order of their ranks."""
        told = [text] * self.size
        if self.size > 1:
            dist.all_gather_object(told, text)
        return told

    def set_timeout(self, seconds: float) -> None:
        """Make a worker that hangs an error of all others after `seconds`, from now on."""
        if self.size > 1:
            # torch 2.11 has it under another name
            set_timeout = (
                getattr(dist.distributed_c10d, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            )
            set_timeout(timedelta(seconds=seconds), None)


def forget_training(device: torch.device) -> None:
    """Give back what the next training of this process would inherit."""
    # After eight networks of one process torch would compile no more; where nothing was compiled, asking for it would
    # import the compiler.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
