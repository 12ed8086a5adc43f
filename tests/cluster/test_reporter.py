"""The reporter and a store that is slow or gone: the training goes on, and what counts is stored."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lape_ray import storage
from lape_ray.cluster import checkpoint_writer
from lape_ray.cluster import reporter as reporter_module
from lape_ray.cluster.checkpoint_list import read_list
from lape_ray.cluster.checkpoint_writer import CheckpointWriter
from lape_ray.cluster.group import Alone
from lape_ray.cluster.reporter import RunReporter
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_end import StorageError
from lape_ray.config import OptimConfig, RunConfig, TrainConfig, replace_fields
from lape_ray.storage import leased
from lape_ray.training.checkpoint import Metadata, Snapshot
from lape_ray.training.distributed import World
from lape_ray.training.flags import Flags

CONFIG = TrainConfig(optim=OptimConfig(epochs=9), run=RunConfig(keep_checkpoints=9, outage_s=0))


class Store:
    """The storage, which stores nothing while its gate is shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.publish = threading.Event(), storage.publish
        self.error: OSError | None = None
        self.gate.set()
        monkeypatch.setattr(checkpoint_writer.storage, "publish", self._publish)

    def _publish(self, folder: Path, address: str, *, last: str = "") -> None:
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        self.publish(folder, address, last=last)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


@pytest.fixture
def reporter(tmp_path: Path, store: Store) -> Iterator[RunReporter]:
    folder = str(tmp_path / "run")
    with leased(folder, "run one") as lease:
        run = Run(
            config=CONFIG, folder=folder, lease=lease.token, tracking_uri="", mlflow_run_id="", use_gpu=False
        )
        writer = CheckpointWriter(run, (), before_publishing=lambda: None, tell=print)
        world = World(0, 1, torch.device("cpu"))
        yield RunReporter(run, Alone(threading.Event()), world, writer=writer)
        store.gate.set()
        writer.close()


def snapshot() -> Snapshot:
    metadata = Metadata(epochs_done=1, steps_done=5, config=CONFIG, metrics={}, world_size=1)
    return Snapshot(model={"weight": torch.zeros(1)}, ema=None, optimizer={}, metadata=metadata)


def epoch(reporter: RunReporter, number: int, accuracy: float | None = None) -> None:
    score = {} if accuracy is None else {"val/acc1": accuracy}
    reporter.epoch({"epoch": number, **score}, step=5 * number, snapshot=snapshot)


def stored(reporter: RunReporter) -> list[int]:
    """The epochs of the listed checkpoints."""
    return [one.steps_done // 5 for one in read_list(reporter.run.folder) or ()]


def flags_of_next_steps(reporter: RunReporter) -> list[Flags]:
    """The flags of the steps from the one on at which something is known of the checkpoint that is being stored."""
    deadline = time.monotonic() + 30
    while (first := reporter.poll_flags()) is Flags.NONE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [first, reporter.poll_flags(), reporter.poll_flags()]


def test_epochs_do_not_wait_for_a_slow_store(
    reporter: RunReporter, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of those that end meanwhile only the best is kept in memory, and stored next; the last one always is."""
    store.gate.clear()
    epoch(reporter, 1)
    for number, accuracy in ((2, 20.0), (3, 10.0), (4, 30.0), (5, 30.0), (6, None)):
        epoch(reporter, number, accuracy)
        assert reporter.poll_flags() is Flags.NONE
    assert stored(reporter) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines == [  # of epochs 3, 5 and 6
        "no checkpoint after epoch 3: the one after epoch 1 is not stored yet, and the training waits for none "
        "(said once)"
    ]
    store.gate.set()
    assert flags_of_next_steps(reporter) == [Flags.SAVED, Flags.NONE, Flags.NONE]
    reporter.checkpoint_stored()
    assert flags_of_next_steps(reporter) == [Flags.SAVED, Flags.NONE, Flags.NONE]
    reporter.checkpoint_stored()
    assert stored(reporter) == [1, 4]
    store.gate.clear()
    epoch(reporter, 8, 5.0)
    threading.Timer(0.1, store.gate.set).start()
    epoch(reporter, 9, 4.0)
    reporter.wait_until_saved()
    assert stored(reporter) == [1, 4, 8, 9]


def test_what_waits_is_stored_at_a_stop(reporter: RunReporter, store: Store) -> None:
    store.gate.clear()
    epoch(reporter, 1, 10.0)
    epoch(reporter, 2, 20.0)
    threading.Timer(0.1, store.gate.set).start()
    reporter.wait_until_saved()
    assert stored(reporter) == [1, 2]


def test_a_checkpoint_within_an_epoch_is_left_out_meanwhile(reporter: RunReporter, store: Store) -> None:
    store.gate.clear()
    epoch(reporter, 1, 10.0)
    reporter.checkpoint({"epoch": 1.4}, step=7, snapshot=snapshot)
    store.gate.set()
    reporter.wait_until_saved()
    reporter.checkpoint({"epoch": 1.8}, step=9, snapshot=snapshot)
    reporter.wait_until_saved()
    assert [one.steps_done for one in read_list(reporter.run.folder) or ()] == [5, 9]


def test_the_interval_auto_asks_once_and_not_while_one_is_stored(
    reporter: RunReporter, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(monotonic=lambda: now))
    config = replace_fields(CONFIG, {"run.checkpoint_minutes": "auto"})
    reporter.run = replace(reporter.run, config=config)
    reporter.attempt = SimpleNamespace(  # type: ignore[assignment]
        checkpoints=0, step_done=lambda: None, mark=lambda step: None, checkpoint_interval_s=lambda: 75.0
    )
    asked = []
    for _ in range(300):
        now += 1
        asked.append(reporter.poll_flags())
    assert [second for second, flags in enumerate(asked, 1) if flags is Flags.SAVE] == [75, 150, 225, 300]
    store.gate.clear()
    reporter.checkpoint({"epoch": 1.4}, step=7, snapshot=snapshot)
    now += 1000
    assert reporter.poll_flags() is Flags.NONE
    store.gate.set()
    reporter.wait_until_saved()
    assert reporter.poll_flags() is Flags.SAVE
    reporter.run = replace(reporter.run, config=CONFIG)
    now += 1000
    assert reporter.poll_flags() is Flags.NONE, "the loop looks at the clock itself"


def test_a_store_that_fails_ends_the_run_at_the_next_steps(reporter: RunReporter, store: Store) -> None:
    store.error = OSError(28, "No space left on device")
    epoch(reporter, 1)
    assert flags_of_next_steps(reporter) == [Flags.UNSAVED, Flags.NONE, Flags.NONE]
    with pytest.raises(StorageError, match=r"the checkpoint after epoch 1 could not be stored: .*No space"):
        reporter.wait_until_saved()
