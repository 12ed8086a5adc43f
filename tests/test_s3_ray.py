"""A run whose data, checkpoints and record all lie on S3, submitted as its users submit it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest
from faults import LONG, Strike
from s3_server import SECRET, Gateway, gateway

from lape_ray import storage
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select
from lape_ray.local_cluster import LocalCluster, executable, local_cluster
from lape_ray.storage import s3

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


class Remote(NamedTuple):
    """A Ray, a home for its MLflow, and the S3 server that holds all else."""

    ray: LocalCluster
    home: Path
    server: Gateway


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """A Ray whose nodes know S3 by their own environment, as pods do."""
    home = tmp_path_factory.mktemp("home")
    with gateway(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        prepare(patch, server, home)
        with local_cluster(num_cpus=2) as running:
            yield Remote(running, home, server)


def prepare(patch: pytest.MonkeyPatch, server: Gateway, home: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name, value in {**server.environment, "LAPE_RAY_HOME": str(home)}.items():
        patch.setenv(name, value)
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    s3.client().create_bucket(Bucket="lape")
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:16"), home / "data" / f"{split}.beton", workers=1)
    storage.upload_folder(home / "data", "s3://lape/data", last=".json")


def submit(cluster: LocalCluster, *words: str) -> str:
    command = [
        executable("ray"),
        "job",
        "submit",
        f"--address={cluster.dashboard}",
        f"--working-dir={ROOT}",
        "--",
    ]
    words = (
        "python",
        "jobs/imagenet_deit.py",
        "smoke",
        "--run.storage=s3://lape/runs",
        "--run.pages=false",
        *words,
    )
    data = [f"--data.{split}=s3://lape/data/{split}.beton" for split in ("train", "val")]
    done = subprocess.run(
        [*command, *words, *data], capture_output=True, text=True, env={**os.environ, **cluster.environment}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_a_run_that_knows_no_folder(cluster: Remote) -> None:
    """Two workers of one node fetch the data once; the run resumes from S3; its checkpoint is used from there."""
    ray, home, _ = cluster
    options = ("--run.name=remote", "--run.num_workers=2", "--optim.epochs=2")
    first = submit(ray, *options, "--run.stop_after_epochs=1")
    assert len(re.findall(r"fetching 2 objects .* from s3://lape/data", first)) == 2, "once for each split"
    second = submit(ray, *options)
    assert "continuing after epoch 1 of 2" in second
    assert "fetching" not in second, "the later run uses the copies"
    assert json.loads(storage.read_text("s3://lape/runs/remote/run.json"))["finished"]
    found = re.search(r"best checkpoint: (s3://\S+)", second)
    assert found
    accuracy = re.search(r"val/acc1 ([\d.]+)", second)
    assert accuracy
    command = [sys.executable, str(ROOT / "jobs/evaluate.py"), found[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"160 images  top-1 {float(accuracy[1]):.2f}" in done.stdout
    command = [sys.executable, str(ROOT / "jobs/export.py"), found[1], "--timm", "s3://lape/exports/timm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {one.name for one in storage.listing("s3://lape/exports")} == {"model.safetensors", "config.json"}
    assert not (home / "runs").exists()


def losses(cluster: Remote, output: str) -> dict[int, float]:
    found = re.search(r"MLflow run ([0-9a-f]{32})", output)
    assert found, output
    client = mlflow.MlflowClient(f"sqlite:///{cluster.home / 'mlflow.db'}")
    points = client.get_metric_history(found[1], "train/loss")
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


@pytest.mark.slow
@pytest.mark.faults
def test_storage_that_is_away_for_a_while(cluster: Remote) -> None:
    """The training goes on meanwhile; checkpoints are stored again once the server is back."""
    options = [f"--{name.replace('__', '.')}={value}" for name, value in LONG.items()]
    whole = losses(cluster, submit(cluster.ray, "--run.name=quiet", *options))

    def away() -> None:
        cluster.server.stop()
        time.sleep(15)
        cluster.server.start()

    strike = Strike(lambda: storage.exists("s3://lape/runs/outage/checkpoint-step-000000013/meta.json"), away)
    with strike.armed():
        output = submit(cluster.ray, "--run.name=outage", *options)
    assert "warning: storage fails, trying again for 300 s" in output
    assert "continuing after" not in output, "no worker had to begin again"
    assert losses(cluster, output) == whole
    assert json.loads(storage.read_text("s3://lape/runs/outage/run.json"))["finished"]


def test_no_secret_is_in_rays_logs(cluster: Remote) -> None:
    """Of a run that was trained; Ray writes the environments that it is given into its logs."""
    ray = cluster.ray
    environment = Path(f"/proc/{ray.pid}/cmdline").read_bytes().decode()
    folder = re.search(r"--temp-dir=([^\0]+)", environment)
    assert folder
    logs = [path for path in Path(folder[1]).rglob("*") if path.is_file()]
    assert len(logs) > 10
    with_secret = [path for path in logs if SECRET.encode() in path.read_bytes()]
    assert not with_secret
