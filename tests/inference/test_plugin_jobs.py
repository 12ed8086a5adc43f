"""A user's own position embeddings in the real jobs: trained, resumed, and used elsewhere by trust alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from helpers.commands import Done, run_here
from helpers.hub import TOKEN, stand_in
from helpers.plugins import EXAMPLE, forget

from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits
from lape_ray.inference.checkpoints import open_predictor
from lape_ray.inference.export import write_pyfunc
from lape_ray.inference.serving import _load_pyfunc
from lape_ray.training.checkpoint import read_metadata, weights_sha256
from lape_ray.values.plugin import TRUST

ROOT = Path(__file__).parent.parent.parent
NAMES = ("--model.bias=decay", "--model.join=gated")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for split in ("train", "val"):
        write_beton(digits(split).take(np.arange(160)), folder / f"{split}.beton", workers=1)
    shutil.copy(EXAMPLE, folder / "mine.py")
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPE_RAY_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(home)


def train(name: str, *words: str, plugin: str = "mine.py") -> Done:
    given = [f"--model.plugin={plugin}", *NAMES, f"--run.name={name}", "--run.num_workers=0"]
    data = ["--data.train=train.beton", "--data.val=val.beton", "--tracking.pages=false"]
    return run_here("jobs/imagenet_deit.py", "smoke", *given, *data, *words)


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The checkpoint of a run that stopped after its first of two epochs, and was resumed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPE_RAY_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(home)
        for words in (["--run.stop_after_epochs=1"], []):
            done = train("mine", "--optim.epochs=2", *words)
            assert done.returncode == 0, done.stderr
    return home / "runs/mine/checkpoint-epoch-000002"


def test_a_resumed_run_is_one_that_never_stopped(trained: Path, home: Path) -> None:
    assert train("whole", "--optim.epochs=2").returncode == 0
    whole = home / "runs/whole/checkpoint-epoch-000002"
    assert weights_sha256(whole / "model.safetensors") == weights_sha256(trained / "model.safetensors")


def test_the_text_is_kept_with_the_run(trained: Path, home: Path) -> None:
    text = EXAMPLE.read_text()
    plugin = read_metadata(trained).config.model.plugin
    assert plugin is not None
    assert plugin.text == text
    record = json.loads((home / "runs/mine/run.json").read_text())
    assert record["config"]["model"]["plugin"]["sha256"] == plugin.sha256
    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(record["mlflow_run_id"])
    assert run.data.params["model.plugin"] == f"mine.py@sha256:{plugin.sha256}"
    assert Path(client.download_artifacts(run.info.run_id, "plugin.py")).read_text() == text


def test_a_changed_file_does_not_continue_the_run(trained: Path, home: Path) -> None:
    (home / "changed.py").write_text(EXAMPLE.read_text().replace("0.1", "0.2"))
    done = train("mine", "--optim.epochs=2", plugin="changed.py")
    assert done.returncode == 2
    assert "run 'mine' exists with another config (model.plugin: 'sha256:" in done.stderr


def elsewhere(job: str, *words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a job in a process of its own, in another folder, without the file."""
    command = [sys.executable, str(ROOT / "jobs" / job), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_a_fresh_process_elsewhere_runs_it_by_trust_alone(trained: Path, tmp_path: Path) -> None:
    for folder in (ROOT / "jobs", tmp_path):
        assert not (folder / "mine.py").exists()
    refused = elsewhere("evaluate.py", trained, folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"error: {trained}: its network is made by code that is stored with it, mine.py"
    )
    accuracy = f"160 images  top-1 {read_metadata(trained).metrics['val/acc1']:.3f}"
    assert accuracy in elsewhere("evaluate.py", trained, "--trust-plugin", folder=tmp_path).stdout


def test_the_file_itself_is_trust_where_it_is_the_stored_one(trained: Path, home: Path) -> None:
    accuracy = f"160 images  top-1 {read_metadata(trained).metrics['val/acc1']:.3f}"
    (home / "other.py").write_text(EXAMPLE.read_text() + "# changed\n")
    for words, found in (
        (["--model.plugin=other.py"], "it was trained with mine.py@sha256:"),
        (["--model.plugin=mine.py", "--knn=5"], "5 nearest neighbours: 160 images"),
        (["--model.plugin=mine.py"], accuracy),
    ):
        done = run_here("jobs/evaluate.py", trained, *words)
        assert found in done.stdout + done.stderr


def test_a_text_of_another_python_is_said_to_be_that(trained: Path, tmp_path: Path) -> None:
    """Of a checkpoint that is whole: a copy of it would not help."""
    newer = tmp_path / "newer"
    shutil.copytree(trained, newer)
    meta = json.loads((newer / "meta.json").read_text())
    plugin = meta["config"]["model"]["plugin"]
    plugin |= {"text": plugin["text"] + "match = (", "read_by": "Python 3.99.0, lape_ray 9.0"}
    plugin["sha256"] = hashlib.sha256(plugin["text"].encode()).hexdigest()
    (newer / "meta.json").write_text(json.dumps(meta))
    assert "which is not run unasked" in run_here("jobs/evaluate.py", newer).stderr
    error = run_here("jobs/evaluate.py", newer, "--trust-plugin").stderr
    assert error.startswith(f"error: {newer}: mine.py, line ")
    assert error.endswith("'match = ('; use what it was stored by: Python 3.99.0, lape_ray 9.0\n")


USES = {
    "position_report.py": ["--out=report", "--count=4"],
    "predict.py": ["pictures", "--csv=predictions.csv"],
    "export.py": ["--timm=timm"],
}


@pytest.mark.parametrize("job", USES)
def test_every_use_of_a_checkpoint_has_the_rule(
    job: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "tests/data/photographs", tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    refused = run_here(f"jobs/{job}", trained, *USES[job])
    assert refused.returncode == 2
    assert "which is not run unasked" in refused.stderr
    done = run_here(f"jobs/{job}", trained, *USES[job], "--trust-plugin")
    assert done.returncode == 0, done.stderr
    if job == "position_report.py":
        names = {path.name for path in (tmp_path / "report").iterdir()}
        assert {"matrix.png", "bias_1.png"} & {name.replace(".svg", ".png") for name in names}


def test_a_served_model_is_code_and_runs_its_own(trained: Path, tmp_path: Path) -> None:
    """MLflow runs what an artifact holds, this package among it, and says so."""
    predictor, _ = open_predictor(str(trained), {"model.plugin": TRUST})
    write_pyfunc(predictor, tmp_path)
    forget()
    served = _load_pyfunc(str(tmp_path)).predictor.config.model
    assert (served.join, served.bias) == ("gated", "decay")


def test_a_file_without_this_package_is_not_written_of_it(trained: Path) -> None:
    done = run_here("jobs/export.py", trained, "--backbone=backbone", "--trust-plugin")
    assert "join=gated is not written as a backbone" in done.stderr


def test_an_export_on_the_hub_has_the_rule(
    trained: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(tmp_path / "cache") as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        done = run_here("jobs/export.py", trained, "--hub=me/mine", f"--model.plugin={home / 'mine.py'}")
        assert done.returncode == 0, done.stderr
        files = hub.repos["me/mine"].files
        assert json.loads(files["config.json"])["position"]["plugin"]["name"] == "mine.py"
        assert b"evaluate hf-hub:me/mine --data.val VAL.beton --trust-plugin" in files["README.md"]
        words = ("hf-hub:me/mine", "--data.val=val.beton")
        assert "which is not run unasked" in run_here("jobs/evaluate.py", *words).stderr
        done = run_here("jobs/evaluate.py", *words, "--trust-plugin")
        assert f"160 images  top-1 {read_metadata(trained).metrics['val/acc1']:.3f}" in done.stdout
