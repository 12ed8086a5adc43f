"""The wall time of a run, divided over restarts and submissions: which of it went into steps that count.

A run consists of commands (drivers), and in each of them of attempts (a start of its training processes). Both are
written down where they take place, by `cluster.journal`; here they become one division.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lape_ray.training.metrics import duration
from lape_ray.training.times import CHECKPOINT, DATA, EVALUATION, FIRST_STEP, IDLE, LOADING, STAGING, STEPS
from lape_ray.values.typed import Count

AGAIN, INIT = "again", "init"
RECOVERY = {
    "detect": "recovery: failure noticed",
    "tear_down": "recovery: processes ended",
    "start": "recovery: processes started",
    "import": "recovery: imports, process group",
    "load": "recovery: checkpoint loaded",
    "first_step_again": "recovery: first step",
}
PARTS = {
    STEPS: "steps that count",
    AGAIN: "steps computed again",
    INIT: "init",
    STAGING: "data staging",
    FIRST_STEP: "first step, compilation included",
    DATA: "waiting for data",
    CHECKPOINT: "checkpoint stall",
    EVALUATION: "evaluation",
    **RECOVERY,
    IDLE: "idle",
}
"""Each part, in words for people; docs/operations.md defines them."""
GROUPS = {
    "goodput": (STEPS,),
    "time/again": (AGAIN,),
    "time/init": (INIT, STAGING, FIRST_STEP),
    "time/data": (DATA,),
    "time/checkpoint": (CHECKPOINT,),
    "time/evaluation": (EVALUATION,),
    "time/recovery": tuple(RECOVERY),
    "time/idle": (IDLE,),
}
"""The metrics of MLflow, which draws each on the run's page, and the parts of each."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One submission, in seconds since 1970 by its own clock; `until` is the last that is known of it."""

    began: float
    until: float


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The training processes from one start to their end, as rank 0 saw it. Moments are by the command's clock.

    Attributes:
        began: when rank 0 began to train
        seconds: of each part since then (`training.times`); they add up to its whole time
        first: steps that were done before; None: it did not come so far as to know
        marks: (steps done, seconds in STEPS until then), in their order
        created: when rank 0's process was made
        failed: when the failure of the attempt before was noticed
        torn_down: when the processes of the attempt before were gone
        ended: whether it came to the end that it was to have
    """

    began: float
    seconds: Mapping[str, float]
    first: Count | None = None
    marks: tuple[tuple[int, float], ...] = ()
    created: float | None = None
    failed: float | None = None
    torn_down: float | None = None
    ended: bool = False

    @property
    def until(self) -> float:
        return self.began + sum(self.seconds.values())

    def surviving(self, steps: int) -> float:
        """Return the seconds of its steps whose result is in a checkpoint after so many steps.

        Between two marks every step took as long as the others.
        """
        if self.first is None:
            return 0.0
        before, spent = self.first, 0.0
        for step, seconds in self.marks:
            if step > steps:
                return spent + (seconds - spent) * max(0, steps - before) / max(1, step - before)
            before, spent = step, seconds
        return self.seconds.get(STEPS, 0.0) if steps > before else spent


def checkpoint_interval_s(attempts: Sequence[Attempt], *, cost_s: float) -> float:
    """Return the seconds between two checkpoints by which a run loses least (Young 1974, Daly 2006).

    It is sqrt(2 C M): C is what a checkpoint costs the training, M the mean time between failures. That is the time
    trained so far over the failures in it, with one more for the one to come.
    """
    trained_s = sum(one.until - one.began for one in attempts)
    failures = sum(not one.ended for one in attempts[:-1])
    return math.sqrt(2 * cost_s * trained_s / (failures + 1))


@dataclass
class Division:
    """The wall time of a run since `began` (seconds since 1970), in seconds of each part. They add up to it exactly."""

    began: float
    until: float
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @property
    def wall_s(self) -> float:
        return self.until - self.began

    def percent(self, *parts: str) -> float:
        """Return what `parts` take of the wall time."""
        return 100 * sum(self.seconds[part] for part in parts) / self.wall_s if self.wall_s > 0 else 0.0

    def __str__(self) -> str:
        """Say in one line what the time went into, the largest loss first."""
        goodput, *losses = ((name.removeprefix("time/"), value) for name, value in self.metrics().items())
        shown = sorted((one for one in losses if one[1] >= 0.05), key=lambda one: -one[1])
        rest = ", ".join(f"{name} {value:.1f} %" for name, value in shown)
        return f"goodput {goodput[1]:.1f} % of {duration(self.wall_s)}" + (f" ({rest})" if rest else "")

    def metrics(self) -> dict[str, float]:
        """Return the metrics for MLflow, in percent; they add up to 100."""
        return {name: self.percent(*parts) for name, parts in GROUPS.items()}

    def _fill(self, part: str, moment: float | None, limit: float) -> None:
        """Let a part last until `moment`, as far as that lies between the present end and `limit`."""
        if moment is not None and (end := min(moment, limit)) > self.until:
            self.seconds[part] += end - self.until
            self.until = end


def divide(commands: Sequence[Command], attempts: Sequence[Attempt], *, now: float | None = None) -> Division:
    """Divide the wall time of a run, from the beginning of its first command to the last that is known of it.

    There is none where nothing is known.

    Clocks of several machines may differ: where one part would begin before another has ended, it begins there.

    Args:
        now: the run is at work at this moment.
    """
    commands = sorted(commands, key=lambda one: one.began)
    attempts = sorted(attempts, key=lambda one: one.began)
    every: list[Command | Attempt] = [*commands, *attempts]
    began = min((one.began for one in every), default=0.0 if now is None else now)
    division = Division(began, began)
    for index, attempt in enumerate(attempts):
        later = attempts[index + 1 :]
        _add_start(division, commands, attempt, first=index == 0)
        limit = later[0].began if later else attempt.until
        steps = min((one.first for one in later if one.first is not None), default=None)
        _add_attempt(division, attempt, limit, steps, first=index == 0)
    end = max((now or began, division.until, *(one.until for one in commands)))
    starting = _add_commands(division, commands, INIT if not attempts else "start", end, end)
    division._fill(INIT if not attempts else "start" if starting and now else IDLE, end, end)
    return division


def _add_commands(
    division: Division, commands: Sequence[Command], part: str, until: float, limit: float
) -> bool:
    """Add the commands that began since the present end and before `limit`; tells whether there are any.

    They trained nothing until `until`.
    """
    began = [one for one in commands if division.until <= one.began <= limit]
    for one in began:
        division._fill(IDLE, one.began, limit)
        division._fill(part, one.until, until)
    return bool(began)


def _add_start(division: Division, commands: Sequence[Command], attempt: Attempt, *, first: bool) -> None:
    """Add the time until an attempt begins."""
    limit = attempt.began
    if first:
        _add_commands(division, commands, INIT, limit, limit)
        division._fill(INIT, limit, limit)
        return
    created = limit if attempt.created is None else attempt.created
    if not _add_commands(division, commands, "start", min(created, limit), limit):
        division._fill("detect", attempt.failed, limit)
        division._fill("tear_down", attempt.torn_down, limit)
    division._fill("start", created, limit)
    division._fill("import", limit, limit)


def _add_attempt(
    division: Division, attempt: Attempt, limit: float, steps: int | None, *, first: bool
) -> None:
    """Add an attempt up to `limit`; a later one continued after so many `steps`, None: there is none."""
    names = {LOADING: INIT} if first else {LOADING: "load", FIRST_STEP: "first_step_again"}
    seconds = {names.get(part, part): value for part, value in attempt.seconds.items()}
    spent = seconds.get(STEPS, 0.0)
    survived = spent if steps is None else min(spent, attempt.surviving(steps))
    seconds |= {STEPS: survived, AGAIN: spent - survived}
    whole = sum(seconds.values())
    share = min(1.0, max(0.0, limit - division.until) / whole) if whole > 0 else 0.0
    for part, value in seconds.items():
        division.seconds[part] += value * share
    division.until += whole * share
