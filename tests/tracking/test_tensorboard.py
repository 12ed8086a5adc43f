"""Event files as TensorBoard reads them, and refusals before a run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from helpers.s3_server import gateway
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lape_ray import tracking
from lape_ray.cluster.launch import prepared
from lape_ray.config import TrackingConfig, TrainConfig
from lape_ray.storage import s3
from lape_ray.tracking import tensorboard
from lape_ray.tracking.sender import Sender
from lape_ray.tracking.tensorboard import TensorBoardTracker, check_tensorboard

RUN_ID = "0123456789abcdef"


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sender, "RETRY_S", 0.05)


def log(home: Path, steps: range, *, run: str = "run", run_id: str = RUN_ID) -> None:
    tracker = TensorBoardTracker(str(home / "logs"), run_id, str(home / run))
    for step in steps:
        tracker.metrics({"train/loss": step / 2}, step=step)
    tracker.close()


def shown(folder: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(one.step, one.value) for one in events.Scalars(name)]


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, step / 2) for step in steps]


@pytest.mark.parametrize("cut", [1, 7, 20, 45])
def test_a_file_that_ends_torn_loses_what_is_torn_and_it_is_written_again(tmp_path: Path, cut: int) -> None:
    """As after a power failure: the training goes on from before, and what no reader sees is no more in the way."""
    log(tmp_path, range(1, 11))
    folder = tmp_path / "logs/run-01234567"
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    log(tmp_path, range(6, 16))
    assert shown(folder) == expected(range(1, 16))


@pytest.mark.parametrize("place", [0, 9, 60])
def test_a_changed_file_does_not_stop_a_run(tmp_path: Path, place: int) -> None:
    log(tmp_path, range(1, 11))
    folder = tmp_path / "logs/run-01234567"
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)
    log(tmp_path, range(1, 16))
    assert shown(folder) == expected(range(1, 16))


def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A part of a batch is on the disk then, and ends within a record."""
    whole, cuts = tensorboard.os.fsync, [0, 30, 100, 150]

    def full(descriptor: int) -> None:
        if cuts:
            tensorboard.os.ftruncate(descriptor, cuts.pop())
            raise OSError(28, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(tensorboard.os, "fsync", full)
    log(tmp_path, range(1, 11))
    assert "No space left on device" in caplog.text
    assert not cuts
    assert shown(tmp_path / "logs/run-01234567") == expected(range(1, 11))


def test_runs_do_not_mix(tmp_path: Path) -> None:
    """One that is started over has another id, and one of another name another folder."""
    log(tmp_path, range(1, 6))
    log(tmp_path, range(1, 4), run_id="f" * 32)
    log(tmp_path, range(1, 3), run="other")
    found = {path.name: shown(path) for path in (tmp_path / "logs").iterdir()}
    assert found == {
        "run-01234567": expected(range(1, 6)),
        "run-ffffffff": expected(range(1, 4)),
        "other-01234567": expected(range(1, 3)),
    }


def test_both_trackers_get_the_same(tmp_path: Path, database: Path) -> None:
    uri = f"sqlite:///{database}"
    config = TrainConfig(tracking=TrackingConfig(uri=uri))
    run_id = tracking.create_run(config, name="n", command="c", tags={}, datasets={})
    tracker = tracking.open_tracker(
        TrackingConfig(tensorboard=str(tmp_path / "logs")), uri, run_id, str(tmp_path / "run")
    )
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/a.html").write_text("page")
    for step in range(1, 11):
        tracker.metrics({"train/loss": step / 2}, step=step)
    tracker.files(tmp_path / "pages", "report")
    tracker.save_unsent()
    tracker.close()
    points = mlflow.MlflowClient(uri).get_metric_history(run_id, "train/loss")
    folder = tmp_path / f"logs/run-{run_id[:8]}"
    assert sorted((one.step, one.value) for one in points) == shown(folder) == expected(range(1, 11))
    assert (folder / "report/a.html").read_text() == "page"
    assert [one.path for one in mlflow.MlflowClient(uri).list_artifacts(run_id, "report")] == [
        "report/a.html"
    ]


def test_what_waits_lies_on_s3_where_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server").mkdir()
    with gateway(tmp_path / "server") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        s3.client().create_bucket(Bucket="runs")
        (tmp_path / "logs").touch()
        first = TensorBoardTracker(str(tmp_path / "logs"), RUN_ID, "s3://runs/run")
        for step in range(1, 11):
            first.metrics({"train/loss": step / 2}, step=step)
        first.save_unsent()
        first.close(timeout_s=0.1)
        (tmp_path / "logs").unlink()
        second = TensorBoardTracker(str(tmp_path / "logs"), RUN_ID, "s3://runs/run")
        second.close()
        assert shown(tmp_path / "logs/run-01234567") == expected(range(1, 11))
        assert "Contents" not in s3.client().list_objects_v2(Bucket="runs", Prefix="run/")


# --- before a run -----------------------------------------------------------------------------------------------------


def test_a_folder_on_s3_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match=r"--tracking\.tensorboard s3://b/x is no folder .* objects of S3 cannot"
    ):
        check_tensorboard("s3://b/x")


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(ValueError, match=r"not installed: pip install lape_ray\[tensorboard\]"):
        check_tensorboard(str(tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()
    check_tensorboard(None)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"--tracking\.tensorboard \S+/file/logs cannot be written: .*choose another"
    ):
        check_tensorboard(str(tmp_path / "file/logs"))
    check_tensorboard(str(tmp_path / "new/logs"))


def test_neither_package_is_imported_before_it_is_used() -> None:
    """They take seconds, and every process of a run imports this room."""
    code = "import sys, lape_ray.tracking; sys.exit(bool({'mlflow', 'tensorboard'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_workers_get_the_folder_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = prepared(TrainConfig(tracking=TrackingConfig(tensorboard="logs")))
    assert config.tracking.tensorboard == str(tmp_path / "logs")
