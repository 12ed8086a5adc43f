"""A run whose data, checkpoints and record all lie on S3."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faults import LONG, Strike, contest
from helpers.s3_server import SECRET, Gateway, gateway
from helpers.service import Service, alone, running_service

from lape_ray import storage
from lape_ray.cluster.launch import fit
from lape_ray.storage import s3

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def service(server: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A Ray whose nodes know S3 by their own environment, as pods do."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        with running_service(home) as running:
            s3.client().create_bucket(Bucket="lape")
            for split in ("train", "val"):
                for name in (f"{split}.beton", f"{split}.beton.json"):
                    storage.upload(home / name, f"s3://lape/data/{name}")
            yield running


def test_a_run_that_knows_no_folder(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    """Two workers of one node fetch the data once; the run resumes from S3; its checkpoint is used from there."""
    remote = {f"data__{split}": f"s3://lape/data/{split}.beton" for split in ("train", "val")}
    remote |= {"run__name": "remote", "run__storage": "s3://lape/runs"}
    options = {**remote, "run__num_workers": 2, "optim__epochs": 2}
    fit(service.config(**options, run__stop_after_epochs=1))
    first = "".join(capfd.readouterr())
    assert len(re.findall(r"fetching .* from s3://lape/data/\w+\.beton while", first)) == 2, (
        "once for each split"
    )
    result = fit(service.config(**options))
    second = "".join(capfd.readouterr())
    assert "continuing after epoch 1 of 2" in second
    assert "from s3://lape/data" not in second, "the later run uses the copies"
    assert json.loads(storage.read_text("s3://lape/runs/remote/run.json"))["finished"]
    assert result.checkpoint.startswith("s3://lape/runs/remote/checkpoint-epoch-")
    command = [sys.executable, str(ROOT / "jobs/evaluate.py"), result.checkpoint]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"160 images  top-1 {result.metrics['val/acc1']:.3f}" in done.stdout
    command = [
        sys.executable,
        str(ROOT / "jobs/export.py"),
        result.checkpoint,
        "--timm",
        "s3://lape/exports/timm",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {one.name for one in storage.listing("s3://lape/exports")} == {"model.safetensors", "config.json"}
    assert not (service.home / "runs").exists()


@pytest.mark.faults
def test_storage_that_is_away_for_a_while(
    service: Service, server: Gateway, capfd: pytest.CaptureFixture[str]
) -> None:
    """The training goes on meanwhile; checkpoints are stored again once the server is back."""
    options = {**LONG, "run__storage": "s3://lape/runs"}

    def away() -> None:
        server.kill()
        time.sleep(15)
        server.start()

    def third_epoch_is_stored() -> bool:
        """Or a later one; those within an epoch are left out where the one before is still on its way."""
        names = storage.folders("s3://lape/runs/outage")
        return any(name.startswith("checkpoint-epoch-") and name[17:] >= "000003" for name in names)

    with Strike(third_epoch_is_stored, away).armed():
        result = fit(service.config(run__name="outage", **options))
    output = "".join(capfd.readouterr())
    # Requests alone are patient for a while. Ray Train's controller is not, if it happens to write at that moment.
    assert "continuing after" not in output or "warning: Ray Train's controller failed" in output
    assert service.losses(service.run(result.mlflow_run_id)) == alone(service.config(**LONG)).losses
    assert json.loads(storage.read_text("s3://lape/runs/outage/run.json"))["finished"]


@pytest.mark.faults
@pytest.mark.parametrize("own_ray", [False, True])
def test_two_drivers_in_two_rays_on_one_bucket(service: Service, own_ray: bool) -> None:
    """The second is refused while the first lives, and goes on from its checkpoints when it was killed."""
    folder = f"s3://lape/runs/contested-{own_ray}"
    contest(
        service,
        f"contested-{own_ray}",
        lambda: storage.exists(f"{folder}/checkpoints.json"),
        "--run.storage=s3://lape/runs",
        own_ray=own_ray,
    )
    kept = [name for name in storage.folders(folder) if name.startswith("checkpoint-")]
    assert len(kept) <= 3, "what was superseded is gone: two of the best and the newest are left"


def test_no_secret_is_in_rays_logs(service: Service) -> None:
    """Of a run that was trained; Ray writes the environments that it is given into its logs."""
    words = Path(f"/proc/{service.cluster.pid}/cmdline").read_bytes().decode()
    folder = re.search(r"--temp-dir=([^\0]+)", words)
    assert folder
    logs = [path for path in Path(folder[1]).rglob("*") if path.is_file()]
    assert len(logs) > 10
    with_secret = [path for path in logs if SECRET.encode() in path.read_bytes()]
    assert not with_secret
