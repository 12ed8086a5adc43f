"""Show a search while it goes on: by a table that is drawn anew on a terminal, by plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial
from lape_ray.training.metrics import duration

DRAW_S = 0.5
RECENT = 5  # epochs of a trial that tell how long the next will take


class Display:
    """Show one search on `out`, by default the standard output."""

    def __init__(self, plan: Plan, out: TextIO | None = None) -> None:
        self._plan, self._out = plan, out or sys.stdout
        self.draws = self._out.isatty()
        """Whether this is a terminal, on which the table is drawn anew."""
        self._drawn = 0  # lines of the table as it stands on the terminal
        self._next = 0.0

    def line(self, text: str) -> None:
        """Print a line that stays, above the table."""
        self._wipe()
        print(text, file=self._out, flush=True)

    def reported(self, trial: Trial, trials: Sequence[Trial], decision: str) -> None:
        """Show that a trial has reported an epoch, and what was decided about it, if anything."""
        if not self.draws:
            shown = f"  {self._plan.metric} {value}" if (value := self._value(trial)) else ""
            place = f"epoch {trial.done:>{len(str(self._plan.epochs))}}/{self._plan.epochs}"
            self._trial_line(trial, f"{place}{shown}{decision}  ETA {self.eta(trials)}")

    def ended(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """Show that a trial is over."""
        if trial.state == "failed":
            self._trial_line(trial, f"FAILED: {trial.reason}")
        elif trial.over:
            over = f"({sum(each.over for each in trials)} of {self._plan.trials} trials)"
            value = f"{self._plan.metric} {self._value(trial) or '–'}"
            self._trial_line(trial, f"{trial.state} after {duration(trial.seconds)}: {value}  {over}")

    def _trial_line(self, trial: Trial, text: str) -> None:
        self.line(f"trial {trial.id}  {trial.label} seed {trial.seed}  {text}")

    def _value(self, trial: Trial) -> str:
        value = trial.last(self._plan.metric)
        return "" if value is None else f"{value:.2f}"

    def eta(self, trials: Sequence[Trial]) -> str:
        """Estimate the time until the last trial ends if none is stopped, by the latest epochs' speed."""
        seconds = [one.seconds for trial in trials for one in trial.epochs[-RECENT:]][-4 * RECENT :]
        if not seconds:
            return "–"
        left = sum(self._plan.epochs - trial.done for trial in trials if not trial.over)
        left += (self._plan.trials - len(trials)) * self._plan.epochs
        training = sum(trial.state == "running" for trial in trials)
        return duration(left * sum(seconds) / len(seconds) / max(1, training))

    def draw(self, trials: Sequence[Trial]) -> None:
        """Draw the table anew, if this is a terminal and it is time."""
        if not self.draws or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + DRAW_S
        lines = self.table(trials, *shutil.get_terminal_size((100, 30)))
        self._wipe()
        print(*lines, sep="\n", file=self._out, flush=True)
        self._drawn = len(lines)

    def table(self, trials: Sequence[Trial], width: int, height: int) -> list[str]:
        """List the table's lines: a head, then trials that train, then the latest of the others, as many as fit."""
        plan, training = self._plan, [trial for trial in trials if trial.state == "running"]
        others = [trial for trial in trials if trial.state != "running"]
        shown = [*others[-max(1, height - 4 - len(training)) :], *training]
        wide = min(max([len(trial.label) for trial in shown], default=4), max(8, width - 58))
        row = f"{{:>5}}  {{:{wide}.{wide}}}  {{:>4}}  {{:>9}}  {{:>12}}  {{:>8}}  {{}}".format
        lines = [
            f"{plan.name}: {sum(trial.over for trial in trials)} of {plan.trials} trials over, {len(training)} "
            f"training, ETA {self.eta(trials)}",
            row("trial", "cell", "seed", "epoch", plan.metric, "time", "state"),
        ]
        for trial in shown:
            state: str = "training" if trial.state == "running" else trial.state
            state += f": {trial.reason}" if trial.error else ""
            epoch, took = f"{trial.done}/{plan.epochs}", duration(trial.seconds)
            lines.append(row(trial.number, trial.label, trial.seed, epoch, self._value(trial), took, state))
        return [line[: width - 1] for line in lines]

    def _wipe(self) -> None:
        if self._drawn:  # up to the table's first line, and clear what is below
            self._out.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0
