"""What several tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: teams of threads that share cores wait for each other at length.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if TYPE_CHECKING:
    from helpers.service import Service

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real photographs, CIFAR-10 and reference outputs that lie beside the checkout; absent elsewhere."""
    if not SHARED.is_dir():
        pytest.skip(f"the development data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A cluster, and what it takes to run the jobs on it; one for each module that asks for it."""
    from helpers.service import running_service  # ray and mlflow take seconds, which most tests do not need

    with running_service(tmp_path_factory.mktemp("home")) as found:
        yield found
