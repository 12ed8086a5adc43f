"""Searches on the real Ray Tune that are killed again and again: they come to what an undisturbed one comes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.service import ROOT

from lape_ray.cluster.local import LocalCluster, local_cluster

pytestmark = [pytest.mark.timeout(1800), pytest.mark.cluster]
TOY = ROOT / "tests/helpers/toy_search.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(num_cpus=2) as running:
        yield running


def drive(
    cluster: LocalCluster, folder: Path, *words: str, kill_after: int = 0, snapshots_s: str = "10"
) -> tuple[int, str]:
    """Run the toy's driver; returns its exit code and what it printed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {
        **os.environ,
        **cluster.environment,
        "PYTHONPATH": path,
        "TUNE_GLOBAL_CHECKPOINT_S": snapshots_s,
    }
    result = folder.with_name(f"{folder.name}.json")
    command = [sys.executable, str(TOY), str(folder), *words, str(kill_after), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    return done.returncode, done.stdout + done.stderr


def came_to(folder: Path) -> list[dict[str, Any]]:
    """The records of the trials, but for how often their actors died with the driver."""
    return json.loads(folder.with_name(f"{folder.name}.json").read_text())  # type: ignore[no-any-return]


def trained(folder: Path) -> list[tuple[str, str]]:
    """Every epoch that was trained, of every trial."""
    return [
        (file.parent.name, line) for file in folder.rglob("trained.txt") for line in file.read_text().split()
    ]


# What waits for whom is all that decides in these; ASHA and TPE decide by what is there, so one at a time.
SEARCHES = [
    ("full", "random", "2"), ("hyperband", "random", "1"), ("hyperband", "random", "2"), ("pbt", "random", "2"),
    ("asha", "random", "1"), ("full", "tpe", "1"), ("asha", "tpe", "1"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "sample", "lanes"), SEARCHES)
def test_killed_again_and_again_equals_undisturbed(
    cluster: LocalCluster, tmp_path: Path, schedule: str, sample: str, lanes: str
) -> None:
    """By SIGKILL of the driver, every few epochs; and nothing is trained twice."""
    words = (schedule, sample, lanes)
    code, output = drive(cluster, tmp_path / "whole", *words)
    assert code == 0, output
    for attempt in range(30):
        kill_after = 7 + 4 * (attempt % 3)
        code, output = drive(
            cluster,
            tmp_path / "killed",
            *words,
            kill_after=kill_after,
            snapshots_s=("0.2", "100")[attempt % 2],
        )
        if code == 0:
            break
        assert code == -9, output
    assert code == 0
    assert attempt > 2
    assert came_to(tmp_path / "killed") == came_to(tmp_path / "whole")
    epochs = trained(tmp_path / "killed")
    assert len(set(epochs)) == len(epochs)
    assert sorted(epochs) == sorted(trained(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["experiment_state-*.json", "search_gen_state-*.json", "both"])
def test_a_snapshot_that_is_cut_in_half_loses_nothing(
    cluster: LocalCluster, tmp_path: Path, torn: str
) -> None:
    """Tune alone would begin every trial anew, without an error; here what trials have stored is heard again."""
    words = ("pbt", "random", "2")
    code, output = drive(cluster, tmp_path / "whole", *words)
    assert code == 0, output
    code, output = drive(cluster, tmp_path / "torn", *words, kill_after=30, snapshots_s="0.2")
    assert code == -9, output
    patterns = ["experiment_state-*.json", "search_gen_state-*.json"] if torn == "both" else [torn]
    for pattern in patterns:
        newest = max((tmp_path / "torn").glob(pattern))
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    code, output = drive(cluster, tmp_path / "torn", *words)
    assert code == 0, output
    assert "is torn, going on from what is older" in output
    assert came_to(tmp_path / "torn") == came_to(tmp_path / "whole")
    epochs = trained(tmp_path / "torn")
    assert len(set(epochs)) == len(epochs)
