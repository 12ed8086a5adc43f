"""Measured values, and what must be known to read them later: machine, versions, commit, load.

A record is plain JSON: `schema`, `benchmark`, `started`, `ended`, `machine`, `versions`, `commit`, `load_average`,
`settings`, `sections` (lists of rows, by name) and `targets`. `SCHEMA` is raised when a reader of the last one
would misread the new one.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
PACKAGES = ("torch", "torchvision", "pillow", "numpy", "ffcv", "numba", "timm", "ray", "lape_ray")
ROOT = Path(__file__).resolve().parent.parent.parent


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest of the rounds of a measurement, and the rounds themselves."""
    if not values:
        raise ValueError("a measurement has no rounds; set rounds to 1 or more")
    rounds = [float(value) for value in values]
    return {"median": statistics.median(rounds), "low": min(rounds), "high": max(rounds), "rounds": rounds}


def ratio(over: Mapping[str, Any], under: Mapping[str, Any]) -> dict[str, Any]:
    """The spread of over / under, round by round: what disturbs a round meets both."""
    pairs = zip(over["rounds"], under["rounds"], strict=True)
    return spread([a / b for a, b in pairs])


def begin(benchmark: str, settings: Mapping[str, Any], *, device: str = "cpu") -> dict[str, Any]:
    """The head of a record; `finish` completes it."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "started": _now(),
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "load_average": {"start": list(os.getloadavg())},
        "settings": dict(settings),
        "sections": {},
        "targets": [],
    }


def finish(record: dict[str, Any]) -> None:
    record["load_average"]["end"] = list(os.getloadavg())
    record["ended"] = _now()


def save(record: Mapping[str, Any], path: Path) -> None:
    """Write the record as JSON; a value that JSON has no word for (NaN) is a ValueError."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, CPUs this process may use, memory in bytes, system, and the accelerator where one is used."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    found: dict[str, Any] = {
        "processor": names[0] if names else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    if device != "cpu":
        import torch

        properties = torch.cuda.get_device_properties(torch.device(device))
        found["accelerator"] = properties.name
        found["accelerator_bytes"] = properties.total_memory
    return found


def versions() -> dict[str, str | None]:
    """Of Python and of what is measured or measures; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit, with `+` if files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None  # installed below somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def heading(record: Mapping[str, Any]) -> str:
    """Where and when, in three lines for people."""
    where, load = record["machine"], record["load_average"]
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    accelerator = f", {where['accelerator']}" if "accelerator" in where else ""
    return (
        f"{where['processor']}, {where['cpus']} CPUs, {where['memory_bytes'] / 2**30:.0f} GB{accelerator}\n"
        f"{known}; commit {(record['commit'] or 'unknown')[:12]}\n"
        f"{record['started']}; load average {load['start'][0]:.1f} at the start, {load['end'][0]:.1f} at the end"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
