"""Kills by a Poisson process: of what, when, what each cost, and what of the cluster grows meanwhile."""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import psutil

from helpers import device
from helpers.faults import command, family, workers
from helpers.s3_server import Gateway
from helpers.service import Service
from helpers.tracking_server import TrackingServer

INTERRUPTING = ("worker", "driver", "controller")
OUTAGES = ("s3", "mlflow")  # the training goes on meanwhile
KINDS = (*INTERRUPTING, *OUTAGES)
OUTAGE_S = (2.0, 8.0)  # the least and the most
SEED = 10  # the first forty times that it draws have the mean that is asked for
FACTOR = 5  # mean time between kills, in mean recoveries
READY_S = 10.0  # a worker of this age can take another one's place


@dataclass(frozen=True)
class Kill:
    """What was killed when; not `hit`: there was none at that moment."""

    kind: str
    at: float
    hit: bool


@dataclass(frozen=True)
class Pause:
    """Time without training: from the first kill that interrupted it to the first step after the last one."""

    began: float
    ended: float
    kinds: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def pauses(kills: Sequence[Kill], beginnings: Sequence[float]) -> list[Pause]:
    """Return the times without training, given when trainings had made their first step.

    A pause of an outage alone is one that the training should have gone through.
    """
    found: list[Pause] = []
    until = beginnings[0] if beginnings else math.inf
    for ended in beginnings:
        struck = [one for one in kills if one.hit and until < one.at < ended]
        causes = [one for one in struck if one.kind in INTERRUPTING] or struck
        if causes:
            found.append(Pause(causes[0].at, ended, tuple(one.kind for one in causes)))
        until = ended
    return found


@dataclass
class Storm:
    """Kills one of KINDS again and again, until it is over.

    First one of each while all is well. From then on the time between two kills is drawn from an exponential
    distribution whose mean is FACTOR times the mean recovery of the kinds so far, of which each is as likely; that of
    an outage is zero. A server that was killed is started again after a few seconds.
    """

    service: Service
    folder: Path
    """That of `device`."""
    s3: Gateway
    mlflow: TrackingServer
    plan: random.Random = field(default_factory=lambda: random.Random(SEED))
    """Of kinds and times, apart from which process of a kind is hit."""
    kills: list[Kill] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    _restarts: list[threading.Thread] = field(default_factory=list)

    def run(self) -> None:
        first = list(KINDS)
        self.plan.shuffle(first)
        for kind in (*first, None):
            while not self.well():
                if self.over.wait(1):
                    return
            if kind is not None:  # else what the last one's recovery took is known as well
                self.strike(kind)
                self.over.wait(2 * device.ALIVE_S)
        while not self.over.wait(self.plan.expovariate(1 / (FACTOR * self.mean_recovery_s()))):
            self.strike(self.plan.choice(KINDS))

    def well(self) -> bool:
        """Whether two train, one stands by, and both servers are up."""
        alive = workers(self.service)
        trains = device.training(self.folder) & {one.pid for one in alive}
        up = self.s3.process is not None and self.mlflow.process is not None
        ready = len(alive) == 3 and time.time() - alive[-1].create_time() > READY_S
        return up and ready and len(trains) == 2

    def recoveries(self) -> dict[str, list[float]]:
        """Return the seconds of each pause that a single kill made, by its kind."""
        found = defaultdict(list)
        for pause in pauses(self.kills, device.beginnings(self.folder)):
            if len(pause.kinds) == 1:
                found[pause.kinds[0]].append(pause.seconds)
        return found

    def mean_recovery_s(self) -> float:
        found = self.recoveries()
        return max(1.0, sum(fmean(found[kind]) for kind in INTERRUPTING if found.get(kind)) / len(KINDS))

    def strike(self, kind: str) -> None:
        kill = self._outage(kind) if kind in OUTAGES else self._death(kind)
        at, hit = time.time(), kill is not None
        if kill is not None:
            try:
                kill()
            except psutil.NoSuchProcess:
                hit = False
        self.kills.append(Kill(kind, at, hit))
        print(f"killed: {self.kills[-1]}", flush=True)

    def _death(self, kind: str) -> Callable[[], object] | None:
        """Choose a process of a kind; rather a worker that trains than one that stands by or waits."""
        if kind == "worker":
            alive, trains = workers(self.service), device.training(self.folder)
            found = [one for one in alive if one.pid in trains] or alive
        else:
            found = [one for one in family(self.service) if is_kind(command(one), kind)]
        return random.choice(found).kill if found else None

    def _outage(self, kind: str) -> Callable[[], object] | None:
        server = self.s3 if kind == "s3" else self.mlflow
        if server.process is None or any(one.is_alive() and one.name == kind for one in self._restarts):
            return None
        restart = threading.Thread(target=self._restart, args=(server, random.uniform(*OUTAGE_S)), name=kind)
        self._restarts = [*(one for one in self._restarts if one.is_alive()), restart]

        def kill() -> None:
            server.kill()
            restart.start()

        return kill

    @staticmethod
    def _restart(server: Gateway | TrackingServer, after_s: float) -> None:
        time.sleep(after_s)
        server.start()

    def end(self) -> None:
        self.over.set()
        for one in self._restarts:
            one.join()


