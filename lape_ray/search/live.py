"""What a search shows while it goes on: a table that is drawn anew on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial
from lape_ray.search.tables import first_line
from lape_ray.training.metrics import duration

DRAW_S = 0.5
RECENT = 5  # epochs of a trial that tell how long the next will take


class Display:
    """Show one search on `out`, by default the standard output."""

    def __init__(self, plan: Plan, out: TextIO | None = None) -> None:
        out = out or sys.stdout
        self._plan, self._out = plan, out
        self.draws = out.isatty()
        """Whether this is a terminal, on which the table is drawn anew."""
        self._drawn = 0  # lines of the table as it stands on the terminal
        self._next = 0.0

    def line(self, text: str) -> None:
        """Print a line that stays, above the table."""
        self._wipe()
        print(text, file=self._out, flush=True)

    def reported(self, trial: Trial, trials: Sequence[Trial], decision: str) -> None:
        """Show that a trial has reported an epoch."""
        if not self.draws:
            words = {"go": "", "pause": "  pauses"}.get(decision, "  stopped: among the worse of its rung")
            value = trial.last(self._plan.metric)
            shown = "" if value is None else f"  {self._plan.metric} {value:.2f}"
            place = f"epoch {trial.done:>{len(str(self._plan.epochs))}}/{self._plan.epochs}"
            left = self.eta(trials)
            self.line(f"trial {trial.id}  {trial.label} seed {trial.seed}  {place}{shown}{words}  ETA {left}")

    def ended(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """Show that a trial is over, or pauses."""
        if trial.state == "failed":
            self.line(f"trial {trial.id}  {trial.label} seed {trial.seed}  FAILED: {first_line(trial)}")
        elif trial.over:
            over = sum(each.over for each in trials)
            value = trial.last(self._plan.metric)
            shown = "–" if value is None else f"{value:.2f}"
            self.line(
                f"trial {trial.id}  {trial.label} seed {trial.seed}  {trial.state} after {duration(trial.seconds)}: "
                f"{self._plan.metric} {shown}  ({over} of {self._plan.trials} trials)"
            )

    def eta(self, trials: Sequence[Trial]) -> str:
        """Estimate the time until the last trial ends if none is stopped, by the latest epochs' speed."""
        seconds = [one.seconds for trial in trials for one in trial.epochs[-RECENT:]][-4 * RECENT :]
        if not seconds:
            return "–"
        left = sum(self._plan.epochs - trial.done for trial in trials if not trial.over)
        left += (self._plan.trials - len(trials)) * self._plan.epochs
        return duration(left * sum(seconds) / len(seconds) / max(1, _training(trials)))

    def draw(self, trials: Sequence[Trial]) -> None:
        """Draw the table anew, if this is a terminal and it is time."""
        if not self.draws or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + DRAW_S
        lines = self.table(trials, *shutil.get_terminal_size((100, 30)))
        self._wipe()
        self._out.write("\n".join(lines) + "\n")
        self._out.flush()
        self._drawn = len(lines)

    def table(self, trials: Sequence[Trial], width: int, height: int) -> list[str]:
        """List the table's lines: a head, then trials that train, then the latest of the others, as many as fit."""
        plan = self._plan
        over = sum(trial.over for trial in trials)
        left = self.eta(trials)
        head = f"{plan.name}: {over} of {plan.trials} trials over, {_training(trials)} training, ETA {left}"
        training = [trial for trial in trials if trial.state == "running"]
        others = [trial for trial in trials if trial not in training]
        room = max(1, height - 4 - len(training))
        shown = [*sorted(others, key=lambda each: each.number)[-room:], *training]
        wide = max([len(trial.label) for trial in shown], default=4)
        wide = min(wide, max(8, width - 58))
        names = (
            f"{'trial':>5}  {'cell':{wide}}  {'seed':>4}  {'epoch':>9}  {plan.metric:>12}  {'time':>8}  state"
        )
        lines = [head, names]
        for trial in shown:
            value = trial.last(plan.metric)
            metric = "" if value is None else f"{value:.2f}"
            epoch = f"{trial.done}/{plan.epochs}"
            state: str = "training" if trial in training else trial.state
            state += f": {first_line(trial)}" if trial.error else ""
            lines.append(
                f"{trial.number:>5}  {trial.label[:wide]:{wide}}  {trial.seed:>4}  {epoch:>9}  {metric:>12}  "
                f"{duration(trial.seconds):>8}  {state}"
            )
        return [line[: width - 1] for line in lines]

    def _wipe(self) -> None:
        if self._drawn:
            self._out.write(
                f"\x1b[{self._drawn}F\x1b[J"
            )  # up to the table's first line, and clear what is below
            self._drawn = 0


def _training(trials: Sequence[Trial]) -> int:
    return sum(trial.state == "running" for trial in trials)
