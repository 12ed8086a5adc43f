"""Errors of the tracking server become one line that says what to do, or a warning where training goes on."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import sqlalchemy

from lape_ray import tracking
from lape_ray.config import TrackingConfig, TrainConfig, replace_fields
from lape_ray.recipes import recipe
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
