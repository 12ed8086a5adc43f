"""A device for steps on a CPU: each takes STEP_S, in which its process sleeps, as it would beside a GPU.

So many processes can train on few cores, and hours of steps can be compared with what one process computes in minutes:
the losses are those without it. Ray calls `install` in every worker process of a job whose runtime environment has
`worker_process_setup_hook: helpers.device.install` and the variable LAPE_RAY_TEST_DEVICE, a folder. There each process
touches the file of its id at every step, and writes into it when the first step of a training is done.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

STEP_S = 0.4
FOLDER = "LAPE_RAY_TEST_DEVICE"
LOOP = "lape_ray.training.loop"
ALIVE_S = 3 * STEP_S  # a process that made no step for so long does not train


class _Slower(importlib.abc.MetaPathFinder):
    """Waits for the training loop to be imported: most of a job's processes never need torch."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != LOOP:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _slow_down(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    sys.meta_path.insert(0, _Slower())


def _slow_down(loop: Any) -> None:
    compute, file = loop.optimizer_step, Path(os.environ[FOLDER], str(os.getpid()))
    latest = None  # the training that made the last step

    def step(state: object, *words: Any, **options: Any) -> Any:
        nonlocal latest
        began = time.monotonic()
        loss = compute(state, *words, **options)
        time.sleep(max(0.0, began + STEP_S - time.monotonic()))
        if state is latest:
            os.utime(file)
        else:
            latest = state
            with file.open("a") as opened:
                opened.write(f"{time.time()}\n")
        return loss

    loop.optimizer_step = step


def training(folder: Path) -> set[int]:
    """Return the ids of the processes that train at this moment."""
    since = time.time() - ALIVE_S
    return {int(path.name) for path in folder.iterdir() if path.stat().st_mtime > since}


def beginnings(folder: Path) -> list[float]:
    """Return when trainings had made their first step, in seconds since 1970; one for each of a group's processes."""
    return sorted(float(line) for path in folder.iterdir() for line in path.read_text().split())


def last_step(folder: Path) -> float:
    """Return when the last step of all was done."""
    return max(path.stat().st_mtime for path in folder.iterdir())
