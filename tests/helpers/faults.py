"""What the tests of faults share: strikes at a chosen moment, and the table of what they cost."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil

from helpers.service import ROOT, Service, alone
from lape_ray.training.checkpoint import DamagedError, verify

# 20 epochs of 5 steps, each a log step; checkpoints after the third step and the last. Long enough for a fault within.
LONG: dict[str, object] = {
    "optim__epochs": 20,
    "run__eval_epochs": 20,
    "run__checkpoint_steps": 3,
    "run__log_steps": 1,
}


@dataclass
class Strike:
    """Something that happens in a thread, once `when` is true."""

    when: Callable[[], bool]
    action: Callable[[], object]
    at: float = 0.0
    """When, in seconds since 1970; 0: not yet."""

    def run(self) -> None:
        while not self.when():
            time.sleep(0.01)
        self.at = time.time()
        self.action()

    @contextmanager
    def armed(self) -> Iterator[Strike]:
        thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        yield self
        thread.join(30)
        assert self.at, "the run ended before anything could happen to it"


def stored(run: Path, steps: int) -> Callable[[], bool]:
    """Whether a checkpoint of a LONG run after so many steps, or a later one, is in its folder.

    Which of those within an epoch there are depends on how long storing takes.
    """

    def found() -> bool:
        reached = [0]
        for path in run.glob("checkpoint-*"):
            kind, number = path.name.split("-")[1:3]
            reached.append(int(number) * (5 if kind == "epoch" else 1))
        return max(reached) >= steps

    return found


def whole(run: Path) -> set[str]:
    """The checkpoints of a run whose files all have their checksums."""
    found = set()
    for path in run.glob("checkpoint-*"):
        with contextlib.suppress(DamagedError, OSError):
            verify(path)
            found.add(path.name)
    return found


def job(service: Service, name: str, *words: str, own_ray: bool = False) -> subprocess.Popen[str]:
    """The driver of a LONG run as a process of its own, and as its terminal's first; its output is one stream.

    With `own_ray` it starts a Ray of its own instead of using the service's.
    """
    changes = [f"--{key.replace('__', '.')}={value}" for key, value in LONG.items()]
    command = [sys.executable, "-u", str(ROOT / "jobs/imagenet_deit.py"), "smoke", f"--run.name={name}"]
    command += [*service.data(), *changes, "--tracking.pages=false", *words]
    environment = dict(os.environ)
    if own_ray:
        for variable in service.cluster.environment:
            environment.pop(variable, None)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def contest(service: Service, name: str, began: Callable[[], bool], *words: str, own_ray: bool) -> str:
    """Submit a run twice more while it trains, from another Ray, kill its driver and submit it again; the last output.

    The run is so long that it cannot end meanwhile. It is compared with an undisturbed one up to some epochs after the
    kill.
    """
    words = (*words, "--optim.epochs=1000")
    refused: list[tuple[int, str]] = []
    first = job(service, name, *words, own_ray=own_ray)

    def submit_and_kill() -> None:
        for more in ((), ("--run.overwrite=true",)):
            process = job(service, name, *words, *more, own_ray=not own_ray)
            output, _ = process.communicate(timeout=120)
            refused.append((process.returncode, output))
        first.kill()

    strike = Strike(began, submit_and_kill)
    with strike.armed():
        printed, _ = first.communicate(timeout=600)
    assert first.returncode == -signal.SIGKILL, printed
    assert len(refused) == 2
    for code, output in refused:
        assert code == 2, output
        assert f"belongs to process {first.pid} on" in output
        assert "overwrite" not in output
    # Its workers may go on for a second, in which they train a dozen epochs more than were printed.
    last = max(int(epoch) for epoch in re.findall(r"epoch +(\d+)/1000", printed)) + 60
    second = job(service, name, *words, f"--run.stop_after_epochs={last}", own_ray=not own_ray)
    output, _ = second.communicate(timeout=600)
    assert second.returncode == 0, output
    assert re.search(r"continuing after epoch [1-9]", output), output
    fields = {**LONG, "optim__epochs": 1000, "run__stop_after_epochs": last}
    assert service.losses(service.run_of(output)) == alone(service.config(**fields)).losses
    return output


def family(service: Service) -> list[psutil.Process]:
    """The processes of the cluster."""
    return psutil.Process(service.cluster.pid).children(recursive=True)


def command(process: psutil.Process) -> list[str]:
    """Its command line; nothing where it has gone away."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def workers(service: Service) -> list[psutil.Process]:
    """The training processes of the cluster, in the order in which they started."""
    found = [one for one in family(service) if "RayTrainWorker" in " ".join(command(one))]
    return sorted(found, key=lambda process: process.create_time())


def busy(service: Service) -> list[psutil.Process]:
    """Those of the training processes that do not stand by."""
    before = {process: sum(process.cpu_times()[:2]) for process in workers(service)}
    time.sleep(0.5)
    return [process for process, seconds in before.items() if sum(process.cpu_times()[:2]) > seconds + 0.05]


def add_row(fault: str, recovery_s: float | None, steps_repeated: int | None) -> None:
    """Add what a fault cost to the table at $LAPE_RAY_FAULT_TABLE, if there is one."""
    row = {"fault": fault, "recovery_s": recovery_s, "steps_repeated": steps_repeated}
    print(row)
    if table := os.environ.get("LAPE_RAY_FAULT_TABLE"):
        with Path(table).open("a") as opened:
            opened.write(json.dumps(row) + "\n")


def longest_pause(points: Sequence[tuple[int, float]], struck: float) -> tuple[float | None, int]:
    """Of (step, seconds since 1970): the longest time without a new step from `struck` on, and the step before it."""
    reached, last, found = 0, struck, (0.0, 0)
    for step, when in sorted(points, key=lambda point: point[1]):
        if step <= reached:  # computed again
            continue
        if when > struck:
            found = max(found, (when - last, reached))
        reached, last = step, max(when, struck)
    return (found[0] or None, found[1])


def note_cost(
    service: Service, run_id: str, fault: str, struck: float, output: str = "", until: float = math.inf
) -> float | None:
    """Note for how long a run came no further, and how many steps it computed again, as its output tells.

    Returns those seconds. `until` is when something else happens.
    """
    history = mlflow.MlflowClient(service.uri).get_metric_history(run_id, "train/loss")
    points = [(point.step, point.timestamp / 1000) for point in history if point.timestamp / 1000 < until]
    pause, before = longest_pause(points, struck)
    resumed = re.findall(r"continuing after epoch (\d+) of \d+(?: and step (\d+) of (\d+))?", output)
    repeated = None
    if resumed:
        epoch, step, _ = resumed[-1]
        repeated = max(0, before - (5 * int(epoch) + int(step or 0)))
    add_row(fault, None if pause is None else round(pause, 1), repeated)
    return pause


def seconds_to_import() -> float:
    """How long this machine takes now for a process that imports what a worker needs, on a quiet one about 4 s."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import ray.train.torch, torch._dynamo, mlflow"], check=True)
    return time.monotonic() - began
