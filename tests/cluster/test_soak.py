"""A long run that is hit again and again: it learns what an undisturbed one does, and nothing grows."""

from __future__ import annotations

import collections
import random
import threading
import time
from dataclasses import dataclass, field

import psutil
import pytest
from helpers.faults import LONG, add_row, workers
from helpers.service import Service, alone

from lape_ray.cluster.launch import fit

pytestmark = [pytest.mark.timeout(2400), pytest.mark.cluster, pytest.mark.faults, pytest.mark.slow]

EPOCHS = 300
KILLS = 5
SETTLE_S = 8  # a process of this age has imported everything


@dataclass
class Sample:
    """The whole cluster at one moment while it trains."""

    worker_bytes: int
    worker_threads: int
    worker_files: int
    other_bytes: int
    processes: int
    others: dict[str, int]
    """Bytes of the other processes, by what they are."""


@dataclass
class Watch:
    """Kills a worker now and then, and looks at all processes meanwhile."""

    service: Service
    samples: list[Sample] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        dice = random.Random(0)
        runs = self.service.home / "runs" / "soak"
        hits = sorted(dice.sample(range(EPOCHS // 10, EPOCHS * 9 // 10), KILLS))
        while not self.over.wait(1):
            try:
                self.look()
                epochs = max((int(path.name[17:23]) for path in runs.glob("checkpoint-epoch-*")), default=0)
                if hits and epochs >= hits[0]:
                    hits.pop(0)
                    dice.choice(workers(self.service)).kill()
                    self.kills.append(time.time())
            except (psutil.Error, IndexError):  # it went away while it was looked at
                continue

    def look(self) -> None:
        found = workers(self.service)
        family = psutil.Process(self.service.cluster.pid).children(recursive=True)
        if len(found) != 1 or time.time() - found[0].create_time() < SETTLE_S:
            return
        worker = found[0]
        with worker.oneshot():
            others: collections.Counter[str] = collections.Counter()
            for process in family:
                if process.pid != worker.pid:
                    others[" ".join(process.cmdline()).strip()[-60:] + f" {process.pid}"] += (
                        process.memory_info().rss
                    )
            self.samples.append(
                Sample(
                    worker_bytes=worker.memory_info().rss,
                    worker_threads=worker.num_threads(),
                    worker_files=worker.num_fds(),
                    other_bytes=sum(others.values()),
                    processes=len(family),
                    others=dict(others),
                )
            )


def test_hundreds_of_epochs_and_several_deaths(service: Service) -> None:
    changes = {**LONG, "optim__epochs": EPOCHS, "run__eval_epochs": 10}
    config = service.config(run__name="soak", **changes)
    watch = Watch(service)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    began = time.time()
    try:
        result = fit(config)
    finally:
        watch.over.set()
        thread.join(10)
    took = time.time() - began
    assert len(watch.kills) == KILLS
    assert service.losses(service.run(result.mlflow_run_id)) == alone(config).losses
    count = len(watch.samples)
    assert count > 40, "too short to see anything grow"
    early, late = watch.samples[count // 8 : count // 4], watch.samples[-count // 8 :]

    def level(samples: list[Sample], name: str) -> float:
        values = sorted(getattr(sample, name) for sample in samples)
        return float(values[len(values) // 2])

    growth = {
        name: level(late, name) - level(early, name) for name in Sample.__annotations__ if name != "others"
    }
    for kind in sorted({*early[-1].others, *late[-1].others}):
        print(kind, early[-1].others.get(kind, 0) >> 20, "->", late[-1].others.get(kind, 0) >> 20, "MiB")
    print(f"{EPOCHS} epochs, {KILLS} deaths, {took:.0f} s; growth: {growth}")
    assert growth["worker_bytes"] < 30e6
    assert growth["worker_threads"] <= 2
    assert growth["worker_files"] <= 4
    assert growth["other_bytes"] < 150e6  # the event logs of Ray's own processes
    assert growth["processes"] <= 2
    add_row(f"soak: {KILLS} deaths of workers in {EPOCHS} epochs, {took:.0f} s; growth {growth}", None, None)
