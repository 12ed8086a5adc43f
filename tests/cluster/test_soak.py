"""A long run that is hit again and again: it learns what an undisturbed one does, and nothing grows.

SOAK_MINUTES says how long (30), SOAK_REPORT where what it found is written as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median
from typing import Any

import mlflow
import pytest
from helpers import device
from helpers.s3_server import Gateway, gateway
from helpers.service import ROOT, Service, alone, service_on
from helpers.storm import FACTOR, INTERRUPTING, Kill, Pause, Storm, Watch, count_files, pauses
from helpers.tracking_server import TrackingServer, history, tracking_server
from seeds import Recorder

from lape_ray import storage
from lape_ray.cluster.journal import read_journal
from lape_ray.cluster.local import local_cluster
from lape_ray.storage import s3
from lape_ray.training.times import STEPS

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
RUN, BUCKET = "soak", "s3://lape/runs"
EPOCH_STEPS = 20
INTERVAL_STEPS = 10  # between two checkpoints
SHARE = 0.8  # of the time that is left for steps
EPOCHS = round(SHARE * 60 * MINUTES / (EPOCH_STEPS * device.STEP_S))
FIELDS: dict[str, object] = {
    "optim__epochs": EPOCHS,
    "data__batch_size": 8,
    "run__name": RUN,
    "run__num_workers": 2,
    "run__standby_workers": 1,
    "run__storage": BUCKET,
    "run__eval_epochs": 5,
    "run__checkpoint_steps": INTERVAL_STEPS,
    "run__progress_s": 10,
    "run__max_failures": 20,
}
LIMITS = {
    "processes": 2, "bytes": 150e6, "descriptors": 10, "session": 10, "shared memory": 2, "temporary": 5, "cache": 10,
    "checkpoints": 1,
}  # fmt: skip
"""Of growth: what Ray's own processes take for the jobs that they know, and what is on its way at a moment."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, TrackingServer]]:
    """S3 and MLflow, which all processes that are started within find in their environment."""
    with (
        pytest.MonkeyPatch.context() as patch,
        gateway(tmp_path_factory.mktemp("s3")) as bucket,
        tracking_server(tmp_path_factory.mktemp("mlflow")) as tracking,
    ):
        for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_TRACKING"))]:
            patch.delenv(name)
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        s3.client().create_bucket(Bucket="lape")
        yield bucket, tracking


