"""What several tests share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.plugins import forget

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: teams of threads that share cores wait for each other at length.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if TYPE_CHECKING:
    from helpers.service import Service

    from lape_ray.cluster.local import LocalCluster

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
    items.sort(key=_shares_cluster)  # one after the other, and last


@pytest.fixture(scope="session", autouse=True)
def _no_home_of_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what a test leaves where it names no folder out of the home of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPE_RAY_HOME", str(tmp_path_factory.mktemp("lape_ray")))
        yield


@pytest.fixture(autouse=True)
def _no_plugin_of_others() -> Iterator[None]:
    yield
    forget()


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


class SharedCluster:
    """The cluster of modules that follow each other and ask for `service`: its start takes as long as many a test."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._cluster: LocalCluster | None = None

    def get(self) -> LocalCluster:
        from helpers.service import (
            running_cluster,
        )  # ray and mlflow take seconds, which most tests do not need

        if self._cluster is None:
            self._cluster = self._stack.enter_context(running_cluster())
        return self._cluster

    def end(self) -> None:
        self._stack.close()
        self._cluster = None


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SharedCluster]:
    shared = SharedCluster()
    yield shared
    shared.end()


@pytest.fixture(scope="module", autouse=True)
def _no_cluster_of_others(request: pytest.FixtureRequest, shared_cluster: SharedCluster) -> None:
    """End the cluster where a module begins that does not share it, and may start one of its own."""
    if not any(_shares_cluster(item) for item in request.session.items if item.module is request.module):
        shared_cluster.end()


def _shares_cluster(item: pytest.Item) -> bool:
    fixtures = getattr(item, "_fixtureinfo", None)
    found = fixtures.name2fixturedefs.get("service", ()) if fixtures else ()
    return bool(found) and not found[-1].baseid.endswith(".py")  # the last one overrides that of this file


@pytest.fixture(scope="module")
def service(shared_cluster: SharedCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A cluster, and what it takes to run the jobs on it: a home of its own for each module that asks for it."""
    from helpers.service import service_on

    with service_on(shared_cluster.get(), tmp_path_factory.mktemp("home")) as found:
        yield found
