"""The journal of a run's time: what a process that dies leaves behind, and what the next one makes of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from lape_ray.cluster import group, journal
from lape_ray.cluster.group import Alone
from lape_ray.cluster.journal import AttemptWriter, opened_attempt, read_journal, written_command
from lape_ray.cluster.run import Run
from lape_ray.config import TrainConfig
from lape_ray.storage import leased
from lape_ray.training.times import Times


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now)
        for module in (journal, group):
            monkeypatch.setattr(module, "time", fake)

    def times(self) -> Times:
        return Times(lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    folder = str(tmp_path / "run")
    with leased(folder, "run one") as lease:
        yield Run(
            config=TrainConfig(), folder=folder, lease=lease.token, tracking_uri="", mlflow_run_id="",
            use_gpu=False,
        )  # fmt: skip


def train(run: Run, clock: Clock, work: Callable[[AttemptWriter], None]) -> None:
    """Begin an attempt that loads for 5 s, does a first step in 5 s, and then what `work` does."""
    times = clock.times()
    with opened_attempt(run, Alone(Event()), times) as attempt:
        assert attempt is not None
        clock.now += 5
        times.enter("first_step")
        clock.now += 5
        times.enter("steps")
        work(attempt)


def steps(attempt: AttemptWriter, clock: Clock, first: int, last: int) -> None:
    """Make steps of a second from `first` to `last`, each of them a log step."""
    for step in range(first + 1, last + 1):
        clock.now += 1
        attempt.step_done()
        attempt.mark(step)


def test_a_process_that_hangs_and_ends_has_lost_what_came_after_the_checkpoint(
    run: Run, clock: Clock
) -> None:
    def killed(attempt: AttemptWriter) -> None:
        attempt.continue_after(0)
        steps(attempt, clock, 0, 30)
        clock.now += 60  # in a collective with a worker that is gone
        raise RuntimeError

    def continued(attempt: AttemptWriter) -> None:
        attempt.continue_after(20)
        steps(attempt, clock, 20, 40)

    with written_command(run.folder, run.lease, began=990) as alive:
        alive()
        with pytest.raises(RuntimeError):
            train(run, clock, killed)
        clock.now += 3
        train(run, clock, continued)
        clock.now += 2
    division = read_journal(run.folder).division()
    assert {part: seconds for part, seconds in division.seconds.items() if seconds} == pytest.approx(
        {"init": 10 + 5, "first_step": 5, "steps": 40, "again": 10, "start": 63, "load": 5,
         "first_step_again": 5, "idle": 2}
    )  # fmt: skip
    assert division.wall_s == clock.now - 990
    assert [one.ended for one in read_journal(run.folder).attempts] == [False, True]


def test_the_interval_of_checkpoints_is_that_of_their_stall(run: Run, clock: Clock) -> None:
    def work(attempt: AttemptWriter) -> None:
        assert attempt.checkpoint_interval_s() == journal.SHORTEST_S, "at the beginning"
        steps(attempt, clock, 0, 5000)
        assert attempt.checkpoint_interval_s() == pytest.approx((2 * journal.FIRST_COST_S * 5010) ** 0.5)
        for _ in range(2):
            attempt.checkpoints += 1
            with attempt.times.within("checkpoint"):
                clock.now += 10
        attempt.mark(5001)
        assert attempt.checkpoint_interval_s() == pytest.approx((2 * 10 * 5030) ** 0.5)

    train(run, clock, work)


def test_what_is_written_before_a_kill_is_at_most_ten_seconds_old(run: Run, clock: Clock) -> None:
    written = []

    def work(attempt: AttemptWriter) -> None:
        attempt.continue_after(0)
        for step in range(1, 41):
            clock.now += 1
            attempt._writing.result()
            if attempt.mark(step) is not None:
                written.append(step)
        attempt._writing.result()
        (found,) = read_journal(run.folder).attempts
        assert found.marks[-1] == (31, 31)

    train(run, clock, work)
    assert written == [1, 11, 21, 31]


def test_many_log_steps_make_a_small_file(run: Run, clock: Clock) -> None:
    def work(attempt: AttemptWriter) -> None:
        attempt.continue_after(0)
        steps(attempt, clock, 0, 2000)

    train(run, clock, work)
    (found,) = read_journal(run.folder).attempts
    assert len(found.marks) <= journal.MARKS
    assert [found.surviving(count) for count in (1, 700, 1990, 2000)] == pytest.approx([1, 700, 1990, 2000])


def test_a_damaged_file_is_left_out_and_named(
    run: Run, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    train(run, clock, lambda attempt: steps(attempt, clock, 0, 3))
    (file,) = Path(run.folder, journal.FOLDER).iterdir()
    whole = json.loads(file.read_text())
    clock.now += 5
    train(run, clock, lambda attempt: steps(attempt, clock, 0, 3))
    file.write_text(json.dumps({**whole, "marks": [[1, "x"]]}))
    with caplog.at_level(logging.WARNING):
        assert len(read_journal(run.folder).attempts) == 1
    assert f"{file} is damaged: marks[0][1] is 'x', not a number" in caplog.text


def test_a_process_whose_run_another_driver_has_writes_nothing(
    run: Run, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    Path(run.folder, "lease.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        train(run, clock, lambda attempt: None)
    assert not Path(run.folder, journal.FOLDER).exists()
    assert "the journal of the run's time cannot be written" in caplog.text