def is_kind(words: list[str], kind: str) -> bool:
    if kind == "driver":  # and not the shell that it was started by
        return len(words) > 1 and words[1].endswith("jobs/imagenet_deit.py")
    return "TrainController" in " ".join(words)


@dataclass
class Sample:
    """What there is at one moment while all is well."""

    processes: int
    bytes: dict[int, int]
    """Resident, of each process."""
    descriptors: dict[int, int]
    files: dict[str, int]
    """In each of the watched folders."""


@dataclass
class Watch:
    """Looks at the cluster and at folders now and then."""

    storm: Storm
    folders: dict[str, Callable[[], int]]
    """Counts of files, by what they are."""
    names: dict[int, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def run(self) -> None:
        while not self.storm.over.wait(3):
            with contextlib.suppress(psutil.Error, OSError):  # what went away while it was looked at
                if self.storm.well():
                    self.samples.append(self._look())

    def _look(self) -> Sample:
        found = family(self.storm.service)
        for one in found:
            self.names.setdefault(one.pid, " ".join(command(one))[-60:])
        return Sample(
            processes=len(found),
            bytes={one.pid: one.memory_info().rss for one in found},
            descriptors={one.pid: one.num_fds() for one in found},
            files={name: count() for name, count in self.folders.items()},
        )

    def growth(self) -> dict[str, float]:
        """Return by how much the last third's medians are above the first third's.

        Memory and descriptors are those of the processes that lived all the time.
        """
        third = len(self.samples) // 3
        assert third > 3, "too short to see anything grow"
        early, late = self.samples[:third], self.samples[-third:]
        lasting = set.intersection(*(set(one.bytes) for one in self.samples))

        def grown(value: Callable[[Sample], float]) -> float:
            return median(map(value, late)) - median(map(value, early))

        found = {
            "processes": grown(lambda one: one.processes),
            "bytes": grown(lambda one: sum(one.bytes[pid] for pid in lasting)),
            "descriptors": grown(lambda one: sum(one.descriptors[pid] for pid in lasting)),
        }
        for pid in lasting:
            print(
                self.names[pid],
                round(grown(lambda one, pid=pid: one.bytes[pid]) / 2**20, 1),
                "MiB",
                grown(lambda one, pid=pid: one.descriptors[pid]),
                "descriptors",
            )
        for name in self.folders:
            found[name] = grown(lambda one, name=name: one.files[name])
        return found


def count_files(folder: Path, but: str = "") -> int:
    """The files and folders below one, without those of a folder in it."""
    return sum(
        len(names) + len(folders)
        for place, folders, names in os.walk(folder)
        if not but or but not in Path(place).relative_to(folder).parts
    )
