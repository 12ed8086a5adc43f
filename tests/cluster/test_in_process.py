"""A run in the command's own process (`run.num_workers 0`): no Ray, and otherwise the same."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from helpers.hub import Repo, stand_in
from helpers.s3_server import Proxy, access, holding
from helpers.service import alone
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from safetensors.torch import save

from lape_ray import storage
from lape_ray.cluster.checkpoint_list import read_list
from lape_ray.cluster.journal import read_journal
from lape_ray.cluster.launch import fit
from lape_ray.cluster.pages import main
from lape_ray.cluster.signals import signals_ask
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits
from lape_ray.model import build_model
from lape_ray.recipes import recipe
from lape_ray.report.goodput import GROUPS
from lape_ray.training import loop
from lape_ray.training.checkpoint import read_metadata, weights_sha256
from lape_ray.training.loop import DivergedError

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent.parent / "golden" / "smoke_losses.json"
WITHOUT_RAY = (
    "import runpy, sys\nsys.modules['ray'] = None\nsys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for split in ("train", "val"):
        source = digits(split)
        write_beton(source.take(np.arange(160)), folder / f"{split}.beton", workers=1)
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPE_RAY_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config(home: Path, **changes: object) -> TrainConfig:
    values = {name.replace("__", "."): value for name, value in changes.items()}
    data: dict[str, object] = {f"data.{s}": str(home / f"{s}.beton") for s in ("train", "val")}
    more = {"run.num_workers": 0, "tracking.pages": False}
    return replace_fields(recipe("smoke"), {**data, **more, **values})


def command(home: Path, *words: str) -> list[str]:
    data = [f"--data.{split}={home / f'{split}.beton'}" for split in ("train", "val")]
    job = [str(ROOT / "jobs/imagenet_deit.py"), "smoke", "--run.num_workers=0", *data, *words]
    return [sys.executable, "-c", WITHOUT_RAY, *job]


def losses(home: Path, run_id: str) -> list[float]:
    history = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}").get_metric_history(run_id, "train/loss")
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def test_a_command_trains_without_ray_and_hands_its_pages_over(home: Path) -> None:
    done = subprocess.run(command(home, "--run.name=pages"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"MLflow run ([0-9a-f]{32})", done.stdout)
    log = re.search(
        r"process \d+ makes the run's pages, which MLflow has soon; its log is (\S+)", done.stdout
    )
    assert found
    assert log
    assert losses(home, found[1]) == alone(config(home)).losses
    deadline = time.monotonic() + 200
    while Path(log[1]).exists():
        assert time.monotonic() < deadline, Path(log[1]).read_text()
        time.sleep(0.5)
    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(found[1]).info.status == "FINISHED"
    names = {
        file.path for kind in ("summary", "position_report") for file in client.list_artifacts(found[1], kind)
    }
    assert {"summary/summary.html", "position_report/position_report.html"} <= names


def test_it_trains_while_its_data_come_from_s3(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The losses are those of local files."""
    objects = {f"data/{file.name}": file.read_bytes() for file in home.glob("*.beton*")}
    with holding(objects) as (url, _):
        proxy = Proxy(int(url.rpartition(":")[2]))
        proxy.rate = 3e5
        for name, value in access(proxy.port, tmp_path).items():
            monkeypatch.setenv(name, value)
        remote = {f"data__{split}": f"s3://b/data/{split}.beton" for split in ("train", "val")}
        result = fit(config(home, run__name="streams", run__log_steps=1, **remote))
        proxy.close()
    assert losses(home, result.mlflow_run_id) == alone(config(home, run__log_steps=1)).losses
    size = sum(map(len, objects.values()))
    assert proxy.received < 1.2 * size, "each byte came once; manifests are read several times"
    said = capfd.readouterr().err
    assert "from s3://b/data/train.beton while training goes on" in said
    # The validation's images came while it read them: both copies are whole, and no process is left.
    assert len(list((tmp_path / "cache").glob("*/.complete"))) == 2
    assert not list((tmp_path / "cache").glob("*/.arriving"))


def test_it_goes_on_where_it_stopped(home: Path) -> None:
    changes = {"run__name": "parts", "optim__epochs": 3}
    first = fit(config(home, **changes, run__stop_after_epochs=1))
    paused = time.time()
    time.sleep(1)
    resumed = time.time()
    second = fit(config(home, **changes))
    ended = time.time()
    assert second.mlflow_run_id == first.mlflow_run_id
    division = read_journal(str(home / "runs/parts")).division()
    assert division.wall_s == pytest.approx(
        ended - division.began, abs=0.5
    )  # where other work delays the end
    assert division.seconds["idle"] >= resumed - paused
    assert division.seconds["load"] > 0
    assert division.seconds["again"] + division.seconds["detect"] < 0.01 * division.wall_s
    logged = mlflow.MlflowClient(second.tracking_uri).get_run(second.mlflow_run_id).data.metrics
    assert sum(logged[name] for name in GROUPS) == pytest.approx(100)
    assert f"\n{second.time}\n" in second.summary()
    whole = fit(config(home, **{**changes, "run__name": "whole"}))
    assert losses(home, second.mlflow_run_id) == losses(home, whole.mlflow_run_id)
    found = [
        weights_sha256(home / f"runs/{name}/checkpoint-epoch-000003/model.safetensors")
        for name in ("parts", "whole")
    ]
    assert found[0] == found[1]


