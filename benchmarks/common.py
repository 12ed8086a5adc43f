"""Share what the benchmarks need: candidates in separate processes, rounds there and back, a record, a table.

In one process candidates would get in each other's way: FFCV sets the threads of numba and torch for all, DataLoader
forks, and neither memory nor CPU time could be told apart. Rounds are interleaved, so that what drifts (clocks, heat,
other programs) meets all candidates alike.

Needs the standard library only, so that a machine without the peers can import it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lape_ray.cli import run_job

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "triton", "pillow", "numpy", "ffcv", "timm", "ray", "lape_ray")
TIMEOUT_S = 600  # for a process to import, compile and warm up on a busy machine
STARTED = time.perf_counter()

Row = dict[str, Any]


# ---- candidates


class CannotRunError(RuntimeError):
    """The candidate is installed but cannot do its job on this machine; says why."""


@dataclass(frozen=True)
class Candidate:
    """The work that one process times.

    Attributes:
        work: runs the round of that number and returns its images; waits for the device
        facts: what else is known of the candidate
        lead: runs before each round and is not timed
    """

    work: Callable[[int], int]
    facts: Row
    lead: Callable[[], object] = lambda: None


class Sample(NamedTuple):
    """One round; CPU time is user and system time of all threads and processes of the candidate."""

    images: int
    cpu_s: float
    wall_s: float


def interleaved(
    candidates: Mapping[str, tuple[Callable[[Any], Candidate], Any]],
    rounds: int,
    note: Callable[[str], None],
) -> list[Row]:
    """Run interleaved rounds of candidates, each in a separate process.

    Nothing is timed before every candidate is made and has run once: one that refuses (a wrong result, say) stops all.

    Args:
        candidates: by name, a function and its argument; called in the process, it makes the candidate.
        rounds: of each candidate; 0 makes all of them and times nothing.
        note: is told what happens.

    Returns:
        For each candidate its `name`, its facts and, as spreads over the rounds, `cpu_ms` and `wall_ms` of an image
        and `images_per_second`; or `missing`, which says why it cannot run.

    Raises:
        RuntimeError: a candidate failed; with its traceback.
    """
    rows: dict[str, Row] = {}
    running: dict[str, Connection] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    # A process that compiles or imports wants some cores.
    at_once = max(1, len(os.sched_getaffinity(0)) // 4)
    names = list(candidates)
    with contextlib.ExitStack() as stack:
        for first in range(0, len(names), at_once):
            group = names[first : first + at_once]
            started = {name: stack.enter_context(_process(*candidates[name])) for name in group}
            for name, connection in started.items():
                note(f"{name}: warming up")
                rows[name] = {"name": name, **_answer(connection, name)}
                if "missing" not in rows[name]:
                    running[name] = connection
        for number in range(1, rounds + 1):
            note(f"round {number} of {rounds}")
            for name in running if number % 2 else reversed(running):
                running[name].send(number)
                samples[name].append(_answer(running[name], name))
    for name in running if rounds else ():
        rows[name] |= _spreads(samples[name])
    return list(rows.values())


def _spreads(samples: Sequence[Sample]) -> Row:
    return {
        "cpu_ms": spread([1e3 * sample.cpu_s / sample.images for sample in samples]),
        "wall_ms": spread([1e3 * sample.wall_s / sample.images for sample in samples]),
        "images_per_second": spread([sample.images / sample.wall_s for sample in samples]),
    }


@contextlib.contextmanager
def _process(make: Callable[[Any], Candidate], argument: Any) -> Iterator[Connection]:
    """Start a process that serves one candidate, and end it with the context."""
    # Spawned: a fork would take over this process's memory and threads.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, argument))
    process.start()
    there.close()
    try:
        yield here
    except BaseException:
        process.terminate()  # it may be in the middle of minutes of compilation
        raise
    finally:
        here.close()  # which ends the process's loop
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
            process.join()


def _answer(connection: Connection, name: str) -> Any:
    if not connection.poll(TIMEOUT_S):
        raise RuntimeError(f"{name} has not answered for {TIMEOUT_S} s")
    try:
        answer, error = connection.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} died; is the machine out of memory?") from None
    if error:
        raise RuntimeError(f"{name} failed, and nothing was timed after that:\n{error}")
    return answer


def _serve(connection: Connection, make: Callable[[Any], Candidate], argument: Any) -> None:
    """Make a candidate, send its facts, then run a round for each number; answers are pairs of a value and an error."""
    try:
        try:
            candidate = make(argument)
            candidate.work(0)
        except (ImportError, CannotRunError) as error:
            why = "not installed" if isinstance(error, ImportError) else "cannot run"
            connection.send(({"missing": f"{why}: {error}"}, None))
            return
        connection.send((candidate.facts, None))
        while True:
            number = connection.recv()
            candidate.lead()
            cpu_s, wall_s = _cpu_seconds(), time.perf_counter()
            images = candidate.work(number)
            wall_s = time.perf_counter() - wall_s
            connection.send((Sample(images, _cpu_seconds() - cpu_s, wall_s), None))
    except EOFError:  # the parent is done
        return
    except Exception:
        connection.send((None, traceback.format_exc()))


def _cpu_seconds() -> float:
    """Return user and system time of this process and of its living children (theirs to 10 ms each)."""
    spent = time.process_time()
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it ends just now
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


# ---- values


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, lowest and highest of the rounds of a measurement, and the rounds themselves."""
    if not values:
        raise ValueError("a measurement has no rounds; set rounds to 1 or more")
    rounds = [float(value) for value in values]
    return {"median": statistics.median(rounds), "low": min(rounds), "high": max(rounds), "rounds": rounds}


