"""Searches on the real Ray Tune that are killed again and again: they come to what an undisturbed one comes to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.service import ROOT
from helpers.toy_search import TRAINED, toy_settings
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lape_ray.cluster.local import LocalCluster, executable, local_cluster, stop_tree
from lape_ray.cluster.resources import room
from lape_ray.cluster.supervisor import draining_nodes
from lape_ray.search.settings import worker_need
from lape_ray.search.trials import read_trials

pytestmark = [pytest.mark.timeout(1800), pytest.mark.cluster]
TOY = ROOT / "tests/helpers/toy_search.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(num_cpus=2) as running:
        yield running


def command(cluster: LocalCluster, folder: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """The toy's driver, and its environment."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = folder.with_name(f"{folder.name}.json")
    environment = {**os.environ, **cluster.environment, "PYTHONPATH": path}
    return [sys.executable, str(TOY), str(folder), *words, str(result)], environment


def drive(
    cluster: LocalCluster, folder: Path, *words: str, kill_after: int = 0, snapshots_s: str = "10"
) -> tuple[int, str]:
    """Run the toy's driver; returns its exit code and what it printed."""
    driver, environment = command(cluster, folder, *words, str(kill_after))
    environment["TUNE_GLOBAL_CHECKPOINT_S"] = snapshots_s
    done = subprocess.run(driver, capture_output=True, text=True, env=environment, timeout=600)
    return done.returncode, done.stdout + done.stderr


def came_to(folder: Path) -> list[dict[str, Any]]:
    """The records of the trials, but for how often their actors died with the driver."""
    return json.loads(folder.with_name(f"{folder.name}.json").read_text())  # type: ignore[no-any-return]


def trained(folder: Path) -> list[tuple[str, int]]:
    """Every epoch that was trained, of every trial."""
    return [(trial, epoch) for trial, epoch, _ in _trained(folder)]


def leaders(folder: Path) -> set[int]:
    """The processes that trained them."""
    return {process for _, _, process in _trained(folder)}


def _trained(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for file in folder.rglob(TRAINED):
        for line in file.read_text().splitlines():
            process, entry, _ = json.loads(line)
            found.append((file.parent.name, entry["epoch"], process))
    return found


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
    assert len(leaders(tmp_path / "whole")) <= int(lanes), "they stay warm, also while all trials pause"
    for attempt in range(30):
        kill_after = 7 + 4 * (attempt % 3) + 2 * attempt  # so it ends, also where no snapshot is in time
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


def test_a_decision_at_a_rung_is_in_a_snapshot_at_once(cluster: LocalCluster, tmp_path: Path) -> None:
    """Of the trials that ASHA stops, the first after 28 epochs, though the next snapshot were due much later."""
    code, output = drive(cluster, tmp_path / "asha", "asha", "random", "1", kill_after=30, snapshots_s="1000")
    assert code == -9, output
    assert "stopped" in {trial.state for trial in read_trials(str(tmp_path / "asha"))}


def test_ray_tells_of_nodes_that_leave(cluster: LocalCluster) -> None:
    with connected_to(cluster):
        assert ray.get(ray.remote(num_cpus=0)(draining_nodes).remote()) == {}


@contextlib.contextmanager
def connected_to(cluster: LocalCluster) -> Iterator[None]:
    """This process, in a driver of the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        ray._raylet.Config.initialize("")
        ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


# --- nodes that come and go ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def node(cluster: LocalCluster, *more: str, cpus: int = 1) -> Iterator[None]:
    """Another node of so many CPUs, started with `more` options, until the block ends."""
    words = [
        "start",
        f"--address={cluster.address}",
        f"--num-cpus={cpus}",
        "--block",
        "--node-ip-address=127.0.0.1",
        *more,
    ]
    # Its actors inherit the pace of the toy's epochs; with less the search would be over before another node is there.
    environment = {**os.environ, **cluster.environment, "TOY_EPOCH_S": "0.5"}
    process = subprocess.Popen([executable("ray"), *words], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        stop_tree(process.pid)


@pytest.mark.slow
def test_nodes_that_join_are_used_and_without_any_the_search_ends_to_be_continued(tmp_path: Path) -> None:
    folder = tmp_path / "nodes"
    with local_cluster(num_cpus=0) as cluster:
        driver, environment = command(cluster, folder, "full", "random", "2", "0")
        environment |= {"TOY_WAIT_S": "20"}
        with contextlib.ExitStack() as nodes:
            nodes.enter_context(node(cluster))
            first = subprocess.Popen(
                driver, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            wait_for(lambda: len(trained(folder)) > 2, "some epochs")
            assert len(leaders(folder)) == 1
            nodes.enter_context(node(cluster))
            wait_for(lambda: len(leaders(folder)) > 1, "epochs on the second node")
        output, _ = first.communicate(timeout=120)
        assert first.returncode == 1
        assert "waiting up to 20 s for nodes: a trial needs 1 CPU, but the cluster has 0 CPU" in output
        assert "ResourcesGoneError" in output
        assert "the same command continues the search" in output
        with node(cluster):
            second = subprocess.run(driver, capture_output=True, text=True, env=environment)
        assert second.returncode == 0, second.stdout + second.stderr
    assert [trial["state"] for trial in came_to(folder)] == ["finished"] * 9
    assert len(set(trained(folder))) == len(trained(folder)) == 81


def test_two_trials_share_a_gpu(cluster: LocalCluster, tmp_path: Path) -> None:
    """By --gpus-per-worker 0.5, on a node that declares one; no device is needed to be placed."""
    toy = toy_settings(str(tmp_path), "full", "random")
    need = worker_need(toy.plan.base.run, use_gpu=True, gpus_per_worker=0.5)
    resources = dataclasses.replace(toy, need=need).resources
    with node(cluster, "--num-gpus=1", cpus=4), connected_to(cluster):
        wait_for(lambda: room(need, 1) == 2, "the node")
        groups = [resources() for _ in range(3)]
        wait_for(lambda: len(placed(groups)) == 2, "two of them")
        assert not groups[2].wait(3), "a third has to wait"
        task = ray.remote(num_cpus=need["CPU"], num_gpus=need["GPU"])(ray.get_gpu_ids)
        places = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0) for group in groups[:2]
        ]
        assert ray.get([task.options(scheduling_strategy=place).remote() for place in places]) == [[0], [0]]
        for group in groups:
            ray.util.remove_placement_group(group)


def placed(groups: list[PlacementGroup]) -> list[PlacementGroup]:
    states = ray.util.placement_group_table()
    return [group for group in groups if states[group.id.hex()]["state"] == "CREATED"]


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come in {timeout_s} s"
        time.sleep(0.1)
