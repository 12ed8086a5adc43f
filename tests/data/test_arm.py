"""The decoder's kernels on ARM: NEON gives the portable code's bytes, in an emulator. `make test-arm` installs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent.parent.parent / "lape_ray/data/native"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="make test-arm installs what it needs"
)
def test_the_kernels_for_arm_give_the_portable_bytes(tmp_path: Path) -> None:
    sources = [NATIVE / "resize.cpp", NATIVE / "resize_kernels.cpp", NATIVE / "crc32c.cpp"]
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        "-static",
        f"-I{NATIVE}",
    ]
    program = tmp_path / "kernels"
    sources.append(Path(__file__).with_name("arm_native.cpp"))
    subprocess.run([COMPILER, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert done.stdout == "300 rounds agree\n", done.stdout + done.stderr