def add_ratios(rows: Sequence[Row], references: Mapping[str, str], key: str) -> None:
    """Add to rows how long they take over another row, round by round: `over`, a spread, and `of`, the other's name.

    Args:
        references: by a row's name, the other's; a row that was not timed gets no ratio.
        key: of the times.
    """
    timed = {row["name"]: row for row in rows if key in row}
    for name, row in timed.items():
        if (other := references.get(name)) in timed:
            pairs = zip(row[key]["rounds"], timed[other][key]["rounds"], strict=True)
            row |= {"over": spread([one / two for one, two in pairs]), "of": other}


# ---- records


class Record:
    """A JSON file with the rows of a measurement, written again after each addition.

    Attributes:
        content: `schema`, `benchmark`, `started`, `ended`, `machine`, `versions`, `commit`, `load_average`, `settings`
            and `sections`, which are lists of rows by name
    """

    def __init__(
        self, benchmark: str, settings: Mapping[str, Any], *, path: Path | None, device: str = "cpu"
    ) -> None:
        self.path = path
        self.sections: dict[str, list[Row]] = {}
        self.content: dict[str, Any] = {
            "schema": 2,
            "benchmark": benchmark,
            "started": _now(),
            "ended": None,
            "machine": machine(device),
            "versions": versions(),
            "commit": commit(),
            "load_average": {"start": list(os.getloadavg())},
            "settings": json.loads(json.dumps(dict(settings), default=str)),
            "sections": self.sections,
        }

    def add(self, section: str, rows: Sequence[Row]) -> None:
        """Add rows to a section, and write the file."""
        self.sections.setdefault(section, []).extend(rows)
        self.save()

    def save(self) -> None:
        """Write the file, if one was asked for; a value that JSON has no word for (NaN) is a ValueError."""
        self.content["ended"] = _now()
        self.content["load_average"]["end"] = list(os.getloadavg())
        text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(self.path.name + ".part")
            beside.write_text(text)
            beside.replace(self.path)

    def heading(self) -> str:
        """Return where and when, in three lines for people."""
        where, load = self.content["machine"], self.content["load_average"]["start"][0]
        known = ", ".join(
            f"{name} {version}" for name, version in self.content["versions"].items() if version
        )
        accelerator = f", {where['accelerator']}" if "accelerator" in where else ""
        commit = self.content["commit"] or "unknown"
        return (
            f"{where['processor']}, {where['cpus']} CPUs, {where['memory_bytes'] / 2**30:.0f} GB{accelerator}\n"
            f"{known}; commit {commit[:12]}{'+' * commit.endswith('+')}\n"
            f"{self.content['started']}; load average {load:.1f} at the start"
        )


def machine(device: str = "cpu") -> Row:
    """Return the processor, the CPUs this process may use, memory in bytes, the system and the accelerator in use."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    found: Row = {
        "processor": names[0] if names else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    if device != "cpu":
        import torch

        properties = torch.cuda.get_device_properties(torch.device(device))
        found |= {"accelerator": properties.name, "accelerator_bytes": properties.total_memory}
    return found


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of what is measured or measures; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Return the checkout's commit, with `+` if files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None  # unpacked below somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---- tables and command lines


class Column(NamedTuple):
    """A column of a table: the value of `key`, times `scale`, by a format."""

    heading: str
    key: str
    form: str = ",.2f"
    scale: float = 1.0


def table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return aligned lines of text: numbers and spreads stand right, and why a row has none stands at its end.

    Columns without any value are left out.
    """
    columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    texts = [[_cell(row.get(column.key), column) for column in columns] for row in rows]
    widths = [max(map(len, (column.heading, *cells))) for column, *cells in zip(columns, *texts, strict=True)]
    right = [any(isinstance(row.get(c.key), int | float | dict) for row in rows) for c in columns]

    def line(cells: Sequence[str], end: str = "") -> str:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ]
        return "  ".join([*padded, end]).rstrip()

    lines = [line(cells, row.get("missing", "")) for cells, row in zip(texts, rows, strict=True)]
    ruler = "  ".join("-" * width for width in widths)
    return "\n".join([title, line([column.heading for column in columns]), ruler, *lines])


def _cell(value: Any, column: Column) -> str:
    """Return the text of a value; of a spread `median (lowest to highest)`, of nothing nothing."""
    if isinstance(value, dict):
        median, low, high = (
            format(value[name] * column.scale, column.form) for name in ("median", "low", "high")
        )
        return f"{median} ({low} to {high})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(value * column.scale, column.form)
    return "" if value is None else str(value)


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--rounds", type=int, default=rounds, help="interleaved rounds (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="the record; see README.md beside this file")
    add("--smoke", action="store_true", help="tiny sizes, to see that it runs: its times mean nothing")
    return made


def note(text: str) -> None:
    """Say on standard error what happens, with the seconds since the start."""
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main function; SIGTERM ends it with its processes and temporary files."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_job(main)
