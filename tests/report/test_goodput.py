"""The division of a run's wall time: parts that add up to it, after every kind of interruption."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lape_ray.report.goodput import (
    GROUPS,
    PARTS,
    Attempt,
    Command,
    Division,
    checkpoint_interval_s,
    divide,
)


def attempt(began: float, first: int | None, *marks: tuple[int, float], **seconds: float) -> Attempt:
    """An attempt with these seconds; it was made two seconds before it began."""
    return Attempt(began=began, created=began - 2, first=first, marks=marks, seconds=seconds)


def told(division: Division) -> dict[str, float]:
    assert sum(division.seconds.values()) == pytest.approx(division.wall_s)
    return {part: pytest.approx(seconds) for part, seconds in division.seconds.items() if seconds}


UNDISTURBED = attempt(
    10, 0, (5, 50), (10, 100),
    loading=4, staging=6, first_step=5, steps=100, data=3, checkpoint=1, evaluation=2,
)  # fmt: skip
OF_IT = {"init": 14, "staging": 6, "first_step": 5, "data": 3, "checkpoint": 1, "evaluation": 2}


def test_the_groups_hold_every_part_once() -> None:
    assert sorted(part for parts in GROUPS.values() for part in parts) == sorted(PARTS)


def test_an_undisturbed_run() -> None:
    division = divide([Command(began=0, until=140)], [UNDISTURBED])
    assert told(division) == {**OF_IT, "steps": 100, "idle": 9}
    assert division.wall_s == 140
    assert sum(division.metrics().values()) == pytest.approx(100)
    assert str(division) == (
        "goodput 71.4 % of 0:02:20 (init 17.9 %, idle 6.4 %, data 2.1 %, evaluation 1.4 %, checkpoint 0.7 %)"
    )


def test_a_worker_that_is_killed() -> None:
    """The steps after the fifth are lost, and half of those that the first attempt has no mark of."""
    second = Attempt(
        began=150, created=146, failed=134, torn_down=139, first=5, marks=((10, 48),),
        seconds={"loading": 3, "first_step": 2, "steps": 48},
    )  # fmt: skip
    division = divide([Command(began=0, until=203)], [UNDISTURBED, second])
    assert told(division) == {
        **OF_IT, "steps": 50 + 48, "again": 50, "detect": 3, "tear_down": 5, "start": 7, "import": 4,
        "load": 3, "first_step_again": 2,
    }  # fmt: skip


def test_a_driver_that_is_killed_and_submitted_again_an_hour_later() -> None:
    """Nobody wrote when the driver was killed; a second command died before it trained, and is a part of the start."""
    commands = [Command(began=0, until=0), Command(began=3700, until=3710), Command(began=3731, until=3800)]
    division = divide(commands, [UNDISTURBED, attempt(3740, 10, (15, 49), loading=5, steps=50)])
    assert told(division) == {
        **OF_IT, "steps": 150, "start": 10 + 7, "import": 2, "load": 5, "idle": (3700 - 131) + 21 + 5,
    }  # fmt: skip
    assert division.wall_s == 3800


def test_a_run_that_is_continued_for_more_epochs() -> None:
    commands = [Command(began=0, until=135), Command(began=200, until=260)]
    division = divide(commands, [UNDISTURBED, attempt(210, 10, (20, 40), loading=5, steps=40)])
    assert told(division) == {
        **OF_IT, "steps": 140, "start": 8, "import": 2, "load": 5, "idle": 4 + 65 + 5,
    }  # fmt: skip


def test_a_run_that_waits_or_never_trained_is_init() -> None:
    assert told(divide([Command(began=5, until=5)], [], now=65)) == {"init": 60}
    assert told(divide([Command(began=5, until=15), Command(began=95, until=105)], [])) == {
        "init": 20, "idle": 80,
    }  # fmt: skip


def test_an_attempt_that_dies_before_it_knows_where_it_continues_loses_no_steps_of_others() -> None:
    short = Attempt(began=140, seconds={"loading": 1})
    division = divide([Command(began=0, until=160)], [UNDISTURBED, short, attempt(150, 10, steps=10)])
    assert division.seconds["steps"] == 110
    assert division.seconds["again"] == 0


def test_steps_are_lost_where_a_later_attempt_falls_back_further() -> None:
    attempts = [UNDISTURBED, attempt(140, 10, (12, 8), steps=8), attempt(160, 4, steps=3)]
    division = divide([Command(began=0, until=163)], attempts)
    assert division.seconds["steps"] == pytest.approx(4 / 5 * 50 + 3)
    assert division.seconds["again"] == pytest.approx(100 - 4 / 5 * 50 + 8)


@pytest.mark.parametrize(
    ("steps", "expected"), [(0, 0), (2, 0), (3, 0), (4, 5), (5, 10), (6, 17.5), (7, 25), (8, 40), (99, 40)]
)
def test_what_survives_of_an_attempt(steps: int, expected: float) -> None:
    assert attempt(0, 3, (5, 10), (7, 25), steps=40).surviving(steps) == expected


def test_the_interval_of_checkpoints_follows_from_their_cost_and_the_failures() -> None:
    """512 GPUs of which one fails every 15.8 h, and a checkpoint that costs 0.05 s."""
    hours = attempt(0, 0, steps=15.8 * 3600)
    assert checkpoint_interval_s([hours], cost_s=0.05) == pytest.approx(75.4, abs=0.1)
    assert checkpoint_interval_s([hours, hours], cost_s=0.05) == pytest.approx(75.4, abs=0.1)
    stopped = replace(hours, ended=True)
    assert checkpoint_interval_s([stopped, hours], cost_s=0.05) == pytest.approx(75.4 * 2**0.5, abs=0.1)
    assert checkpoint_interval_s([hours], cost_s=0.2) == pytest.approx(2 * 75.4, abs=0.2)


@pytest.mark.parametrize("seed", range(200))
def test_the_parts_add_up_whatever_the_clocks_say(seed: int) -> None:
    """Kills, resubmissions, absent and contradicting moments, clocks that are wrong by minutes."""
    draw = random.Random(seed)
    commands, attempts, clock = [], [], 1e9
    for _ in range(draw.randint(1, 4)):
        opened, clock = clock, clock + draw.expovariate(1 / 20)
        for _ in range(draw.randint(0, 4)):
            seconds = {part: draw.expovariate(1 / 30) for part in ("loading", "first_step", "steps", "data")}
            first = draw.choice([None, draw.randint(0, 50)])
            step, marks, spent = first or 0, [], 0.0
            while draw.random() < 0.8:
                step, spent = step + draw.randint(0, 9), spent + draw.random() * (seconds["steps"] - spent)
                marks.append((step, spent))
            wrong = draw.gauss(0, 60) if draw.random() < 0.3 else 0.0
            moments = {
                name: draw.choice([None, clock + draw.gauss(0, 20)])
                for name in ("created", "failed", "torn_down")
            }
            attempts.append(
                Attempt(began=clock + wrong, seconds=seconds, first=first, marks=tuple(marks), **moments)
            )
            clock = attempts[-1].until + draw.expovariate(1 / 20)
        commands.append(Command(began=opened, until=draw.choice([opened, clock])))
        clock += draw.choice([1.0, 3600.0])
    draw.shuffle(attempts)
    now = draw.choice([None, clock])
    division = divide(commands, attempts, now=now)
    assert all(seconds >= -1e-6 for seconds in division.seconds.values())
    assert sum(division.seconds.values()) == pytest.approx(division.wall_s, rel=1e-9)
    every = [*commands, *attempts]
    assert division.began == min(one.began for one in every)
    assert division.until >= max(one.until for one in commands)
    assert now is None or division.until >= now
