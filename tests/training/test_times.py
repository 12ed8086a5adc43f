"""The time of a process: every moment belongs to one part."""

from __future__ import annotations

from lape_ray.training.times import Times


def test_parts_follow_one_another_and_lie_within_each_other() -> None:
    now = 100.0
    times = Times(lambda: now)

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    wait(3)
    times.enter("first_step")
    wait(4)
    with times.within("evaluation"):
        wait(5)
        with times.within("checkpoint"):
            wait(6)
        wait(1)
    times.enter("steps")
    wait(10)
    times.move(2, "data")
    seconds = {part: value for part, value in times.read().items() if value}
    assert seconds == {
        "loading": 3, "first_step": 4, "evaluation": 6, "checkpoint": 6, "steps": 8, "data": 2,
    }  # fmt: skip
    assert times.part == "steps"
    assert sum(times.read().values()) == now - 100


def test_a_part_ends_with_an_error_too() -> None:
    times = Times()
    try:
        with times.within("checkpoint"):
            raise OSError
    except OSError:
        assert times.part == "loading"