class Interrupted(io.RawIOBase):
    """A standard output to which each write is interrupted by a SIGTERM, until the process would end by it."""

    def writable(self) -> bool:
        return True

    def write(self, line: Any) -> int:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            signal.raise_signal(signal.SIGTERM)
        return len(line)


def test_a_signal_may_come_while_a_line_is_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Interrupted())))
    asked: list[bool] = []
    with signals_ask(lambda: asked.append(True)):
        print("a line", flush=True)
    assert asked == [True]
    assert capfd.readouterr().out.startswith("SIGTERM: the run ends after a checkpoint")


def test_a_run_that_nobody_reads_goes_on_and_stops_with_a_checkpoint(home: Path) -> None:
    """As behind `| head`: neither its lines nor its answer to a signal can be written."""
    words = command(home, "--run.name=unread", "--optim.epochs=400", "--tracking.pages=false")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        for line in process.stdout:
            if line.startswith("epoch   1/400"):
                break
        process.stdout.close()
        process.stderr.close()
        folder, deadline = home / "runs/unread", time.monotonic() + 100
        while max((path.name for path in folder.glob("checkpoint-epoch-*")), default="")[-6:] < "000003":
            assert process.poll() is None, "it ended with the line of epoch 2"
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    record = json.loads((folder / "run.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(record["mlflow_run_id"]).info.status == "KILLED"
    steps = json.loads((folder / "checkpoints.json").read_text())["checkpoints"][-1]["steps_done"]
    assert len(losses(home, record["mlflow_run_id"])) == steps


def test_a_signal_asks_where_nobody_reads() -> None:
    """The handler's own line is none that may fail."""
    code = (
        "import os, signal\nfrom lape_ray.cluster.signals import signals_ask\nasked = []\n"
        "os.close(1)\nwith signals_ask(lambda: asked.append(1)):\n    signal.raise_signal(signal.SIGTERM)\n"
        "os._exit(len(asked))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_costs_no_checkpoint(home: Path, nohup: bool) -> None:
    """The run ends after one, and below nohup it goes on."""
    name = f"closed-{nohup}"
    words = command(
        home, f"--run.name={name}", f"--optim.epochs={8 if nohup else 400}", "--tracking.pages=false"
    )
    terminal, inside = pty.openpty()
    output = subprocess.DEVNULL if nohup else inside
    # These tests may themselves run below nohup.
    words = ["env", "--default-signal=HUP", "setsid", "--ctty", *(["nohup"] if nohup else []), *words]
    with subprocess.Popen(words, stdin=inside, stdout=output, stderr=output) as process:
        os.close(inside)
        folder, deadline = home / "runs" / name, time.monotonic() + 100
        while not list(folder.glob("checkpoint-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.close(terminal)  # with what was printed, which nobody has read
        assert process.wait(timeout=120) == (0 if nohup else 143)
    record = json.loads((folder / "run.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(record["mlflow_run_id"]).info.status == ("FINISHED" if nohup else "KILLED")
    steps = json.loads((folder / "checkpoints.json").read_text())["checkpoints"][-1]["steps_done"]
    assert len(losses(home, record["mlflow_run_id"])) == steps


def test_sigterm_leaves_a_checkpoint_and_the_command_goes_on(home: Path) -> None:
    words = command(home, "--run.name=stopped", "--optim.epochs=400", "--tracking.pages=false")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("epoch   2/400"):
                break
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 143, output + errors
    assert "SIGTERM: the run ends after a checkpoint" in output
    assert "error: stopped after epoch" in errors
    record = json.loads((home / "runs/stopped/run.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(record["mlflow_run_id"]).info.status == "KILLED"
    steps = json.loads((home / "runs/stopped/checkpoints.json").read_text())["checkpoints"][-1]["steps_done"]
    assert len(losses(home, record["mlflow_run_id"])) == steps


def test_what_a_killed_command_lost_is_known(home: Path) -> None:
    """SIGKILL after epochs that its checkpoint holds; the next command tells what it cost."""
    words = command(home, "--run.name=shot", "--optim.epochs=400", "--tracking.pages=false")
    began = time.time()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("epoch   4/400"):
                break
        process.kill()
        process.communicate(timeout=120)
    killed = time.time()
    time.sleep(2)
    again = subprocess.run(
        [*words, "--run.stop_after_epochs=8"], capture_output=True, text=True, timeout=200, check=True
    )
    ended = time.time()
    division = read_journal(str(home / "runs/shot")).division()
    lost = division.seconds
    assert sum(lost.values()) == pytest.approx(division.wall_s)
    assert began < division.began < killed
    assert division.until == pytest.approx(ended, abs=10)
    assert lost["idle"] >= 2
    assert lost["start"] > 0
    assert lost["steps"] > 0
    assert re.search(r"^goodput [\d.]+ % of 0:\d\d:\d\d \(.*init [\d.]+ %.*\)$", again.stdout, re.M)


def test_a_loss_that_diverges_fails_the_run(home: Path) -> None:
    wild = {"optim__lr": 1000, "optim__weight_decay": 1000, "optim__clip_norm": None, "optim__epochs": 20}
    with pytest.raises(DivergedError, match=r"lower optim\.lr"):
        fit(config(home, run__name="diverged", **wild))
    record = json.loads((home / "runs/diverged/run.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(record["mlflow_run_id"]).info.status == "FAILED"


def test_a_gpu_that_is_not_there_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch finds no GPU here: set --run\.device cpu"):
        fit(config(home, run__name="gpu", run__device="gpu"))


def test_pages_that_cannot_be_made_are_said_in_mlflow(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = fit(config(home, run__name="pageless"))
    log = tmp_path / "pages.log"
    log.touch()
    gone = result.checkpoint + "-gone"
    monkeypatch.setattr(sys, "argv", ["pages", str(home / "runs/pageless"), gone, str(log)])
    with pytest.raises((OSError, ValueError), match="gone"):
        main()
    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert "could not be made" in client.get_run(result.mlflow_run_id).data.tags["pages"]
    assert log.exists()


def test_only_images_of_the_models_size_make_a_checkpoint_the_best(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller images are easier here: accuracy falls from epoch to epoch."""
    accuracies = iter((90.0, 80.0, 70.0, 60.0))
    monkeypatch.setattr(
        loop, "_validate", lambda state: {"val/loss": 1.0, "val/acc1": next(accuracies), "val/acc5": 100.0}
    )
    changes = {"run__name": "sizes", "optim__epochs": 4, "data__image_size_schedule": "16:0-2,32:2-4"}
    kept = {"run__keep_checkpoints": 1}
    first = fit(config(home, **changes, **kept, run__stop_after_epochs=1))
    client = mlflow.MlflowClient(first.tracking_uri)
    assert Path(first.checkpoint).name == "checkpoint-epoch-000001"  # the newest, and no best
    assert "best/acc1" not in client.get_run(first.mlflow_run_id).data.metrics
    second = fit(config(home, **changes, **kept))
    assert Path(second.checkpoint).name == "checkpoint-epoch-000003"
    assert client.get_run(second.mlflow_run_id).data.metrics["best/acc1"] == 70
    listed = read_list(str(home / "runs/sizes")) or ()
    assert [(one.name[-1], one.score) for one in listed] == [("3", 70.0), ("4", 60.0)]


def test_a_run_has_few_curves_and_one_listed_model(home: Path) -> None:
    """With all that adds some: the moving average, a teacher, the system's load. MLflow draws each on one page."""
    teacher = fit(config(home, run__name="teacher")).checkpoint
    result = fit(
        config(
            home, run__name="curves", optim__teacher=teacher, optim__ema_decay=0.9,
            model__variant="deit_tiny_distilled", run__log_steps=1,
        )
    )  # fmt: skip
    client = mlflow.MlflowClient(result.tracking_uri)
    run = client.get_run(result.mlflow_run_id)
    names = {name for name in run.data.metrics if not name.startswith("system/")}
    assert {"val_ema/acc1", "best/acc1", "train/step_s"} <= names
    monitor = SystemMetricsMonitor(result.mlflow_run_id, tracking_uri=result.tracking_uri)
    monitor.collect_metrics()  # a run of five steps may end before its own first sample
    of_the_system = {name for name in monitor.aggregate_metrics() if not name.startswith("gpu_")}
    assert "cpu_utilization_percentage" in of_the_system
    assert len(names) + len(of_the_system) <= 40, sorted(names | of_the_system)
    (model,) = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{result.mlflow_run_id}'"
    )
    assert model.tags["checkpoint"] == result.checkpoint
    assert model.params["variant"] == "deit_tiny_distilled"
    assert {one.key: one.value for one in model.metrics}["best/acc1"] == run.data.metrics["best/acc1"]


def test_a_run_starts_from_the_hub_and_not_from_others_of_that_name(home: Path, tmp_path: Path) -> None:
    weights = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        weights[seed] = save(build_model(recipe("smoke").model).state_dict())
    with stand_in(tmp_path / "cache") as hub:
        hub.repos["me/weights"] = Repo(files={"model.safetensors": weights[0]})
        changes = {"run__name": "from-hub", "training__init_from": "hf-hub:me/weights", "optim__epochs": 2}
        first = fit(config(home, **changes, run__stop_after_epochs=1))
        assert read_metadata(Path(first.checkpoint)).config.training.init_from == "hf-hub:me/weights"
        hub.repos["me/weights"].files["model.safetensors"] = weights[1]
        storage.hub._fetch.cache_clear()  # as in another process
        with pytest.raises(ValueError, match=r"training\.init_from had sha256 \w{12} and has \w{12}"):
            fit(config(home, **changes))
        hub.repos["me/weights"].files["model.safetensors"] = weights[0]
        storage.hub._fetch.cache_clear()
        assert fit(config(home, **changes)).checkpoint.endswith(("000001", "000002"))
