"""What a step could reach at most: operations of a network by formula, and the device's measured peaks.

Formula symbols: N tokens, D width, L blocks, P patches, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lape_ray.bench.clock import window
from lape_ray.bench.record import spread
from lape_ray.model.variants import VariantSpec

# Dense bf16 in FLOP/s, from the vendor's data sheets; by a part of the device's name.
DATASHEET = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}


def training_flops(spec: VariantSpec) -> int:
    """Floating point operations of one image in a training step, forward and backward; matrix products alone.

    A multiplication with its addition counts 2. Backward counts twice forward, less the gradient by the images, which
    nobody asks for. What is computed again in backward is not counted, nor is LaPE: its chain has no matrix product.
    Where a class token is read, the last block computes its queries and what follows for the prefix tokens alone; the
    usual formula, which counts all tokens there, comes to 6 % more for DeiT-Ti.

    Raises:
        ValueError: the network has convolutions for patches.
    """
    if spec.patch_size is None:
        raise ValueError("operations are counted for networks with patches; this one has convolutions")
    patches = (spec.image_size // spec.patch_size) ** 2
    tokens, width = patches + spec.num_prefix, spec.embed_dim
    hidden = int(width * spec.mlp_ratio)
    read = tokens if spec.sequence_pool else spec.num_prefix
    spared = (tokens - read) * width * (width + 2 * hidden + 2 * tokens)
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens**2 * width
    embed = patches * 3 * spec.patch_size**2 * width
    heads = max(1, spec.num_prefix) * width * spec.num_classes
    return 2 * (3 * (spec.depth * block - spared + heads) + 2 * embed)


def datasheet_peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the data sheet; None for a device that is not in the list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in DATASHEET.items() if part in name), None)


def measured_peaks(device: torch.device, *, rounds: int, quick: bool = False) -> dict[str, Any]:
    """The device's `matmul_flops` (FLOP/s; bf16 on a GPU, fp32 on a CPU) and `copy_bytes` (read and written, bytes/s).

    Random values: zeros draw less power and run faster than a step ever could.
    """
    gpu = device.type == "cuda"
    side = 256 if quick else 8192 if gpu else 1536
    kind = torch.bfloat16 if gpu else torch.float32
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    into = torch.empty_like(left)
    big = torch.randn(2**20 if quick else 2**30 if gpu else 2**26, device=device)
    copy = torch.empty_like(big)

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(left, right, out=into)

    def copies(times: int) -> None:
        for _ in range(times):
            copy.copy_(big)

    def best(run: Callable[[int], None], times: int, amount: float) -> dict[str, Any]:
        run(times)
        return spread([amount / window(run, times, device).step_s for _ in range(max(3, rounds))])

    found = {
        "name": str(device),
        "precision": "bf16" if gpu else "fp32",
        "side": side,
        "matmul_flops": best(multiply, 20 if gpu else 2, 2 * side**3),
        "copy_bytes": best(copies, 5 if gpu else 2, 2 * big.nbytes),
    }
    if gpu:
        del left, right, into, big, copy
        torch.cuda.empty_cache()  # steps are measured in other processes, which share the memory
    return found
