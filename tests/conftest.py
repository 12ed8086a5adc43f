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
    """CIFAR-10 and ImageNet photographs beside the checkout, which may not be copied; for slow tests alone."""
    if not SHARED.is_dir():
        pytest.skip(
            f"CIFAR-10 and ImageNet photographs, which may not be copied here, are not at {SHARED}/data"
        )
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared_dir" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("slow"):
            raise pytest.UsageError(
                f"{item.nodeid} needs {SHARED}, which clones lack; mark it slow or use tests/data"
            )


@pytest.fixture(scope="session")
def photograph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, each with a JPEG: photographs of all sizes, shapes, colours and codings."""
    from helpers.photographs import write_photographs

    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def thumbnail_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of 32 x 32 pixels in parquet shards, train and test, as hubs have CIFAR-10."""
    from helpers.photographs import write_thumbnails

    return write_thumbnails(tmp_path_factory.mktemp("thumbnails"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A cluster, and what it takes to run the jobs on it; one for each module that asks for it."""
    from helpers.service import running_service  # ray and mlflow take seconds, which most tests do not need

    with running_service(tmp_path_factory.mktemp("home")) as found:
        yield found
