"""The service as its users run it: `ray job submit` of the real jobs, on a cluster of the test's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import ray
from helpers.commands import run_here
from helpers.service import Service, alone
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lape_ray.cluster import rendezvous
from lape_ray.cluster.launch import fit
from lape_ray.data.beton import check_beton, write_beton
from lape_ray.data.sources import digits
from lape_ray.storage import leased
from lape_ray.tracking import ui_view
from lape_ray.training.loop import DivergedError

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent.parent / "golden" / "smoke_losses.json"

pytestmark = [pytest.mark.timeout(600), pytest.mark.cluster]


@pytest.fixture(scope="module")
def submitted(service: Service) -> subprocess.CompletedProcess[str]:
    return service.submit("smoke", "--run.name=one", "--tracking.position_report_epochs=1")


def test_a_submitted_job_gives_the_golden_losses(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    """Set UPDATE_GOLDEN=1 to write them anew; a change of these numbers is a change of what is learned."""
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    losses = service.losses(service.run_of(submitted.stdout))
    assert len(losses) == 5
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-4)


def test_the_log_says_what_happened(submitted: subprocess.CompletedProcess[str]) -> None:
    lines = submitted.stdout
    assert re.search(r"epoch 1/1  step 5/5  loss \d\.\d{4}  lr \S+  [\d,]+ images/s  ETA 0:00:00", lines)
    assert re.search(r"epoch 1/1 done  val loss \d\.\d{4}  top-1 [\d.]+  ema [\d.]+  top-5 [\d.]+", lines)
    assert "run one finished: val/acc1" in lines
    assert len(re.findall("step 5/5", lines)) == 1, "every line once"


def test_mlflow_holds_the_run(service: Service, submitted: subprocess.CompletedProcess[str]) -> None:
    run = service.run_of(submitted.stdout)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert run.data.params["model.join"] == "lape"
    assert run.data.tags["join"] == "lape"
    assert "jobs/imagenet_deit.py --data.train=" in run.data.tags["mlflow.note.content"]
    assert {"val/acc1", "val_ema/acc1", "train/lr", "best/acc1", "system/cpu_utilization_percentage"} <= set(
        run.data.metrics
    )
    client = mlflow.MlflowClient(service.uri)
    names = {file.path for file in client.list_artifacts(run.info.run_id, "model")}
    assert names == {"model/model.safetensors", "model/ema.safetensors", "model/meta.json"}
    folder = Path(client.download_artifacts(run.info.run_id, "model"))
    assert "head.weight" in load_file(folder / "model.safetensors")
    assert "model.join = 'lape'" in Path(client.download_artifacts(run.info.run_id, "config.txt")).read_text()


def test_the_log_is_free_of_what_a_user_can_do_nothing_about(
    submitted: subprocess.CompletedProcess[str],
) -> None:
    assert not re.search("Traceback|Deprecat", submitted.stdout + submitted.stderr)


def test_a_finished_name_is_not_reused_silently(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    with pytest.raises(ValueError, match=r"run 'one' is finished already; choose another --run\.name"):
        fit(service.config(run__name="one"))
    with pytest.raises(
        ValueError, match=r"another config \(optim\.lr: 0\.001 -> 0\.5\); choose another --run\.name"
    ):
        fit(service.config(run__name="one", optim__lr=0.5))


def test_a_name_does_not_go_on_with_other_data(
    service: Service, submitted: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    other = str(tmp_path / "train.beton")
    write_beton(digits("train").take(np.arange(160)), other, workers=1)
    with pytest.raises(
        ValueError, match=r"run 'one' exists with other files .*data\.train had sha256 \w+ and has"
    ):
        fit(service.config(run__name="one", data__train=other))


def test_a_relative_store_is_the_drivers(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fit(service.config(run__name="relative", tracking__uri="sqlite:///here.db"))
    assert result.tracked
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/here.db")
    assert client.get_run(result.mlflow_run_id).info.status == "FINISHED"
    assert len(client.get_metric_history(result.mlflow_run_id, "train/loss")) == 5


def test_evaluate_agrees_with_the_run(service: Service, submitted: subprocess.CompletedProcess[str]) -> None:
    found = re.search(r"best checkpoint: (\S+)", submitted.stdout)
    assert found
    done = run_here("jobs/evaluate.py", found[1])
    assert done.returncode == 0, done.stderr
    run = service.run_of(submitted.stdout)
    assert f"160 images  top-1 {run.data.metrics['val/acc1']:.3f}" in done.stdout
    mixed = run_here("jobs/evaluate.py", found[1], "--model.join=basic")
    assert mixed.returncode == 2
    assert f"error: {found[1]}: the checkpoint is of another model: unknown join.norms.0" in mixed.stderr


def test_two_workers_and_a_run_that_resumes_before_a_damaged_checkpoint(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two workers stop after an epoch; the same name continues, in the same MLflow run, as if never stopped."""
    changes = {"run__name": "parts", "run__num_workers": 2, "optim__epochs": 2}
    changes |= {
        "run__checkpoint_steps": 2,
        "run__log_steps": 1,
        "tracking__tensorboard": str(service.home / "logs"),
    }
    first = fit(service.config(**changes, run__stop_after_epochs=1))
    weights = service.home / "runs/parts/checkpoint-epoch-000001/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    second = fit(service.config(**changes))
    output = capfd.readouterr().out
    assert "run parts exists and is not finished: continuing it" in output
    assert "warning: a checkpoint cannot be used, trying the one before" in output
    assert re.search("continuing after epoch 0 of 2 and step [24] of 5", output)
    assert second.mlflow_run_id == first.mlflow_run_id
    run, expected = service.run(second.mlflow_run_id), alone(service.config(**changes))
    assert run.info.status == "FINISHED"
    assert service.losses(run) == pytest.approx(expected.losses, rel=1e-4)
    assert second.metrics["val/acc1"] == expected.epochs[-1]["val/acc1"]
    names = {path.name for path in weights.parent.parent.iterdir() if "checkpoint-" in path.name}
    assert names & {"checkpoint-epoch-000001-2", "checkpoint-epoch-000002"}
    events = EventAccumulator(str(service.home / "logs" / f"parts-{second.mlflow_run_id[:8]}"))
    events.Reload()
    for name in ("train/loss", "train/lr", "val/acc1"):
        points = mlflow.MlflowClient(service.uri).get_metric_history(second.mlflow_run_id, name)
        assert [one.step for one in events.Scalars(name)] == sorted(one.step for one in points)
    assert [one.value for one in events.Scalars("train/loss")] == pytest.approx(service.losses(run))


