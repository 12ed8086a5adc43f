"""How long training steps take: a device's own events around a window, or this process's clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """Seconds of a step: by the device's events or the clock, and of CPU time of this process, all threads."""

    step_s: float
    cpu_s: float


def window(run: Callable[[int], None], steps: int, device: torch.device) -> Window:
    """Time `run(steps)`; a GPU is waited for before and after, not within."""
    if device.type != "cuda":
        wall, cpu = time.perf_counter(), time.process_time()
        run(steps)
        return Window((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    start.record()
    run(steps)
    end.record()
    cpu = time.process_time() - cpu  # of queueing: what the host needs to keep the device busy
    torch.cuda.synchronize(device)
    return Window(start.elapsed_time(end) / 1e3 / steps, cpu / steps)


def interleaved(
    works: Mapping[str, Callable[[int], None]],
    *,
    rounds: int,
    steps: int,
    device: torch.device,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Window]]:
    """For each work a window a round, which is the mean of two: a round goes through all works there and back.

    So whatever drifts (clocks, heat, other programs) meets all works alike.
    """
    found: dict[str, list[Window]] = {name: [] for name in works}
    for number in range(1, rounds + 1):
        note(f"round {number} of {rounds}")
        halves: dict[str, list[Window]] = {name: [] for name in works}
        for name in [*works, *reversed(list(works))]:
            halves[name].append(window(works[name], steps, device))
        for name, pair in halves.items():
            found[name].append(_mean(pair))
    return found


def _mean(windows: Sequence[Window]) -> Window:
    return Window(
        sum(each.step_s for each in windows) / len(windows),
        sum(each.cpu_s for each in windows) / len(windows),
    )


def first_step_s(run: Callable[[int], None], device: torch.device) -> float:
    """Seconds of the first step, compilation and the optimizer's state included."""
    wall = time.perf_counter()
    run(1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall
