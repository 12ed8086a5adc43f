"""Compilation and data parallelism: a faster training step that computes the same."""

from __future__ import annotations

import os
import shutil
import warnings
from typing import cast

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lape_ray.config import Compile, Compression


def compiled(network: nn.Module, asked: Compile, device: torch.device) -> tuple[nn.Module, str]:
    """Compile `network` for the training step; returns it and a line that says what became of `run.compile`.

    The result shares `network`'s parameters; evaluation goes on with `network` itself, whose batches vary in size.
    It must be wrapped for data parallelism after this, not before: buckets then do not cut the graph.

    Raises:
        ValueError: compilation was asked for by name, and no compiler is installed.
    """
    if not compiles(asked, device):
        return network, ""
    mode = "default" if asked == "auto" else asked
    if missing := missing_compiler(device):
        if asked != "auto":
            raise ValueError(f"run.compile={asked} needs {missing}; install it, or set --run.compile off")
        return network, f"not compiled, and slower for it: {missing} is missing"
    fast = cast(nn.Module, torch.compile(network, mode=mode, dynamic=False))
    return fast, f"compiled ({mode}): the first step takes longer"


def compiles(asked: Compile, device: torch.device) -> bool:
    """Tell whether `run.compile` asks for compilation on `device`."""
    return asked != "off" and not (asked == "auto" and device.type == "cpu")


def missing_compiler(device: torch.device) -> str | None:
    """Name the compiler that this machine lacks to compile code for `device`; None where it lacks none."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton"
        # It compiles its way to the driver where it is first used.
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return None if compiler else "a C compiler (gcc)"
    return None if shutil.which("g++") or shutil.which("clang++") else "a C++ compiler (g++)"


def data_parallel(
    module: nn.Module, compression: Compression, device: torch.device, *, one_micro_batch: bool
) -> DistributedDataParallel:
    """Wrap `module` so that its gradients are averaged over all workers of the default process group.

    Gradients live in the buckets that are sent. Buffers are not sent: the only ones that change are those that
    `RunningStatistics` moves alike on all workers. Every parameter takes part
    in every step, so that buckets are ordered again after the first one by when gradients arrive: the position chain's
    come last, so that no other bucket waits for them.

    Args:
        one_micro_batch: every worker sends one micro-batch through the network in a step, so that each of its passes
            communicates.
    """
    with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers; 2.11 knows no other name
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        parallel = DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
            static_graph=one_micro_batch,  # the graph of a pass without communication is another one
        )
    if compression == "bf16":
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel
