"""Nodes that are lost, replaced, or leave with notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.faults import add_row, seconds_to_import
from helpers.nodes import config_of, environment
from helpers.service import ROOT, alone

from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.faults, pytest.mark.slow]


def run(scenario: str, home: Path) -> dict[str, Any]:
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:16"), home / f"{split}.beton", workers=1)
    command = [sys.executable, str(ROOT / "tests/helpers/nodes.py"), scenario, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(home), timeout=850)
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # In one process, which computes both micro-batches of a step: nodes must not change what is learned.
    expected = alone(config_of(scenario, home)).losses
    assert list(found["losses"]) == [str(step) for step in range(1, len(expected) + 1)]
    assert list(found["losses"].values()) == pytest.approx(expected, rel=1e-3)
    return found


def note(fault: str, found: dict[str, Any]) -> None:
    epoch, step = found["resumed"][-1]
    repeated = max(0, found["before"] - 5 * int(epoch) - int(step or 0))
    seconds = found["recovery_s"]
    add_row(fault, None if seconds is None else round(seconds, 1), repeated)


def test_a_node_that_is_lost_and_replaced(tmp_path: Path) -> None:
    note("node lost and replaced", run("replaced", tmp_path))


@pytest.mark.parametrize(
    ("scenario", "fault", "limit_s"),
    [
        ("another", "node lost, another one is there", 10),
        ("standby", "node lost, a worker stands by on another one", 4),
    ],
)
def test_a_node_that_is_lost_where_another_one_is_there(
    scenario: str, fault: str, limit_s: float, tmp_path: Path
) -> None:
    found = run(scenario, tmp_path)
    note(fault, found)
    assert found["recovery_s"] < max(limit_s, 2 * seconds_to_import())


def test_a_worker_that_is_lost_while_ray_waits_for_a_node(tmp_path: Path) -> None:
    """The node is gone for good, the worker that stood by has its place, and is killed in turn."""
    found = run("blind", tmp_path)
    note("worker SIGKILL, after a node was lost that nothing replaces", found)
    assert found["recovery_s"] < 240


def test_a_lost_node_makes_an_elastic_run_smaller(tmp_path: Path) -> None:
    found = run("elastic", tmp_path)
    note("node lost, --run.num_workers 1:2", found)
    assert found["workers"][0] == "2"
    assert "1" in found["workers"]
    assert set(found["workers_logged"]) == {1.0, 2.0}
    assert "summary/summary.html" in found["pages"]


def test_a_node_that_leaves_with_notice_is_no_failure(tmp_path: Path) -> None:
    """A checkpoint is made on notice; the run has no failure to spare."""
    note("node drained with 10 s of notice", run("drain", tmp_path))
