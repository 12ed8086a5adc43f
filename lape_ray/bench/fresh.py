"""What only a fresh process shows: how much memory a loader takes, whether that grows, and how soon it delivers."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from pathlib import Path
from typing import Any

from lape_ray.bench import isolated
from lape_ray.bench.contenders import FFCV, OURS, Job
from lape_ray.bench.record import spread

# What a contender would otherwise import as it is made.
MODULES = {
    OURS: ("lape_ray.data.loader", "lape_ray.data.native_reader"),
    FFCV: ("ffcv.loader", "ffcv.fields.rgb_image", "ffcv.transforms"),
}


def memory(job: Job, epochs: int) -> dict[str, Any]:
    """Resident memory of a fresh process with our loader, in bytes, without what is mapped from files.

    Returns:
        peak_bytes: the most there was at any time, Python, torch and buffers included
        epochs_growth_bytes: over `epochs` epochs, after the first tenth of them
        exits_growth_bytes: over as many epochs that are left after one batch
        threads_left: more threads at the end than after the first epochs
    """
    found: dict[str, Any] = isolated.call(_memory, job, epochs)
    return found


def _memory(job: Job, epochs: int) -> dict[str, Any]:
    from lape_ray.bench.contenders import ours

    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    epoch = ours(job)

    def run(numbers: range, *, whole: bool) -> int:
        for number in numbers:
            with contextlib.closing(epoch(number)) as batches:
                next(batches)
                if whole:
                    list(batches)
        return _resident_bytes()

    warm = max(1, epochs // 10)
    first, threads = run(range(warm), whole=True), threading.active_count()
    second = run(range(warm, warm + epochs), whole=True)
    third = run(range(warm + epochs, warm + 2 * epochs), whole=False)
    left = threading.active_count() - threads
    stop.set()
    watcher.join()
    return {
        "peak_bytes": max(peak[0], first, second, third),
        "epochs_growth_bytes": second - first,
        "exits_growth_bytes": third - second,
        "threads_left": left,
        "epochs": epochs,
        "batch_size": job.batch_size,
    }


def _resident_bytes() -> int:
    """Anonymous and shared memory that is resident; pages of files (the .beton, libraries) are not counted."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def start_up(name: str, job: Job, rounds: int) -> dict[str, Any]:
    """Seconds from the start of a process to its first batch, as spreads: `import_s`, `rest_s`, `total_s`.

    A contender that is not installed has `missing` instead, which says why.
    """
    imports, totals = [], []
    for _ in range(rounds):
        # The clock counts from the machine's start and is the same in all processes.
        answer = isolated.call(_first_batch, name, job, time.monotonic())
        if isinstance(answer, str):
            return {"name": name, "missing": answer}
        imports.append(answer[0])
        totals.append(answer[1])
    rests = [total - part for total, part in zip(totals, imports, strict=True)]
    return {"name": name, "import_s": spread(imports), "rest_s": spread(rests), "total_s": spread(totals)}


def _first_batch(name: str, job: Job, started: float) -> tuple[float, float] | str:
    """Seconds since `started` when all modules are imported and when the first batch is there, or what is missing."""
    from lape_ray.bench.contenders import CONTENDERS

    try:
        for module in MODULES[name]:
            importlib.import_module(module)
        imported = time.monotonic() - started
        with contextlib.closing(CONTENDERS[name](job)(0)) as batches:
            next(batches)
            first = time.monotonic() - started
    except ImportError as error:
        return f"not installed: {error}"
    except isolated.CannotRunError as error:
        return f"cannot run: {error}"
    return imported, first