def test_a_run_in_the_drivers_process_learns_the_same_and_goes_on_with_a_worker(service: Service) -> None:
    changes = {"run__name": "home", "optim__epochs": 2}
    begun = fit(service.config(**changes, run__num_workers=0, run__stop_after_epochs=1))
    ended = fit(service.config(**changes))
    assert ended.mlflow_run_id == begun.mlflow_run_id
    assert service.losses(service.run(ended.mlflow_run_id)) == alone(service.config(**changes)).losses


def test_two_drivers_of_one_run(service: Service) -> None:
    """The second is refused before it has touched anything, also where it was told to overwrite."""
    folder = service.home / "runs/alone"
    with leased(str(folder), "run alone"):
        before = {path.name for path in folder.iterdir()}
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"runs/alone belongs to process \d+ on .* at work there"):
                fit(service.config(run__name="alone", run__overwrite=overwrite))
        assert {path.name for path in folder.iterdir()} == before


def test_a_failed_run_is_marked_failed(service: Service) -> None:
    wild = {"optim__lr": 1000, "optim__weight_decay": 1000, "optim__clip_norm": None, "optim__epochs": 20}
    with pytest.raises(
        DivergedError, match=r"lower optim\.lr"
    ):  # and is not tried again: it would diverge again
        fit(service.config(run__name="diverged", run__max_failures=3, **wild))
    record = json.loads((service.home / "runs/diverged/run.json").read_text())
    assert not record["finished"]
    assert service.run(record["mlflow_run_id"]).info.status == "FAILED"


BAD = [
    ({"model__num_classes": 7}, "has 10 classes, the model 7: set --model.num_classes 10"),
    ({"model__image_size": 64}, "images of at most 32 px, but the model reads 64"),
    ({"data__batch_size": 500}, "holds 160 images, less than one step of data.batch_size=500"),
    ({"data__val": "/nowhere.beton"}, "/nowhere.beton"),
    ({"data__val": ""}, "no val data: data.val is empty; give --data.val FILE.beton"),
    (
        {"run__num_workers": 4, "run__wait_s": 0},
        "needs 4 CPU, but the cluster has 2 CPU: lower --run.num_workers",
    ),
    ({"tracking__uri": "http://127.0.0.1:9"}, "the MLflow server 'http://127.0.0.1:9' cannot be used"),
    ({"run__storage": "/proc/nowhere"}, "storage '/proc/nowhere' is not writable"),
    ({"training__init_from": "/nowhere.pth"}, "checkpoint /nowhere.pth does not exist"),
    ({"model__position": "none"}, "position=none has nothing to join"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(changes)) for changes, _ in BAD])
