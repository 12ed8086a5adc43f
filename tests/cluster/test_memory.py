"""A node whose memory something else takes: Ray ends its own processes to save it, and the run starts again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from helpers.faults import LONG, Strike, note_cost, stored
from helpers.service import Service, alone, running_service

from lape_ray.cluster.launch import fit

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.faults, pytest.mark.slow]

GIGABYTE = 10**9
HELD_S = 6


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A Ray that takes its node for full once 5 GB more are in use than now."""
    memory = psutil.virtual_memory()
    if memory.available < 9 * GIGABYTE:
        pytest.skip("needs 9 GB of free memory")
    limit = (memory.total - memory.available + 5 * GIGABYTE) / memory.total
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", f"{limit:.4f}")
        with running_service(tmp_path_factory.mktemp("home")) as running:
            yield running


def test_the_run_goes_on_once_there_is_room(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    def take() -> None:
        hog = np.ones(5 * GIGABYTE, np.uint8)
        time.sleep(HELD_S)
        del hog

    at, config = (
        stored(service.home / "runs/memory", 28),
        service.config(run__name="memory", **{**LONG, "optim__epochs": 60}),  # it must not end before
    )
    with Strike(at, take).armed() as strike:
        result = fit(config)
    output = "".join(capfd.readouterr())
    assert service.losses(service.run(result.mlflow_run_id)) == alone(config).losses
    assert "continuing after epoch" in output
    note_cost(service, result.mlflow_run_id, f"node out of memory for {HELD_S} s", strike.at, output)
