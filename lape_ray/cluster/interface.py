"""Form a process group by the network interface at which the workers of other nodes reach this one."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

VARIABLE = "GLOO_SOCKET_IFNAME"


def meet_at(address: str) -> None:
    """Let gloo listen on the interface of this node's `address`, an IP, unless the user named one.

    By itself it takes the one that the host's name stands for, which /etc/hosts often says is 127.0.0.1 or, on Debian,
    127.0.1.1: workers on other nodes cannot reach that.
    """
    if VARIABLE in os.environ:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ[VARIABLE] = name
            return


def join_workers(
    device: torch.device, *, rank: int, size: int, own_address: str, timeout_s: float, **place: Any
) -> None:
    """Form the process group of `size` workers that compute on `device`, where there are several.

    Args:
        own_address: this node's IP.
        place: where they find each other, torch.distributed's `store` or `init_method`.
    """
    if size == 1:
        return
    meet_at(own_address)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s), **place
    )
