"""What a run shows while it trains. That Prometheus can read it is shown by `make test-images`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from lape_ray.cluster import prometheus
from lape_ray.training.metrics import Waited
from lape_ray.training.times import Times


def test_waiting_is_counted_once() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    times = Times()
    waited = Waited(slow(), times, torch.device("cpu"))
    assert list(waited) == [0, 1, 2]
    seconds = waited.read()
    assert times.read()["data"] == pytest.approx(seconds)
    assert 0.06 <= seconds < 0.5
    time.sleep(0.02)
    assert waited.read() == 0.0, "the caller's own time is not waiting"


def test_a_gpu_that_is_busy_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    done = iter([False, True, True])

    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return next(done)

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def slow() -> Iterator[int]:
        time.sleep(0.1)
        yield 0
        time.sleep(0.02)
        yield 1

    times = Times()
    waited = Waited(slow(), times, torch.device("cuda"))
    assert list(waited) == [0, 1]
    assert 0.02 <= waited.read() < 0.1
    assert 0.02 <= times.read()["data"] < 0.1


def test_each_metric_of_the_loop_has_its_gauge(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, tuple[float, dict[str, str]]] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description
            self.name, self.keys = name, set(tag_keys)

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == self.keys
            shown[self.name] = (value, tags)

    monkeypatch.setattr(prometheus, "Gauge", Gauge)
    mine = prometheus.RunGauges("some-run", 3)
    mine.show({"train/loss": 2, "train/data_wait_s": 0.25, "val/acc5": 99.0, "time/idle": 7})
    tags = {"run": "some-run", "rank": "3"}
    assert shown == {
        "lape_loss": (2.0, tags),
        "lape_data_wait_seconds": (0.25, tags),
        "lape_time_seconds": (7.0, {**tags, "part": "idle"}),
    }
    assert all(name.startswith("lape_") for name, _ in prometheus.GAUGES.values())
