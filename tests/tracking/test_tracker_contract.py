"""What every tracker promises, held by each: a value is stored once, in order, whatever is away and whatever dies."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import sqlalchemy

from lape_ray import storage, tracking
from lape_ray.config import TrackingConfig, TrainConfig
from lape_ray.tracking import Tracker
from lape_ray.tracking.mlflow.tracker import MlflowTracker
from lape_ray.tracking.sender import Sender
from lape_ray.tracking.tensorboard import TensorBoardTracker

LINE = '{"name": "train/loss", "value": 1.5, "time_ms": 7, "step": 1}\n'
History = dict[str, list[tuple[int, float]]]


class Mlflow:
    """MLflow over a database of its own."""

    unsent = "mlflow_unsent.jsonl"

    def __init__(self, home: Path, database: Path) -> None:
        self.file, self.folder = Path(shutil.copy(database, home)), home / "run"
        self.uri = f"sqlite:///{self.file}?timeout=0.05"
        config = TrainConfig(tracking=TrackingConfig(uri=self.uri))
        self.run_id = tracking.create_run(config, name="n", command="c", tags={}, datasets={})

    def code(self) -> str:
        """An expression that opens the tracker, for another process."""
        return f"tracking.mlflow.tracker.MlflowTracker({self.uri!r}, {self.run_id!r}, {str(self.folder)!r})"

    def open(self) -> Tracker:
        return MlflowTracker(self.uri, self.run_id, str(self.folder))

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nobody reads or writes meanwhile, as with a server that is down."""
        with contextlib.closing(sqlite3.connect(self.file, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield

    def history(self) -> History:
        client = mlflow.MlflowClient(self.uri)
        names = client.get_run(self.run_id).data.metrics
        points = {name: client.get_metric_history(self.run_id, name) for name in names}
        return {name: [(one.step, one.value) for one in points[name]] for name in sorted(names)}

    def text(self, path: str) -> str:
        return Path(mlflow.MlflowClient(self.uri).download_artifacts(self.run_id, path)).read_text()


class TensorBoard:
    """Event files, read by TensorBoard itself."""

    unsent = "tensorboard_unsent.jsonl"

    def __init__(self, home: Path, _: Path) -> None:
        self.folder, self.logs = home / "run", home / "logs"
        self.run_id = "0123456789abcdef"
        self.events = self.logs / "run-01234567"

    def code(self) -> str:
        folders = f"{str(self.logs)!r}, {self.run_id!r}, {str(self.folder)!r}"
        return f"tracking.tensorboard.TensorBoardTracker({folders})"

    def open(self) -> Tracker:
        return TensorBoardTracker(str(self.logs), self.run_id, str(self.folder))

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """A file has the folder's name, as if its disk were not mounted."""
        aside = self.logs.with_name("aside")
        with contextlib.suppress(FileNotFoundError):
            self.logs.rename(aside)
        self.logs.touch()
        yield
        self.logs.unlink()
        if aside.exists():
            aside.rename(self.logs)

    def history(self) -> History:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        shown = EventAccumulator(str(self.events), size_guidance={"scalars": 0})
        shown.Reload()
        return {
            name: [(one.step, one.value) for one in shown.Scalars(name)]
            for name in sorted(shown.Tags()["scalars"])
        }

    def text(self, path: str) -> str:
        return (self.events / path).read_text()


@pytest.fixture(autouse=True)
def haste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for as long as it would in a run; MLflow waits 20 s for a lock."""
    text = sqlalchemy.sql.text
    short = ("busy_timeout = 20000", "busy_timeout = 50")
    monkeypatch.setattr(sqlalchemy.sql, "text", lambda words: text(words.replace(*short)))
    monkeypatch.setattr(Sender, "RETRY_S", 0.05)
    monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path / "home"))


@pytest.fixture(params=[Mlflow, TensorBoard])
def service(request: pytest.FixtureRequest, tmp_path: Path, database: Path) -> Mlflow | TensorBoard:
    made: Mlflow | TensorBoard = request.param(tmp_path, database)
    return made


def send(tracker: Tracker, steps: range) -> None:
    """Values that a float of 32 bits holds, as event files do."""
    for step in steps:
        tracker.metrics({"train/loss": 100 - step / 4}, step=step)
        if step % 5 == 0:
            tracker.metrics({"epoch": step // 5, "val_ema/acc1": float(step)}, step=step)


def undisturbed(steps: range) -> History:
    whole = [step for step in steps if step % 5 == 0]
    return {
        "epoch": [(step, step // 5) for step in whole],
        "train/loss": [(step, 100 - step / 4) for step in steps],
        "val_ema/acc1": [(step, float(step)) for step in whole],
    }


def files(service: Mlflow | TensorBoard) -> list[str]:
    return sorted(path.name for path in service.folder.iterdir()) if service.folder.exists() else []


def until(text: str, caplog: pytest.LogCaptureFixture) -> None:
    deadline = time.monotonic() + 60
    while text not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.02)


def test_values_arrive_in_order(service: Mlflow | TensorBoard) -> None:
    """No file is written for a service that takes everything."""
    tracker = service.open()
    send(tracker, range(1, 21))
    tracker.close()
    tracker.save_unsent()
    assert service.history() == undisturbed(range(1, 21))
    assert files(service) == []


def test_odd_numbers_arrive(service: Mlflow | TensorBoard) -> None:
    tracker = service.open()
    tracker.metrics({"train/loss": float("nan"), "train/lr": 1e-30}, step=1)
    tracker.close()
    history = service.history()
    assert [step for step, _ in history["train/loss"]] == [1]
    assert history["train/lr"][0][1] == pytest.approx(1e-30)


def test_files_arrive(service: Mlflow | TensorBoard, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    (pages / "in").mkdir(parents=True)
    (pages / "in/a.html").write_text("page")
    tracker = service.open()
    for text in ("first", "second"):
        (pages / "b.html").write_text(text)
        tracker.files(pages, "report/epoch-1")
    tracker.close()
    assert service.text("report/epoch-1/in/a.html") == "page"
    assert service.text("report/epoch-1/b.html") == "second"


def test_what_is_trained_again_is_stored_once(service: Mlflow | TensorBoard) -> None:
    """Also where both lie in one batch: what an earlier worker left, and the same steps once more."""
    first = service.open()
    send(first, range(1, 13))
    first.close()
    with service.away():
        second = service.open()
        send(second, range(9, 18))
        second.save_unsent()
        second.close(timeout_s=0.1)
    third = service.open()
    send(third, range(11, 31))
    third.close()
    assert service.history() == undisturbed(range(1, 31))
    assert files(service) == []


def test_values_wait_and_the_file_goes_when_they_are_stored(
    service: Mlflow | TensorBoard, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = service.open()
    with service.away():
        send(tracker, range(1, 11))
        until("trying again", caplog)
        tracker.save_unsent()
        kept = (service.folder / service.unsent).read_text().splitlines()
        assert len(kept) == sum(map(len, undisturbed(range(1, 11)).values()))
        time.sleep(0.2)
        assert caplog.text.count("trying again") == 1, "one warning an outage"
    tracker.close()
    assert files(service) == []
    assert service.history() == undisturbed(range(1, 11))


CHILD = """
import sys
from lape_ray import tracking
tracker = {opened}
def send(steps):
    for step in steps:
        tracker.metrics({{"train/loss": 100 - step / 4}}, step=step)
        if step % 5 == 0:
            tracker.metrics({{"epoch": step // 5, "val_ema/acc1": float(step)}}, step=step)
send(range(6, 16))
tracker.save_unsent()
print("a checkpoint after step 15", flush=True)
send(range(16, 19))
sys.stdin.read()
"""


@pytest.mark.faults
def test_a_process_is_killed_while_the_service_is_away(service: Mlflow | TensorBoard) -> None:
    """Both come back, and the history is that of an undisturbed run."""
    first = service.open()
    send(first, range(1, 8))
    first.close()
    with service.away():
        code = CHILD.format(opened=service.code())
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None and child.stdout is not None
        with child.stdin, child.stdout:
            assert child.stdout.readline() == "a checkpoint after step 15\n"
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
    assert service.history() == undisturbed(range(1, 8))
    second = service.open()
    send(second, range(16, 31))  # on from the checkpoint
    second.close()
    assert service.history() == undisturbed(range(1, 31))
    assert files(service) == []


def test_close_keeps_what_is_left(service: Mlflow | TensorBoard, caplog: pytest.LogCaptureFixture) -> None:
    """It neither raises nor hangs, and says what waits where; the next worker sends it."""
    tracker = service.open()
    with service.away():
        send(tracker, range(1, 8))
        began = time.monotonic()
        tracker.close(timeout_s=0.3)
        assert time.monotonic() - began < 30
    assert f"has not taken 9 values, which are kept in {service.folder / service.unsent}" in caplog.text
    service.open().close()
    assert service.history() == undisturbed(range(1, 8))
    assert files(service) == []


def test_a_folder_that_cannot_be_written_is_an_error_before_a_checkpoint_and_a_warning_at_the_end(
    service: Mlflow | TensorBoard, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = service.open()
    service.folder.touch()  # no folder can have this name now
    with service.away():
        send(tracker, range(1, 3))
        with pytest.raises(OSError, match="run"):
            tracker.save_unsent()
        tracker.close(timeout_s=0.1)
    assert f"writing {service.folder / service.unsent} failed: " in caplog.text


HOSTILE = {
    "torn": LINE[:20],
    "no JSON": "\x00\x01\x02",
    "no object": "[1, 2]",
    "another field": '{"name": "a", "value": 1, "time_ms": 1, "step": 1, "run_id": "x"}',
    "a field less": '{"name": "a", "value": 1, "time_ms": 1}',
    "a name that MLflow refuses": '{"name": "a\\nb", "value": 1, "time_ms": 1, "step": 1}',
    "a name that leads elsewhere": '{"name": "../a", "value": 1, "time_ms": 1, "step": 1}',
    "a long name": f'{{"name": "{"a" * 251}", "value": 1, "time_ms": 1, "step": 1}}',
    "a text for a number": '{"name": "a", "value": "1", "time_ms": 1, "step": 1}',
    "a step before the first": '{"name": "a", "value": 1, "time_ms": 1, "step": -1}',
    "a large number": f'{{"name": "a", "value": 1, "time_ms": 1, "step": {10**30}}}',
    "a larger number": f'{{"name": "a", "value": {"1" * 5000}, "time_ms": 1, "step": 1}}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_a_damaged_line_is_a_warning_and_the_others_are_sent(
    service: Mlflow | TensorBoard, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.folder.mkdir()
    (service.folder / service.unsent).write_text(LINE + HOSTILE[damage] + "\n" + LINE.replace("1.5", "2.5"))
    tracker = service.open()
    tracker.metrics({"train/loss": 2.0}, step=2)
    tracker.close()
    warning = (
        f"{service.folder / service.unsent} is damaged, and metrics are lost in 1 lines: line 2 is damaged: "
    )
    (message,) = (one for one in caplog.messages if "damaged" in one)
    assert message.startswith(warning)
    assert len(message) < 1000
    assert service.history() == {"train/loss": [(1, 1.5), (2, 2.0)]}
    assert files(service) == []


def test_extreme_values_of_the_file_hold_nothing_up(service: Mlflow | TensorBoard) -> None:
    service.folder.mkdir()
    extreme = f'{{"name": "odd", "value": 1e999, "time_ms": {2**63 - 1}, "step": {2**63 - 1}}}\n'
    (service.folder / service.unsent).write_text(extreme + extreme.replace("1e999", "NaN") + LINE)
    service.open().close()
    assert service.history()["train/loss"] == [(1, 1.5)]
    assert files(service) == []


def test_nothing_is_written_without_the_right_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A worker whose run another driver has taken over does not write over the other's values."""
    logs = tmp_path / "logs"
    logs.touch()

    def check() -> None:
        raise storage.LeaseLostError("another driver goes on with the run")

    tracker = TensorBoardTracker(str(logs), "0" * 32, str(tmp_path / "run"), check)
    tracker.metrics({"a": 1.0}, step=1)
    with pytest.raises(storage.LeaseLostError):
        tracker.save_unsent()
    tracker.close(timeout_s=0.1)
    assert "another driver goes on" in caplog.text
    assert not (tmp_path / "run").exists()


# --- the driver's last try --------------------------------------------------------------------------------------------


def test_the_driver_sends_what_is_left(
    tmp_path: Path, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Mlflow(tmp_path, database)
    arguments = (str(service.folder), service.uri, service.run_id)
    assert tracking.send_unsent(*arguments)
    with service.away():
        tracker = service.open()
        send(tracker, range(1, 11))
        tracker.close(timeout_s=0.1)
        before = (service.folder / service.unsent).read_text()
        assert not tracking.send_unsent(*arguments)
        assert (service.folder / service.unsent).read_text() == before
    assert "database is locked" in caplog.text
    assert tracking.send_unsent(*arguments)
    assert files(service) == []
    assert service.history() == undisturbed(range(1, 11))
    assert tracking.send_unsent(*arguments)
    assert service.history() == undisturbed(range(1, 11))


def test_a_folder_that_cannot_be_read_is_not_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow_unsent.jsonl").mkdir()
    assert not tracking.send_unsent(str(tmp_path), f"sqlite:///{tmp_path}/mlflow.db", "0" * 32)
    assert "MLflow: sending what is left failed: " in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING
