"""Errors of the tracking server become one line that says what to do, or a warning where training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import sqlalchemy

from lape_ray import tracking
from lape_ray.cluster import launch
from lape_ray.cluster.controller import variables
from lape_ray.cluster.launch import prepared
from lape_ray.config import TrackingConfig, TrainConfig, replace_fields
from lape_ray.recipes import recipe
from lape_ray.storage import check_writable
from lape_ray.tracking.failures import never_raise
from lape_ray.tracking.sender import Sender

FIX = (
    "another process holds the file: close that process, or start an MLflow server and set --tracking.uri or"
)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow waits 20 s for a lock; here it does not."""
    text = sqlalchemy.sql.text
    monkeypatch.setattr(
        sqlalchemy.sql, "text", lambda words: text(words.replace("busy_timeout = 20000", "busy_timeout = 50"))
    )


@contextlib.contextmanager
def locked(file: Path, how: str) -> Iterator[None]:
    """Hold the database as another process would: EXCLUSIVE keeps readers out too, IMMEDIATE only writers."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {how}")
        yield


def config(uri: str) -> TrainConfig:
    return replace_fields(recipe("smoke"), {"tracking.uri": uri})


def create(uri: str) -> str:
    return tracking.create_run(
        config(uri), name="n", command="c", tags={"a": "b"}, datasets={"train": ("a.beton", "0" * 64)}
    )


def one_line(caught: pytest.ExceptionInfo[ValueError], capfd: pytest.CaptureFixture[str]) -> str:
    """The error's only line; nothing else was printed."""
    assert capfd.readouterr() == ("", "")
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["EXCLUSIVE", "IMMEDIATE"])
def test_a_locked_database_is_one_line(
    database: Path, how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{database}"
    run_id = create(uri)
    capfd.readouterr()
    calls = {"does not take the run 'n'": lambda: create(uri)}
    if how == "EXCLUSIVE":
        calls |= {
            "cannot be used": lambda: tracking.check_reachable(uri),
            "cannot be read": lambda: tracking.read_run(uri, run_id, ["train/loss"]),
            "has no model that can be fetched": lambda: tracking.download_model(uri, run_id, tmp_path),
            "does not take the model": lambda: tracking.log_pyfunc(
                uri,
                run_id,
                loader_module="m",
                data=tmp_path,
                package=tmp_path,
                requirements=[],
                example="",
                columns={"class": "string"},
                register=None,
            ),
            "does not take 'pages'": lambda: tracking.log_files(uri, "0" * 32, tmp_path, "pages"),
        }
    with locked(database, how):
        for what, call in calls.items():
            with pytest.raises(ValueError, match=what) as caught:
                call()
            line = one_line(caught, capfd)
            assert f"database is locked; {FIX} MLFLOW_TRACKING_URI" in line
            assert str(database) in line
    assert create(uri) != run_id, "it is usable again"


@pytest.mark.usefixtures("impatient")
def test_an_experiment_that_cannot_be_made_is_the_reason(
    database: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once it was taken for one that another job had made meanwhile, and there is none."""
    uri = f"sqlite:///{database}"
    new = replace_fields(config(uri), {"tracking.experiment": "never made"})
    with locked(database, "IMMEDIATE"), pytest.raises(ValueError, match="database is locked") as caught:
        tracking.create_run(new, name="n", command="c", tags={}, datasets={})
    one_line(caught, capfd)


def test_a_store_that_cannot_be_opened_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.db").write_text("not a database, and longer than the header of one" * 20)
    with pytest.raises(
        ValueError, match=r"file is not a database; mend the file, or set --tracking\.uri"
    ) as caught:
        create(f"sqlite:///{tmp_path / 'text.db'}")
    one_line(caught, capfd)


@pytest.mark.usefixtures("impatient")
def test_what_must_not_stop_a_training_is_a_warning(
    database: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the client cannot even be made, as in a new process: then SQLAlchemy's own error comes through."""
    uri = f"sqlite:///{database}"
    run_id = create(uri)
    capfd.readouterr()
    with locked(database, "EXCLUSIVE"):
        for address in (
            uri,
            f"{uri}?timeout=0.05",
        ):  # the second is a store that this process has not opened yet
            caplog.clear()
            assert tracking.reopen_run(address, run_id)
            assert not tracking.finish_run(address, run_id, "FAILED")
            tracking.tag_run(address, run_id, {"a": "b"})
            assert len(caplog.messages) == 3
            for message in caplog.messages:
                assert message.endswith("database is locked")
                assert "\n" not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("impatient")
def test_a_worker_begins_while_the_database_is_locked(
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its values wait, and are stored when the lock is gone."""
    monkeypatch.setattr(Sender, "RETRY_S", 0.1)
    run_id = create(f"sqlite:///{database}")
    capfd.readouterr()
    new = f"sqlite:///{database}?timeout=0.06"  # as a new process has it
    with locked(database, "EXCLUSIVE"):
        tracker = tracking.open_tracker(TrackingConfig(), new, run_id, str(tmp_path))
        tracker.metrics({"train/loss": 2.5}, step=3)
        deadline = time.monotonic() + 60
        while "trying again" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        tracker.save_unsent()
        assert '"train/loss"' in (tmp_path / "mlflow_unsent.jsonl").read_text()
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    (point,) = mlflow.MlflowClient(new).get_metric_history(run_id, "train/loss")
    assert (point.step, point.value) == (3, 2.5)
    assert "Traceback" not in capfd.readouterr().err
    assert all("\n" not in r.getMessage() for r in caplog.records if r.name.startswith("lape_ray"))


def test_an_error_without_words_is_named_by_its_kind(caplog: pytest.LogCaptureFixture) -> None:
    with never_raise("MLflow: closing the run"):
        raise TimeoutError
    assert caplog.messages == ["MLflow: closing the run failed: TimeoutError"]
    assert caplog.records[0].levelno == logging.WARNING


# --- deleted experiments and runs -----------------------------------------------------------------------------


def test_a_deleted_experiment_is_told_with_the_command_that_restores_it(database: Path) -> None:
    uri = f"sqlite:///{database}"
    made, client = replace_fields(config(uri), {"tracking.experiment": "goes"}), mlflow.MlflowClient(uri)

    def new_run() -> str:
        return tracking.create_run(made, name="n", command="c", tags={}, datasets={})

    new_run()
    client.delete_experiment(client.get_experiment_by_name("goes").experiment_id)
    with pytest.raises(ValueError, match=r"the MLflow experiment 'goes' at .* was deleted") as caught:
        new_run()
    (line,) = str(caught.value).splitlines()
    command, _, other = line.partition("restore it with ")[2].partition(", or choose another ")
    assert other == "--tracking.experiment"
    words = shlex.split(command)
    environment = {**os.environ, **dict([words[0].split("=", 1)])}
    done = subprocess.run(
        [Path(sys.executable).parent / words[1], *words[2:]], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert client.get_run(new_run()).info.status == "RUNNING"


def test_a_run_that_was_deleted_meanwhile_is_a_new_one(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{database}"
    run_id = create(uri)
    mlflow.MlflowClient(uri).delete_run(run_id)
    assert not tracking.reopen_run(uri, run_id)
    assert "cannot be continued, a new one is made" in caplog.text
    assert not tracking.holds_metric(uri, run_id, "epoch")


def test_metrics_that_went_to_another_store_are_missed(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{database}"
    run_id = create(uri)
    assert not tracking.holds_metric(uri, run_id, "epoch")
    assert "the workers reach another store by this address, or none; start an MLflow server" in caplog.text
    tracking.log_values(uri, run_id, {"epoch": 1.0})
    assert tracking.holds_metric(uri, run_id, "epoch")


@pytest.mark.parametrize(("tracked", "status"), [(True, "FINISHED"), (False, "KILLED")])
def test_a_run_that_is_not_stored_whole_does_not_end_as_finished(
    database: Path, tracked: bool, status: str
) -> None:
    uri = f"sqlite:///{database}"
    run_id = create(uri)
    with launch.status_of(uri, run_id) as end:
        end.tracked = tracked
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == status


# --- addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:///HERE/mlflow.db"),
        ("sqlite:///runs/m.db?timeout=3", "sqlite:///HERE/runs/m.db?timeout=3"),
        ("sqlite+pysqlite:///mlflow.db", "sqlite+pysqlite:///HERE/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("mlruns", "HERE/mlruns"),
        ("./mlruns", "HERE/mlruns"),
        ("file:mlruns", "file:HERE/mlruns"),
        ("file:///data/mlruns", "file:///data/mlruns"),
        ("http://localhost:5000", "http://localhost:5000"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("databricks", "databricks"),
    ],
)
def test_a_store_is_the_same_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = expected.replace("HERE", str(tmp_path))
    assert tracking.tracking_uri(config(uri)) == whole
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking.tracking_uri(recipe("smoke")) == whole
    assert prepared(config(uri))[0].tracking.uri == whole
    assert variables()["MLFLOW_TRACKING_URI"] == whole


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://mlflow.db"])
def test_a_store_that_no_other_process_can_open_is_refused(uri: str) -> None:
    with pytest.raises(
        ValueError, match=r"names no file that other processes can open; write sqlite:///FILE\.db"
    ):
        tracking.tracking_uri(config(uri))


def test_the_home_is_absolute_for_workers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAPE_RAY_HOME", "here")
    monkeypatch.setenv("LAPE_RAY_CACHE", "cache")
    assert variables()["LAPE_RAY_HOME"] == str(tmp_path / "here")
    assert variables()["LAPE_RAY_CACHE"] == str(tmp_path / "cache")


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("LAPE_RAY_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(
        ValueError, match=r"file/lape_ray of the MLflow store cannot be made: .*; set LAPE_RAY_HOME"
    ):
        tracking.check_reachable(tracking.tracking_uri(recipe("smoke")))
    with pytest.raises(
        ValueError, match=r"is not writable: .*; choose another with --run\.storage, or by LAPE_RAY_HOME"
    ):
        check_writable(prepared(recipe("smoke"))[1])
    monkeypatch.setenv("LAPE_RAY_HOME", "~nobody-of-this-name/x")
    with pytest.raises(
        ValueError, match=r"~nobody-of-this-name/x: .*; set LAPE_RAY_HOME to a folder that can be"
    ):
        tracking.tracking_uri(recipe("smoke"))
    monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path / "home"))  # the advice
    uri = tracking.tracking_uri(recipe("smoke"))
    tracking.check_reachable(uri)
    assert (tmp_path / "home/mlflow.db").exists()


def test_odd_letters_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("what? now", "per%20cent"):
        monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path / name))
        with pytest.raises(
            ValueError, match=r"which the address of an SQLite file cannot hold; set LAPE_RAY_HOME"
        ) as caught:
            tracking.tracking_uri(recipe("smoke"))
        assert str(tmp_path / name) in str(caught.value)
        (tmp_path / name).mkdir()
        with monkeypatch.context() as there, pytest.raises(ValueError, match="SQLite file cannot hold"):
            there.chdir(tmp_path / name)
            tracking.tracking_uri(config("sqlite:///mlflow.db"))
    monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path / "a #b 'c"))
    uri = tracking.tracking_uri(recipe("smoke"))
    tracking.check_reachable(uri)
    assert (tmp_path / "a #b 'c/mlflow.db").exists()
    assert shlex.split(tracking.ui_command(uri)) == ["mlflow", "ui", "--backend-store-uri", uri]


# --- the list of models ---------------------------------------------------------------------------------------


FACTS = {
    "checkpoint": "/runs/n/checkpoint-epoch-000003",
    "variant": "deit_tiny",
    "join": "lape",
    "epochs": "3",
}


def best_model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("model.safetensors", "meta.json", "optimizer.pt"):
        (folder / name).write_text(name)
    return folder


def test_the_best_checkpoint_is_one_of_the_experiments_models(database: Path, tmp_path: Path) -> None:
    """With the metrics, data and run that it is of; a second time it is the same one."""
    uri, client = f"sqlite:///{database}", mlflow.MlflowClient(f"sqlite:///{database}")
    made = replace_fields(config(uri), {"tracking.experiment": "models"})
    data = {"train": ("/d/birds_train.beton", "ab" * 32), "val": ("/d/birds_val.beton", "cd" * 32)}
    run_id = tracking.create_run(made, name="tiny.one", command="c", tags={}, datasets=data)
    metrics = {"val/acc1": 71.5, "val/loss": 1.25, "val_ema/acc1": 72.0}
    folder = best_model(tmp_path / "c")
    assert tracking.log_model(uri, run_id, folder, metrics, FACTS)
    experiment = client.get_run(run_id).info.experiment_id
    (model,) = client.search_logged_models([experiment])
    assert (model.name, model.source_run_id, model.model_type) == ("tiny-one", run_id, "deit_tiny")
    assert str(model.status) == "READY"
    assert (model.params["join"], model.tags["checkpoint"]) == ("lape", FACTS["checkpoint"])
    found = {(one.key, one.value, one.dataset_name, one.run_id) for one in model.metrics}
    assert found == {("best/acc1", 71.5, "birds_val", run_id), ("best/loss", 1.25, "birds_val", run_id)}
    run = client.get_run(run_id)
    assert {key: value for key, value in run.data.metrics.items() if key.startswith("best/")} == {
        "best/acc1": 71.5, "best/loss": 1.25,
    }  # fmt: skip
    assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
    assert tracking.download_model(uri, run_id, tmp_path / "back").joinpath("model.safetensors").exists()
    assert tracking.log_model(uri, run_id, folder, metrics, FACTS)
    assert tracking.log_model(
        uri, run_id, folder, metrics, FACTS | {"checkpoint": "/runs/n/checkpoint-epoch-000004"}
    )
    names = sorted(one.tags["checkpoint"][-1] for one in client.search_logged_models([experiment]))
    assert names == ["3", "4"]


def test_a_server_without_that_list_has_the_rest(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{database}"
    run_id = create(uri)

    def unknown(*_: object, **__: object) -> None:
        raise mlflow.MlflowException(
            "API request to endpoint /api/2.0/mlflow/logged-models failed with error code 404"
        )

    monkeypatch.setattr(mlflow.MlflowClient, "search_logged_models", unknown)
    assert tracking.log_model(uri, run_id, best_model(tmp_path / "c"), {"val/acc1": 5.0}, FACTS)
    (line,) = caplog.messages
    assert line.startswith(
        "MLflow: listing the best checkpoint among the experiment's models failed: API request"
    )
    assert mlflow.MlflowClient(uri).get_run(run_id).data.metrics["best/acc1"] == 5.0
