"""The fused kernels of the augmentation: interpreted, for what they compute, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lape_ray.config import DataConfig
from lape_ray.data.augment import build_augment

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget


def test_kernels_compute_what_operators_and_pillow_do() -> None:
    file = Path(__file__).parent.parent / "helpers/interpreted_augment.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


class NoGpu:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # so that what is compiled for one is not found for the other

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, with the arguments of real calls; the interpreter takes more than the compiler does."""
    from triton.runtime import driver

    from lape_ray.data.augment import fused

    compiled: dict[str, set[int]] = {"_make_tables": set(), "_run_layer": set()}

    def compile_only(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: int) -> None:
        made = kernel.warmup(*arguments, grid=grid, **constants, **fused.OPTIONS)
        assert "fma.rn" not in made.asm["ptx"], "products and sums are rounded each by itself"
        compiled[kernel.fn.__name__].add(id(made))

    monkeypatch.setattr(fused, "_launch", compile_only)
    data = DataConfig(rand_augment="rand-m9-mstd0.5-inc1", mean=(0.5,) * 3, std=(0.25,) * 3)
    augment = build_augment(data, image_size=224, seed=0, fused=True)
    images = torch.zeros(64, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    monkeypatch.setattr(driver, "_active", NoGpu(capability))
    for given in (images, images.contiguous()):
        for epoch in range(6):
            augment(given, epoch=epoch, epoch_index=np.arange(64))
    # One for each of the layouts that a layer reads: another one would be compiled in the middle of a training.
    assert [len(kernels) for kernels in compiled.values()] == [2, 2]
