"""`jobs/benchmark.py ray`: the same training loop under Ray Train and under torchrun, by turns.

Both start the same number of processes with the same number of threads, each runs the same steps (gradients averaged
by DistributedDataParallel), and Ray's daemons are up all the time, so that they disturb both alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lape_ray.bench.goals import ray_targets
from lape_ray.bench.record import begin, finish, ratio, spread
from lape_ray.bench.step import Note, Row, Save
from lape_ray.bench.targets import judge
from lape_ray.local_cluster import local_cluster

TIMEOUT_S = 900  # of one launch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        model: of `synthetic.MODELS`; small, so that what a launcher costs a step shows
        workers, threads: processes, and threads of each on a CPU; on a GPU each process takes one
        batch_size: of each process
        steps: that are timed one by one in a round, after `warmup_steps`
        reports: calls of `ray.train.report`
    """

    device: str = "cpu"
    model: str = "vit_lite"
    workers: int = 2
    threads: int = 1
    batch_size: int = 2
    steps: int = 150
    warmup_steps: int = 20
    reports: int = 20
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "batch_size", "steps", "warmup_steps", "reports", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")

    def quick(self) -> Settings:
        """The same in seconds, for tests: its times mean nothing."""
        return dataclasses.replace(
            self, model="toy", batch_size=2, steps=5, warmup_steps=2, reports=2, rounds=1
        )


def run(settings: Settings, note: Note, save: Save = lambda record: None) -> Row:
    """The record of a whole run.

    Raises:
        RuntimeError: a launch failed (with what it printed), or the launchers gave different threads.
    """
    record = begin("ray", dataclasses.asdict(settings), device=settings.device)
    rounds: dict[str, list[Row]] = {"torchrun": [], "ray": []}
    started = time.monotonic()
    with _cluster(settings) as environment:
        cluster_s = time.monotonic() - started
        for number in range(1, settings.rounds + 1):
            for name in rounds if number % 2 else reversed(rounds):  # there and back
                note(f"round {number} of {settings.rounds}: {name}")
                launch = torchrun if name == "torchrun" else ray_train
                rounds[name].append(launch(settings, environment))
    _check_equal(rounds)
    sections = record["sections"]
    sections["steps"] = [_row(name, found) for name, found in rounds.items()]
    by_name = {row["name"]: row for row in sections["steps"]}
    sections["ratios"] = [
        {"over": "ray", "under": "torchrun"}
        | {key: ratio(by_name["ray"][key], by_name["torchrun"][key]) for key in ("step_s", "cpu_s")}
    ]
    calls = [ms for found in rounds["ray"] for ms in found["report_ms"]]
    sections["report"] = [{"name": "ray", "calls": len(calls), "report_ms": spread(calls)}]
    record["cluster_start_s"] = cluster_s
    record["targets"] = judge(sections, ray_targets())
    finish(record)
    save(record)
    return record


def _row(name: str, rounds: list[Row]) -> Row:
    return {
        "name": name,
        "threads": rounds[0]["threads"],
        "step_s": spread([statistics.median(found["steps_s"]) for found in rounds]),
        "cpu_s": spread([found["cpu_s"] for found in rounds]),
        "startup_s": spread([found["startup_s"] for found in rounds]),
    }


def _check_equal(rounds: dict[str, list[Row]]) -> None:
    """Another number of threads or processes, or another loss, would be another experiment."""
    for key in ("threads", "workers", "loss"):
        values = {name: {found[key] for found in each} for name, each in rounds.items()}
        if len(set.union(*values.values())) != 1:
            raise RuntimeError(f"torchrun and Ray Train ran different things: {key} was {values}")


@contextlib.contextmanager
def _cluster(settings: Settings) -> Iterator[dict[str, str]]:
    """The environment of a Ray: of the cluster at RAY_ADDRESS, else of one of our own that ends with the context."""
    if os.environ.get("RAY_ADDRESS"):
        yield {}
        return
    with local_cluster(num_cpus=settings.workers * settings.threads) as cluster:
        yield cluster.environment


def torchrun(settings: Settings, environment: Mapping[str, str]) -> Row:
    """One launch by torchrun; what rank 0 measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["torch.distributed.run", f"--nproc-per-node={settings.workers}", "--master-addr=127.0.0.1",
               f"--master-port={port}", "-m", "lape_ray.bench.rank"]  # fmt: skip
    return _launch(command, settings, {"OMP_NUM_THREADS": str(settings.threads)})


def ray_train(settings: Settings, environment: Mapping[str, str]) -> Row:
    """One launch by Ray Train in the cluster of `environment`; what rank 0 measured."""
    return _launch(["lape_ray.bench.driver"], settings, environment)


def _launch(module: Sequence[str], settings: Settings, environment: Mapping[str, str]) -> Row:
    """Run a module in a process of its own; the clock starts here, before Python does."""
    with tempfile.TemporaryDirectory(prefix="lape_ray-benchmark-") as folder:
        out = Path(folder) / "out.json"
        job = json.dumps({**dataclasses.asdict(settings), "started": time.time(), "out": str(out)})
        done = subprocess.run(
            [sys.executable, "-m", *module, job],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            raise RuntimeError(f"{module[0]} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
        found: Row = json.loads(out.read_text())
        return found