def test_bad_input_is_refused_before_any_worker(
    service: Service, changes: dict[str, object], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        fit(service.config(**changes))


def test_a_truncated_beton_is_one_line_and_exit_code_2(service: Service) -> None:
    torn = service.home / "torn.beton"
    torn.write_bytes((service.home / "train.beton").read_bytes()[:-1000])
    (service.home / "torn.beton.json").write_bytes((service.home / "train.beton.json").read_bytes())
    words = ["smoke", f"--data.train={torn}", f"--data.val={service.home / 'val.beton'}"]
    command = [sys.executable, str(ROOT / "jobs/imagenet_deit.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(torn) in errors[0]
    assert "Traceback" not in done.stderr


def test_the_cluster_encodes_what_one_machine_would(service: Service, tmp_path: Path) -> None:
    """The job's own process writes in order, so the bytes are the same; here both nodes are one machine."""
    done = service.submit_job(
        *["jobs/write_beton.py", "digits", str(tmp_path / "ray.beton"), "--ray"],
        *["--shards", "2", "--mode", "jpg"],
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1,797 images of 10 classes" in done.stdout
    local = write_beton(digits(), tmp_path / "local.beton", shards=2, mode="jpg", workers=1)
    assert check_beton(tmp_path / "ray.beton", deep=True, workers=1).sha256 == local.sha256


def test_a_run_ends_with_its_pages(service: Service, submitted: subprocess.CompletedProcess[str]) -> None:
    run = service.run_of(submitted.stdout)
    client = mlflow.MlflowClient(service.uri)
    names = {
        file.path
        for kind in ("summary", "position_report")
        for file in client.list_artifacts(run.info.run_id, kind)
    }
    assert {
        "summary/summary.html",
        "position_report/position_report.html",
        "position_report/token.svg",
    } <= names
    page = Path(client.download_artifacts(run.info.run_id, "summary/summary.html")).read_text()
    assert f"top-1 of the best checkpoint<b>{run.data.metrics['best/acc1']:.2f} %</b>" in page
    assert "jobs/imagenet_deit.py --data.train=" in page


def test_the_list_of_runs_says_which_is_which(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    run = service.run_of(submitted.stdout)
    tags = run.data.tags
    assert tags["mlflow.source.name"] == "jobs/imagenet_deit.py"
    manifest = json.loads((service.home / "train.beton.json").read_text())
    assert tags["data.train.sha256"] == manifest["sha256"]
    assert (tags["position"], tags["join"], tags["seed"]) == ("learnable", "lape", "0")
    assert [(i.dataset.name, i.tags[0].value) for i in run.inputs.dataset_inputs] == [
        ("train", "training"),
        ("val", "validation"),
    ]
    assert ui_view.QUERY in submitted.stdout
    shown = {column.split("`")[1] for column in ui_view.COLUMNS if column.startswith(("metrics", "tags"))}
    logged = {*run.data.metrics, *tags}
    assert {*shown, *ui_view.CURVES} - logged <= {"val_ema/acc1"}, "a column or curve that no run has"


def test_a_position_report_while_it_trains(
    service: Service, submitted: subprocess.CompletedProcess[str]
) -> None:
    client, run = mlflow.MlflowClient(service.uri), service.run_of(submitted.stdout)
    files = client.list_artifacts(run.info.run_id, "position_report")
    assert {file.path for file in files if file.is_dir} == {"position_report/epoch-000001"}
    assert {"position_report/training.html", "position_report/training.png"} <= {file.path for file in files}
    names = {file.path for file in client.list_artifacts(run.info.run_id, "position_report/epoch-000001")}
    assert "position_report/epoch-000001/position_report.html" in names


def test_a_worker_that_is_stopped_is_ended(service: Service) -> None:
    """Ray asks it to end, which it cannot hear; it would keep its CPU, and the run would wait for that."""

    @ray.remote(num_cpus=1)
    class Worker:
        def process(self) -> tuple[str, int, float]:
            own = psutil.Process()
            return ray.get_runtime_context().get_node_id(), own.pid, own.create_time()

    worker = Worker.remote()  # type: ignore[attr-defined]
    node, pid, began = ray.get(worker.process.remote())
    ray.get(rendezvous._kill.remote(pid, began - 1))
    process = psutil.Process(pid)
    assert process.is_running(), "another one has that number"
    process.suspend()
    rendezvous.end_process(rendezvous.Member(0, worker, "", ("", 0), (node, pid, began)))
    process.wait(60)
