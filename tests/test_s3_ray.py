"""A run whose data, checkpoints and record all lie on S3, submitted as its users submit it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import SECRET, Gateway, gateway

from lape_ray import storage
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select
from lape_ray.local_cluster import LocalCluster, executable, local_cluster
from lape_ray.storage import s3

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalCluster, Path]]:
    """A Ray whose nodes know S3 by their own environment, as pods do."""
    home = tmp_path_factory.mktemp("home")
    with gateway(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        prepare(patch, server, home)
        with local_cluster(num_cpus=2) as running:
            yield running, home


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


def test_a_run_that_knows_no_folder(cluster: tuple[LocalCluster, Path]) -> None:
    """Two workers of one node fetch the data once; the run resumes from S3; its checkpoint is used from there."""
    ray, home = cluster
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


def test_no_secret_is_in_rays_logs(cluster: tuple[LocalCluster, Path]) -> None:
    """Of a run that was trained; Ray writes the environments that it is given into its logs."""
    ray, _ = cluster
    environment = Path(f"/proc/{ray.pid}/cmdline").read_bytes().decode()
    folder = re.search(r"--temp-dir=([^\0]+)", environment)
    assert folder
    logs = [path for path in Path(folder[1]).rglob("*") if path.is_file()]
    assert len(logs) > 10
    with_secret = [path for path in logs if SECRET.encode() in path.read_bytes()]
    assert not with_secret
