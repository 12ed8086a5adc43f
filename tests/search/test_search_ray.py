"""Searches on a cluster of the test's own: killed and continued, losers stopped, clones, dying workers."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
import pytest
import ray
from helpers.service import ROOT, Service, alone
from ray import tune
from ray.util.state import list_actors

from lape_ray import storage
from lape_ray.config import replace_fields
from lape_ray.search.checkpoints import History, TrialFolder
from lape_ray.search.command import plan_of
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial, trial_folder
from lape_ray.search.run import search
from lape_ray.search.trial import LapeTrial
from lape_ray.search.trials import analysis, read_trials
from lape_ray.storage import LeaseHeldError, leased
from lape_ray.training.checkpoint import read_metadata

pytestmark = [pytest.mark.timeout(1200), pytest.mark.cluster]


def plan(service: Service, **given: object) -> Plan:
    overrides = {f"data.{split}": str(service.home / f"{split}.beton") for split in ("train", "val")}
    overrides |= given.pop("overrides", {})  # type: ignore[arg-type]
    return plan_of(**{"space": "free", "recipe": "smoke", **given, "overrides": overrides})  # type: ignore[arg-type]


def learned(trials: list[Trial]) -> list[tuple[object, ...]]:
    """What must not depend on when and where a trial was trained: all of its metrics but the speed."""
    return [
        (
            trial.label,
            trial.seed,
            trial.state,
            [
                {name: v for name, v in one.metrics.items() if "images_per_s" not in name}
                for one in trial.epochs
            ],
        )
        for trial in trials
    ]


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come in {timeout_s} s"
        time.sleep(0.1)


def processes(service: Service, name: str = "WorkerProcess|LapeTrial") -> list[psutil.Process]:
    """The processes of trials: their leaders and workers."""
    found = []
    for process in psutil.Process(service.cluster.pid).children(recursive=True):
        try:
            if re.search(name, " ".join(process.cmdline())):
                found.append(process)
        except psutil.Error:  # gone in between
            continue
    return found


OF_RAY = {"JobSupervisor", "_AutoscalingCoordinatorActor", "TrainStateActor"}
"""Actors that Ray keeps by itself: for a submitted job, and after the first run of Ray Train on a cluster."""


def assert_nothing_is_left(service: Service) -> None:
    """No process, no actor, no placement group, and every CPU is free again."""
    wait_for(lambda: not processes(service), "the end of the workers")
    wait_for(lambda: ray.available_resources().get("CPU") == 2, "both CPUs")
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}
    alive = list_actors(service.cluster.dashboard, filters=[("state", "!=", "DEAD")])
    assert not {actor.class_name for actor in alive} - OF_RAY


def stored(service: Service, name: str) -> list[int]:
    """Epochs that trials of a search have stored; it may be at work."""
    found = []
    for folder in sorted((service.home / "runs" / name).glob("trial-*")):
        with contextlib.suppress(OSError, ValueError):
            newest = max(folder.glob("checkpoint-*/history.json"))
            found.append(len(json.loads(newest.read_text())["epochs"]))
    return found


def test_a_second_driver_is_refused(service: Service) -> None:
    """Before it has touched anything, also where it was told to overwrite."""
    folder = service.home / "runs/taken"
    with leased(str(folder), "search taken"):
        before = {path.name for path in folder.iterdir()}
        for overwrite in (False, True):
            words = {"run.name": "taken", "run.overwrite": overwrite}
            with pytest.raises(LeaseHeldError, match="runs/taken belongs to process"):
                search(plan(service, axes=["optim.lr=choice(1e-3)"], overrides=words))
        assert {path.name for path in folder.iterdir()} == before


# --- killed and continued -------------------------------------------------------------------------------------

WORDS = ["joins", "smoke", "--seeds=2", "--optim.epochs=2"]
FIXED = {"model.position": "sincos1d", "optim.epochs": 2}


@pytest.fixture(scope="module")
def submitted(service: Service) -> subprocess.CompletedProcess[str]:
    words = [*WORDS, "--model.position=sincos1d", *service.data(), "--run.name=undisturbed"]
    return service.submit_job("jobs/tune_position.py", *words)


def undisturbed(service: Service) -> list[Trial]:
    return read_trials(str(service.home / "runs/undisturbed"))


def test_a_submitted_search_ends_with_its_table_and_report(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    output = submitted.stdout
    assert submitted.returncode == 0, output[-3000:] + submitted.stderr[-3000:]
    assert "8 trials, 2 at a time; each 1 worker with 1 CPU" in output
    assert re.search(r"trial 0003  lape_shared seed 0  epoch 2/2  val/acc1 [\d.]+  ETA \d:\d\d:\d\d", output)
    assert re.search(r"trial 0007  lape_shared seed 1  finished after .*\(\d of 8 trials\)", output)
    assert re.search(r"(basic|share|lape|lape_shared) came out best: [\d.]+ % over 2 seeds\.", output)
    assert "train the best: python jobs/imagenet_deit.py smoke" in output
    page = service.home / "runs/undisturbed/report/search.html"
    assert f"report: {page}" in output
    assert "Learning curves" in page.read_text()
    trials = list(csv.DictReader((page.parent / "trials.csv").open()))
    assert [trial["state"] for trial in trials] == ["finished"] * 8
    assert_nothing_is_left(service)


def test_a_warm_worker_trains_as_a_fresh_process_would(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    """The sixth trial of the search, in a process that has trained others before it."""
    trial = undisturbed(service)[6]
    given = plan(service, space="joins", seeds=2, overrides=FIXED)
    config = given.config(trial)
    assert (config.model.join, config.training.seed) == ("lape", 1)
    expected = [
        {name: value for name, value in metrics.items() if "images_per_s" not in name}
        for metrics in alone(config).epochs
    ]
    assert learned([trial])[0][3] == expected


def test_trials_follow_each_other_in_no_time_in_the_same_processes(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    results = tune.Tuner.restore(str(service.home / "runs/undisturbed"), LapeTrial).get_results()
    assert not results.errors
    found = [result.metrics for result in results if result.metrics]
    assert len(found) == 8
    assert len({metrics["pid"] for metrics in found}) == 2, "two leaders, warm from trial to trial"
    gaps = sorted(metrics["first_idle_s"] for metrics in found)
    assert gaps[4] < 0.2, f"all but the first trials of both, with room for a busy machine: {gaps}"


def test_results_open_in_rays_ways(service: Service, submitted: subprocess.CompletedProcess[str]) -> None:
    results = tune.Tuner.restore(str(service.home / "runs/undisturbed"), LapeTrial).get_results()
    best = results.get_best_result()
    trial = max(undisturbed(service), key=lambda trial: trial.last("val/acc1") or 0)
    assert best.metrics is not None
    assert best.metrics["val/acc1"] == trial.last("val/acc1")
    assert best.metrics["epoch"] == 2
    with storage.opened(best.metrics["checkpoint"]) as folder:
        assert read_metadata(folder).epochs_done in (1, 2)
    frame = analysis(str(service.home / "runs/undisturbed")).results_df
    assert len(frame) == 8
    assert set(frame["config/values/model.join"]) == {"basic", "share", "lape", "lape_shared"}


def test_mlflow_holds_parent_and_children(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    client = mlflow.MlflowClient(service.uri)
    parent = service.run_of(submitted.stdout)
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert len(children) == 8
    assert {child.info.status for child in children} == {"FINISHED"}
    assert {(child.data.tags["join"], child.data.tags["seed"]) for child in children} == {
        (join, seed) for join in ("basic", "share", "lape", "lape_shared") for seed in "01"
    }
    trials = {trial.run_id: trial for trial in undisturbed(service)}
    for child in children:
        history = client.get_metric_history(child.info.run_id, "val/acc1")
        expected = [one.metrics["val/acc1"] for one in trials[child.info.run_id].epochs]
        assert [point.value for point in sorted(history, key=lambda point: point.step)] == expected
        assert child.data.params["optim.epochs"] == "2"
    names = {file.path for file in client.list_artifacts(parent.info.run_id, "search")}
    assert {
        f"search/{name}" for name in ("search.html", "table.md", "cells.csv", "trials.csv", "cells.svg")
    } <= names
    assert parent.data.tags["best_command"].startswith("python jobs/imagenet_deit.py smoke")


@pytest.mark.slow
def test_a_killed_search_continues_to_what_an_undisturbed_one_gives(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    """SIGKILL of the driver in the midst of its trials; the same command goes on, and trains nothing again."""
    words = [*WORDS, "--model.position=sincos1d", *service.data(), "--run.name=killed"]
    command = [sys.executable, str(ROOT / "jobs/tune_position.py"), *words]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def three_are_over() -> bool:
        assert first.poll() is None, first.communicate()[0][-3000:]
        return sum(epochs == 2 for epochs in stored(service, "killed")) >= 3

    try:
        wait_for(three_are_over, "the end of three trials", timeout_s=600)
    finally:
        first.kill()
        first.communicate()
    wait_for(lambda: not processes(service), "the end of the killed driver's workers")
    times = {
        file: file.stat().st_mtime_ns
        for file in (service.home / "runs/killed").glob("trial-*/*/history.json")
    }
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert re.search(r"continuing it, \d of 8 trials are over", second.stdout)
    after = read_trials(str(service.home / "runs/killed"))
    assert learned(after) == learned(undisturbed(service))
    assert not [file for file, time in times.items() if file.exists() and file.stat().st_mtime_ns != time]
    client = mlflow.MlflowClient(service.uri)
    for trial in after:
        history = client.get_metric_history(trial.run_id, "val/acc1")
        assert len({point.step for point in history}) == len(history) == 2
    parent = service.run_of(second.stdout)
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {child.info.run_id for child in children} == {trial.run_id for trial in after}
    assert len(children) == 8
    third = subprocess.run(command, capture_output=True, text=True)  # finished: shows what is there
    assert third.returncode == 0
    assert second.stdout[second.stdout.index("cell ") :] == third.stdout[third.stdout.index("cell ") :]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_search_that_is_asked_to_end_leaves_checkpoints_within_epochs(
    service: Service, number: signal.Signals
) -> None:
    """As a run does: with exit code 143, and what it had trained of an epoch is not trained again."""
    name = f"asked-{number.name}"
    words = ["free", "smoke", "--space=optim.lr=choice(1e-3,5e-4)", *service.data(), f"--run.name={name}"]
    words += ["--optim.epochs=100", "--run.log_steps=1"]
    command = [sys.executable, str(ROOT / "jobs/tune_position.py"), *words]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def both_train() -> bool:
        assert driver.poll() is None, driver.communicate()[0][-3000:]
        return len(stored(service, name)) == 2

    try:
        wait_for(both_train, "an epoch of both", timeout_s=600)
        driver.send_signal(number)
        output, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 143, output[-3000:]
    assert "ends after a checkpoint" in output
    for folder in (service.home / "runs" / name).glob("trial-*"):
        newest = read_metadata(max(folder.glob("checkpoint-*")))
        assert newest.progress.step or not newest.steps_done % 5
    assert_nothing_is_left(service)
    trials = read_trials(str(service.home / "runs" / name)) or []
    assert not any(trial.over for trial in trials)
    assert {service.run(trial.run_id).info.status for trial in trials if trial.run_id} <= {"KILLED"}


# --- schedules ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_asha_stops_losers_and_a_failing_trial_is_shown(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    """One trial at a time, so that it is known which come to a rung first."""
    given = plan(
        service,
        axes=["data.rand_augment=choice(none,rand-m5-mstd0.5-inc1,bogus)", "optim.lr=choice(1e-3,1e-7)"],
        schedule="asha",
        metric="val/loss",
        eta=2,
        overrides={"optim.epochs": 4, "run.name": "asha"},
    )
    found = search(given, concurrent=1)
    states = {trial.label: (trial.state, trial.done) for trial in found.trials}
    assert states["rand_augment=none lr=0.001"] == ("finished", 4)
    assert states["rand_augment=none lr=1e-07"] == ("stopped", 1)
    for trial in found.trials[4:]:
        assert (trial.state, trial.done) == ("failed", 0)
        assert trial.error.startswith("ValueError: ")
        assert "bogus" in trial.error
        assert trial.crashes == 0, "what would happen again is not tried again"
        run = service.run(trial.run_id)
        assert run.info.status == "FAILED"
        assert "bogus" in run.data.tags["error"]
    output = capfd.readouterr().out
    assert re.search(
        r"trial 0001 .* epoch 1/4  val/loss [\d.]+  stopped: among the worse of its rung", output
    )
    assert re.search(r"trial 0004 .* FAILED: ValueError: .*bogus", output)
    assert "bogus" in Path(found.page).read_text()
    assert service.run(found.trials[1].run_id).data.tags["state"] == "stopped"
    assert_nothing_is_left(service)


@pytest.mark.slow
def test_workers_that_wait_for_one_which_failed_are_replaced(service: Service) -> None:
    """The second trial trains, in the processes that took their place."""
    given = plan(
        service,
        axes=["data.rand_augment=choice(bogus,none)"],
        overrides={"optim.epochs": 1, "run.num_workers": 2, "run.name": "both"},
    )
    assert [(trial.state, trial.crashes) for trial in search(given).trials] == [
        ("failed", 0),
        ("finished", 0),
    ]
    assert_nothing_is_left(service)


@pytest.mark.slow
def test_pbt_clones_the_weights_of_the_best(service: Service) -> None:
    """A clone's next epoch is what its source's weights give under the clone's own settings."""
    given = plan(
        service,
        axes=["optim.lr=choice(1e-3,3e-4,1e-4,1e-7)", "optim.weight_decay=uniform(0.01,0.2)"],
        schedule="pbt",
        eta=4,
        trials=8,
        overrides={"optim.epochs": 2, "run.name": "pbt"},
    )
    found = search(given)
    clones = [trial for trial in found.trials if trial.lineage]
    assert len(clones) == 2
    for trial in clones:
        clone = trial.lineage[0]
        source = TrialFolder(trial_folder(found.folder, clone.source))
        name = "checkpoint-000000005"
        weights = json.loads((Path(source.address(name)) / "meta.json").read_text())["files"]
        assert trial.loaded == [
            {"epoch": 1, "source": clone.source, "weights": weights["model.safetensors"]["sha256"]}
        ]
        copied, config = TrialFolder(str(service.home / f"by-hand-{trial.id}")), found.plan.config(trial)
        kept, _ = copied.clone(source, config, History(lineage=((1, clone.source),)))
        expected = alone(config, Path(copied.address(kept))).epochs[0]
        assert trial.epochs[1].metrics["val/loss"] == expected["val/loss"]
        assert trial.epochs[1].metrics["val/loss"] != trial.epochs[0].metrics["val/loss"]


