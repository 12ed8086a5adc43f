"""The journal of a run, in its folder: when commands and training processes began, and what they spent their time on.

    journal/command-*.json    one for each submission, written by its driver as it begins and ends
    journal/attempt-*.json    one for each start of the training processes, written by rank 0

Nobody writes into another's file, and each is written whole, so that a process that is killed leaves what it wrote
last. An attempt is written before each checkpoint counts, every WRITE_S seconds beside that, and at its end: a kill
takes at most the seconds since then, which are part of what it takes to notice the failure.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from lape_ray import storage
from lape_ray.cluster.group import Group
from lape_ray.cluster.run import Run
from lape_ray.report.goodput import Attempt, Command, Division, checkpoint_interval_s, divide
from lape_ray.training.times import CHECKPOINT, STEPS, Times

log = logging.getLogger(__name__)
FOLDER = "journal"
WRITE_S = 10.0
SHORTEST_S = 10.0  # between two checkpoints whose interval is `auto`
FIRST_COST_S = 1.0  # what a checkpoint is taken to cost before one was made
MARKS = 256  # of an attempt; of more, every second one of the older half is left out
WAY_OUT = "delete it, and the division of the run's time leaves out what it tells"


@dataclass(frozen=True)
class Journal:
    """Hold what is written so far."""

    commands: tuple[Command, ...]
    attempts: tuple[Attempt, ...]

    def division(self, *attempts: Attempt, now: float | None = None) -> Division:
        """Divide the run's time, with these attempts beside the written ones."""
        return divide(self.commands, (*self.attempts, *attempts), now=now)


def read_journal(folder: str) -> Journal:
    """Read the journal of the run in `folder`; a damaged file is left out, and a warning names it.

    Raises:
        OSError: the storage is away.
    """
    found: dict[type, list[Command | Attempt]] = {Command: [], Attempt: []}
    where = storage.join(folder, FOLDER)
    for name in storage.names(where):
        kind = Command if name.startswith("command-") else Attempt
        try:
            found[kind].append(storage.read_record(kind, storage.join(where, name), way_out=WAY_OUT))
        except FileNotFoundError:  # a temporary one
            continue
        except ValueError as error:
            log.warning("%s", error)
    return Journal(tuple(found[Command]), tuple(found[Attempt]))  # type: ignore[arg-type]


@contextlib.contextmanager
def written_command(folder: str, lease: str, began: float) -> Iterator[Callable[[], None]]:
    """Give what writes that a command is alive, which began in seconds since 1970; its end is written, too.

    Nothing is written at the end of the block where nothing was within it: the folder may not be the run's.

    Args:
        lease: the command's, on the run's folder.
    """
    written = False

    def write() -> None:
        nonlocal written
        _write(folder, lease, "command", Command(began=began, until=time.time()))
        written = True

    try:
        yield write
    finally:
        if written:
            _or_warn(write)


def _or_warn(write: Callable[[], None]) -> None:
    """Write; a failure is a warning, as what is lost is a number for people."""
    try:
        write()
    except Exception as error:
        log.warning("the journal of the run's time cannot be written: %s", error)


def _write(folder: str, lease: str, kind: str, record: Command | Attempt) -> None:
    storage.check_lease(folder, lease)
    name = f"{kind}-{round(1000 * record.began)}.json"
    storage.write_record(storage.join(folder, FOLDER, name), asdict(record))


class AttemptWriter:
    """Rank 0's file of an attempt. All but `save` is for the training's thread.

    Args:
        attempt: as it begins.
        earlier: the journal before it.
    """

    def __init__(self, run: Run, attempt: Attempt, earlier: Journal, times: Times) -> None:
        self._run, self._earlier, self.times = run, earlier, times
        self._attempt, self._seen = attempt, time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writing: Future[None] = self._thread.submit(_or_warn, self.save)
        self._written = self._seen
        self.checkpoints = 0
        """How many were begun."""

    def continue_after(self, steps: int) -> None:
        """Note how many steps were done before this attempt."""
        self._attempt = replace(self._attempt, first=steps)

    def step_done(self) -> None:
        """Note a sign of life."""
        self._seen = time.monotonic()

    def mark(self, steps_done: int) -> Division | None:
        """Note that so many steps are done, and write that where it is due; returns then the division so far."""
        seconds = self.times.read()
        marks = [one for one in self._attempt.marks if one[0] < steps_done]
        if len(marks) >= MARKS:
            marks = marks[: MARKS // 2 : 2] + marks[MARKS // 2 :]
        self._attempt = replace(self._attempt, seconds=seconds, marks=(*marks, (steps_done, seconds[STEPS])))
        self.step_done()
        if self._seen - self._written < WRITE_S or not self._writing.done():
            return None
        self._written = self._seen
        self._writing = self._thread.submit(_or_warn, self.save)
        return self.division()

    def division(self) -> Division:
        """Divide the run's time up to the last mark."""
        return self._earlier.division(self._attempt, now=self._attempt.until)

    def checkpoint_interval_s(self) -> float:
        """Return the seconds between two checkpoints that `run.checkpoint_minutes auto` stands for."""
        cost_s = self._attempt.seconds[CHECKPOINT] / self.checkpoints if self.checkpoints else FIRST_COST_S
        attempts = (*self._earlier.attempts, self._attempt)
        return max(SHORTEST_S, checkpoint_interval_s(attempts, cost_s=cost_s))

    def save(self) -> None:
        """Write the attempt as it was at the last mark; an OSError where that fails."""
        _write(self._run.folder, self._run.lease, "attempt", self._attempt)

    def close(self, *, failed: bool) -> None:
        """Write the attempt as it ends; of one that failed, up to its last sign of life."""
        seconds = self.times.read()
        if failed:
            hung = min(time.monotonic() - self._seen, seconds[self.times.part])
            seconds[self.times.part] -= hung
        self._attempt = replace(self._attempt, seconds=seconds, ended=not failed)
        self._thread.shutdown(cancel_futures=True)
        _or_warn(self.save)


@contextlib.contextmanager
def opened_attempt(run: Run, group: Group, times: Times) -> Iterator[AttemptWriter | None]:
    """Open rank 0's file of an attempt, which began with `times`; None on other ranks."""
    if group.rank:
        yield None
        return
    earlier = storage.retry(lambda: read_journal(run.folder), run.config.run.outage_s, log.warning)
    moments = group.moments()
    began = moments["now"] - sum(times.read().values())
    attempt = Attempt(
        began=began,
        seconds=times.read(),
        created=moments.get("created"),
        failed=moments.get("failed"),
        torn_down=moments.get("torn_down"),
    )
    writer = AttemptWriter(run, attempt, earlier, times)
    try:
        yield writer
    except BaseException:
        writer.close(failed=True)
        raise
    writer.close(failed=False)
