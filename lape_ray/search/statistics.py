"""Say what the trials of a search come to: mean, spread, paired differences over seeds, and whether these are noise."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lape_ray.report.statistics import LEVEL, Estimate
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial, by_point


@dataclass(frozen=True)
class Cell:
    """One point of the space with all its trials, and the cell of the same point with join `basic`, if any."""

    plan: Plan
    trials: Sequence[Trial]
    reference: Cell | None = None

    @property
    def label(self) -> str:
        return self.trials[0].label

    @property
    def epochs(self) -> int:
        """Return the most that any of its trials came to."""
        return max(trial.done for trial in self.trials)

    @property
    def finals(self) -> dict[int, float]:
        """Return the metric after the last epoch by seed, of the trials that trained to the end."""
        finished = [trial for trial in self.trials if trial.state == "finished"]
        last = {trial.seed: trial.last(self.plan.metric) for trial in finished}
        return {seed: value for seed, value in last.items() if value is not None}

    @property
    def reached(self) -> float | None:
        """Return the mean of what the trials last came to; None: nothing was evaluated."""
        values = [value for trial in self.trials if (value := trial.last(self.plan.metric)) is not None]
        return statistics.fmean(values) if values else None

    @cached_property
    def estimate(self) -> Estimate | None:
        """Estimate the metric after the last epoch, over the trials that trained to the end; None: none did."""
        return Estimate.of(list(self.finals.values())) if self.finals else None

    @property
    def paired(self) -> dict[int, float]:
        """Return the difference from the reference by seed, of the seeds that both have."""
        return {} if self.reference is None else _paired(self.finals, self.reference.finals)

    @cached_property
    def difference(self) -> Estimate | None:
        """Estimate the difference from the reference; None: there is none."""
        return Estimate.of(list(self.paired.values())) if self.paired else None


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Subtract theirs from ours, seed by seed."""
    return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}


def trials_of(found: Sequence[Cell]) -> list[Trial]:
    """List the trials of all cells, by number."""
    return sorted((trial for cell in found for trial in cell.trials), key=lambda trial: trial.number)


def cells(plan: Plan, trials: Sequence[Trial]) -> list[Cell]:
    """List all points, the best first: those that trained to the end, then those that came farthest."""
    found = [Cell(plan, point) for point in by_point(trials)]

    def reference(first: Mapping[str, object]) -> Cell | None:
        basic = {**first, **{join: "basic" for join in ("model.join", "model.bias_join") if join in first}}
        return next((one for one in found if one.trials[0].first == basic != first), None)

    def rank(cell: Cell) -> tuple[float, ...]:
        if cell.estimate is not None:
            return (0, 0, -plan.sign * cell.estimate.mean)
        return (1, -cell.epochs, math.inf if cell.reached is None else -plan.sign * cell.reached)

    return sorted((Cell(plan, one.trials, reference(one.trials[0].first)) for one in found), key=rank)


def in_words(plan: Plan, found: Sequence[Cell]) -> list[str]:
    """Say what may be said of the differences, a sentence each; the first is about the best cell."""
    lines = _best_in_words(plan, found)
    trials = trials_of(found)
    if stopped := sum(trial.state == "stopped" for trial in trials):
        lines.append(
            f"{stopped} of {len(trials)} trials were ended early, by {plan.schedule}; their values are not to be "
            "ranked among those that trained to the end."
        )
    compared = [(cell, cell.difference) for cell in found if cell.difference is not None]
    lines += _together(plan, [cell for cell, _ in compared])
    lines += [_verdict(plan, cell, difference) for cell, difference in compared]
    intervals = sum(difference.interval is not None for _, difference in compared)
    if len(plan.seeds) == 2 and intervals:
        lines.append(
            "With 2 seeds an interval is 18 standard deviations wide, with 3 it is 5: one more seed tells far more."
        )
    if intervals > 1:
        lines.append(
            f"{intervals} differences were looked at: where there is none at all, about "
            f"{(1 - LEVEL) * intervals:.1g} of them would still seem larger than the noise."
        )
    return lines


def _best_in_words(plan: Plan, found: Sequence[Cell]) -> list[str]:
    best, others = found[0], [cell for cell in found[1:] if cell.estimate is not None]
    if best.estimate is None:
        return []
    text = f"{best.label} came out best: {best.estimate.mean:.2f}{plan.unit} over {_seeds(best.estimate)}."
    if not others:
        return [text]
    leads, second = list(_paired(best.finals, others[0].finals).values()), others[0].label
    lead = Estimate.of(leads) if leads else None
    if lead is None or lead.interval is None:
        return [f"{text} With one seed nothing says how much of its lead over {second} is noise."]
    word = "larger than" if lead.clear else "not larger than"
    return [f"{text} Its lead over the next, {second}, is {word} the noise ({_interval(plan, lead)})."]


def _together(plan: Plan, compared: Sequence[Cell]) -> list[str]:
    """Say what each join does on average, where several cells have it: differences are averaged within a seed first.

    Cells of one seed share its order of images and its first weights, so that they are no independent repetitions.
    """
    lines, groups = [], defaultdict[str, list[Cell]](list)
    for cell in compared:
        groups[_joins_in_words(cell)].append(cell)
    for joins, alike in groups.items():
        seeds = sorted(set.intersection(*(set(cell.paired) for cell in alike)))
        if len(alike) < 2 or not seeds:
            continue
        mean = Estimate.of([statistics.fmean(cell.paired[seed] for cell in alike) for seed in seeds])
        better = sum(plan.sign * cell.difference.mean > 0 for cell in alike if cell.difference)
        amount = f"{mean.mean:+.2f}{_points(plan)}"
        noise = ""
        if mean.interval is not None:
            word = "more" if mean.clear else "not more"
            noise = f" ({_interval(plan, mean)}, {_seeds(mean)}), {word} than the noise"
        lines.append(
            f"{joins} against basic, over all {len(alike)} cells that have both: {amount} on average{noise}; better in "
            f"{better} of {len(alike)}."
        )
    return lines


def _joins_in_words(cell: Cell) -> str:
    """Name the joins of a cell that are not `basic`."""
    names = {"model.join": "join", "model.bias_join": "bias_join"}
    values = {words: cell.trials[0].first.get(field, "basic") for field, words in names.items()}
    return ", ".join(f"{words} {value}" for words, value in values.items() if value != "basic")


def _verdict(plan: Plan, cell: Cell, difference: Estimate) -> str:
    """Put the cell's difference to `basic` in words."""
    reference = cell.reference.label if cell.reference else ""
    amount = f"{difference.mean:+.2f}{_points(plan)}"
    if difference.interval is None:
        return f"{cell.label}: {amount} against {reference}, from one seed; nothing says how much of that is noise."
    if difference.clear:
        better = "better" if plan.sign * difference.mean > 0 else "worse"
        word = f"{better} than {reference} by more than the noise"
    else:
        word = f"cannot be told from {reference}, as the noise is larger"
    return f"{cell.label}: {word}, {amount} ({_interval(plan, difference)}, {_seeds(difference)})."


def _interval(plan: Plan, estimate: Estimate) -> str:
    low, high = estimate.interval or (math.nan, math.nan)
    return f"{LEVEL:.0%} interval {low:+.2f} to {high:+.2f}{_points(plan)}"


def _seeds(estimate: Estimate) -> str:
    return "1 seed" if estimate.n == 1 else f"{estimate.n} seeds"


def _points(plan: Plan) -> str:
    return " points" if plan.unit else ""