# --- workers that die -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["WorkerProcess", "LapeTrial"])
def test_a_distributed_trial_survives_its_processes(
    service: Service, capfd: pytest.CaptureFixture[str], victim: str
) -> None:
    """SIGKILL of a worker or of their leader in the second of three epochs; two workers learn what one does."""
    given = plan(
        service,
        axes=["optim.lr=choice(1e-3,5e-4)"],
        overrides={
            "optim.epochs": 3,
            "run.num_workers": 2,
            "run.name": "dying",
            "run.timeout_s": 60,
            "run.overwrite": True,
        },
    )
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: 1 in stored(service, "dying"), "an epoch", timeout_s=600)
        process = processes(service, victim)[0]
        process.kill()
        killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = search(given)
    thread.join(1)
    assert len(killed) == 1
    assert sum(trial.crashes for trial in found.trials) == 1
    assert [trial.state for trial in found.trials] == ["finished"] * 2
    assert "goes on from its newest checkpoint, as it was interrupted: " in capfd.readouterr().out
    for trial in found.trials:
        config = replace_fields(found.plan.config(trial), {"run.num_workers": 1})
        expected = [metrics["val/loss"] for metrics in alone(config).epochs]
        assert [one.metrics["val/loss"] for one in trial.epochs] == pytest.approx(expected, rel=1e-4)
    assert_nothing_is_left(service)


def test_what_the_cluster_cannot_hold_is_refused(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    lr = ["optim.lr=choice(1e-3,5e-4)"]
    with pytest.raises(
        ValueError, match=r"a trial needs 3 CPU, but the cluster has 2 CPU: lower --run\.num_workers"
    ):
        search(plan(service, axes=lr, overrides={"run.cpus_per_worker": 3, "run.wait_s": 0}))
    with pytest.raises(ValueError, match=r"--concurrent 3 is more than fits: .* which is room for 2"):
        search(plan(service, axes=lr, overrides={"run.wait_s": 0}), concurrent=3)
    with pytest.raises(ValueError, match=r"exists with another definition \(seeds: \[0, 1\] -> \[0\]\)"):
        search(plan(service, space="joins", overrides={**FIXED, "run.name": "undisturbed"}))
    assert os.environ["LAPE_RAY_HOME"] == str(service.home)
