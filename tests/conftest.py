"""What several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before torch: teams of threads that share cores wait for each other at length
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real photographs, CIFAR-10 and reference outputs that lie beside the checkout; absent elsewhere."""
    if not SHARED.is_dir():
        pytest.skip(f"the development data is not at {SHARED}")
    return SHARED