@pytest.fixture(scope="module")
def soaked(
    servers: tuple[Gateway, TrackingServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A cluster that has room for two workers and one that stands by, and a folder of its own for temporary files."""
    home = tmp_path_factory.mktemp("home")
    for name in ("tmp", "device"):
        (home / name).mkdir()
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(home / "tmp"))
            cluster = stack.enter_context(local_cluster(num_cpus=3))
        yield stack.enter_context(service_on(cluster, home))


def submitted(service: Service, tracking: TrackingServer) -> str:
    """Submit the run until it is finished, as its user would; returns all that was printed."""
    words = [f"--{key.replace('__', '.')}={value}" for key, value in FIELDS.items()]
    variables = {"PYTHONPATH": str(ROOT / "tests"), device.FOLDER: str(service.home / "device")}
    submission = service.submission(
        "jobs/imagenet_deit.py", "smoke", *service.data(), *words, "--tracking.pages=false",
        f"--tracking.uri={tracking.uri}", variables=variables, worker_process_setup_hook="helpers.device.install",
    )  # fmt: skip
    printed = ""
    while True:
        with (service.home / "job.log").open("a+") as log:
            start = log.tell()
            code = subprocess.run(**submission, stdout=log, stderr=subprocess.STDOUT).returncode
            log.seek(start)
            output = log.read()
        printed += output
        if (code == 0 and "submit the same command again" not in output) or "is finished already" in output:
            return printed


def session(service: Service) -> Path:
    words = Path(f"/proc/{service.cluster.pid}/cmdline").read_bytes().decode()
    found = re.search(r"--temp-dir=([^\0]+)", words)
    assert found
    return Path(found[1], "session_latest").resolve()


def check_history(uri: str, run_id: str, reference: Recorder) -> None:
    """MLflow has the losses and accuracies of an undisturbed training, each once.

    Steps' losses are equal bit for bit. Means over many of them are sums that each worker rounds for itself.
    """
    losses = history(uri, run_id)
    assert list(losses) == list(range(1, EPOCHS * EPOCH_STEPS + 1))
    assert [loss for loss, _ in losses.values()] == reference.losses
    client = mlflow.MlflowClient(uri)
    for key in {key for epoch in reference.epochs for key in epoch} - {"train/images_per_s", "train/lr"}:
        points = sorted((one.step, one.value) for one in client.get_metric_history(run_id, key))
        wanted = [
            (number * EPOCH_STEPS, epoch[key])
            for number, epoch in enumerate(reference.epochs, 1)
            if key in epoch
        ]
        assert [step for step, _ in points] == [step for step, _ in wanted], key
        assert [value for _, value in points] == pytest.approx([value for _, value in wanted], rel=1e-6), key


def files_by_place(service: Service) -> dict[str, Callable[[], int]]:
    """Counts of the files in places that are to hold no more of them later than at first."""
    folder = session(service)
    return {
        "session": lambda: count_files(folder, but="logs"),
        "shared memory": lambda: count_files(Path("/dev/shm")),
        "temporary": lambda: count_files(service.home / "tmp"),
        "cache": lambda: count_files(service.home / "cache"),
        "checkpoints": lambda: len(storage.folders(f"{BUCKET}/{RUN}")),
    }


def test_pauses_of_kills() -> None:
    """Kills while nothing trains make the pause longer; those that stop nothing, or came too late, make none."""
    kills = [
        Kill("driver", 5, True),  # before the first step
        Kill("s3", 20, True),
        Kill("worker", 21, True),
        Kill("controller", 25, True),
        Kill("driver", 26, False),
        Kill("worker", 50, True),
        Kill("mlflow", 80, True),
        Kill("s3", 90, True),
    ]
    found = pauses(kills, [10.0, 10.1, 30.0, 30.1, 52.0, 85.0])
    assert found == [
        Pause(21, 30.0, ("worker", "controller")),
        Pause(50, 52.0, ("worker",)),
        Pause(80, 85.0, ("mlflow",)),
    ]


@pytest.mark.timeout(round(MINUTES * 180 + 900))
@pytest.mark.slow
@pytest.mark.soak
def test_a_storm_of_kills(soaked: Service, servers: tuple[Gateway, TrackingServer]) -> None:
    bucket, tracking = servers
    storm = Storm(soaked, soaked.home / "device", bucket, tracking)
    watch = Watch(storm, files_by_place(soaked))
    began, load = time.time(), os.getloadavg()[0]
    with ThreadPoolExecutor(2) as threads:
        works = [threads.submit(storm.run), threads.submit(watch.run)]
        try:
            printed = submitted(soaked, tracking)
        finally:
            storm.end()
    wall_s = time.time() - began
    for work in works:
        work.result()

    division = read_journal(f"{BUCKET}/{RUN}").division()
    goodput = division.percent(STEPS)
    report = found(storm, watch, division.wall_s)
    report |= {"minutes": wall_s / 60, "load": (load, os.getloadavg()[0]), "goodput": goodput}
    report |= {"division": division.metrics(), "goodput at the mean": at_factor(goodput, report)}
    print(json.dumps(report, indent=1))
    if path := os.environ.get("SOAK_REPORT"):
        Path(path).write_text(json.dumps(report, indent=1) + "\n")

    run_ids = set(re.findall(r"MLflow run ([0-9a-f]{32})", printed))
    assert len(run_ids) == 1
    run_id = run_ids.pop()
    check_history(tracking.uri, run_id, alone(soaked.config(**FIELDS)))
    logged = mlflow.MlflowClient(tracking.uri).get_run(run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["goodput"] == pytest.approx(goodput, abs=2), "it is logged just before the end"
    assert sum(division.seconds.values()) == pytest.approx(division.wall_s)
    assert division.wall_s == pytest.approx(wall_s, abs=30), "all but the way to the cluster and back"
    assert goodput == pytest.approx(report["expected"], abs=5)
    assert at_factor(goodput, report) >= 70
    for what, most in LIMITS.items():
        assert report["growth"][what] <= most, what


def at_factor(goodput: float, report: dict[str, Any]) -> float:
    """Return goodput in percent as it would be, had the moments been drawn as far apart as they are on average.

    Some dozens of draws have a mean that is off by a fifth or more. What is lost is in proportion to their number.
    """
    drawn = report["mean_between_s"] / report["mean_recovery_s"]
    return 100 - (100 - goodput) * drawn / FACTOR


def found(storm: Storm, watch: Watch, wall_s: float) -> dict[str, Any]:
    """What the kills cost, what the formula makes of that, and what grew."""
    beginnings = device.beginnings(storm.folder)
    trained_s = device.last_step(storm.folder) - beginnings[0]
    stops = pauses(storm.kills, beginnings)
    recovery_s, between_s = fmean(one.seconds for one in stops), trained_s / len(stops)
    formula = 1 - (recovery_s + INTERVAL_STEPS * device.STEP_S / 2) / between_s
    return {
        "kills": Counter(one.kind for one in storm.kills if one.hit),
        "missed": Counter(one.kind for one in storm.kills if not one.hit),
        "pauses": len(stops),
        "pauses by outages alone": sum(not set(one.kinds) & set(INTERRUPTING) for one in stops),
        "recovery_s": {
            kind: {"n": len(each), "median": median(each), "max": max(each)}
            for kind, each in storm.recoveries().items()
        },
        "mean_recovery_s": recovery_s,
        "mean_between_s": between_s,
        "formula": 100 * formula,
        "expected": 100 * formula * trained_s / wall_s,
        "growth": watch.growth(),
    }
