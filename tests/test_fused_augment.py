"""The fused kernels of the augmentation: interpreted, for what they compute, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_compute_what_operators_and_pillow_do() -> None:
    file = Path(__file__).with_name("interpreted_augment.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int) -> None:
    """All the way to machine code, for which no GPU is needed; the interpreter takes more than the compiler does."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lape_ray.data.augment import fused

    images = {"images": "*u8", **dict.fromkeys(("by_image", "by_channel", "by_row", "by_column"), "i32")}
    columns = {"kinds": "*i32", "amounts": "*fp32"}
    signatures = {
        fused._make_tables: {**images, "rows": "*i32", **columns, "tables": "*u8"},
        fused._run_layer: {**images, "out": "*u8", **columns, "given_tables": "*u8", "made_tables": "*u8",
                           "matrices": "*fp64", "cubics": "*i1", "fill": "*u8"},
    }  # fmt: skip
    constants = {"HEIGHT": 224, "WIDTH": 224, "PIXELS": 224 * 224, "BLOCK": fused._PIXELS}
    for kernel, signature in signatures.items():
        own = {name: value for name, value in constants.items() if name in kernel.arg_names}
        types = {name: (own.get(name) and "constexpr") or signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, types, own)
        made = compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
        assert len(made.asm["cubin"]) > 10_000
