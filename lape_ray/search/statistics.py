"""What the trials of a search say: mean, spread and paired differences over seeds, and whether these are noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lape_ray.report.statistics import LEVEL, Estimate
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial, by_point


@dataclass(frozen=True)
class Difference:
    """A cell minus its reference, seed by seed."""

    reference: str
    estimate: Estimate

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        interval = self.estimate.interval
        return interval is not None and not interval[0] <= 0 <= interval[1]


@dataclass(frozen=True)
class Cell:
    """One point of the space with all its trials.

    Attributes:
        estimate: of the metric after the last epoch, over the trials that trained to the end; None: none did
        difference: to the same cell with join `basic`, over the seeds that both have; None: there is none
    """

    point: int
    label: str
    trials: tuple[Trial, ...]
    estimate: Estimate | None
    difference: Difference | None

    @property
    def failed(self) -> int:
        return sum(trial.state == "failed" for trial in self.trials)

    @property
    def epochs(self) -> int:
        """The most that any of its trials came to."""
        return max((trial.done for trial in self.trials), default=0)


def cells(plan: Plan, trials: Sequence[Trial]) -> list[Cell]:
    """All points, the best first: those that trained to the end, then those that came farthest."""
    groups = by_point(trials)
    found = [
        Cell(
            point=point,
            label=members[0].label,
            trials=tuple(members),
            estimate=_estimate(finals(members, plan.metric)),
            difference=_difference(plan, members, groups),
        )
        for point, members in groups.items()
    ]

    def rank(cell: Cell) -> tuple[float, ...]:
        if cell.estimate is not None:
            return (0, 0, -plan.sign * cell.estimate.mean)
        values = [value for trial in cell.trials if (value := trial.last(plan.metric)) is not None]
        return (1, -cell.epochs, -plan.sign * (statistics.fmean(values) if values else -math.inf * plan.sign))

    return sorted(found, key=rank)


def finals(trials: Sequence[Trial], metric: str) -> dict[int, float]:
    """Seed -> the metric after the last epoch, of the trials that trained to the end."""
    return {
        trial.seed: value
        for trial in trials
        if trial.state == "finished" and (value := trial.last(metric)) is not None
    }


def _estimate(values: Mapping[int, float]) -> Estimate | None:
    return Estimate.of(list(values.values())) if values else None


def _difference(
    plan: Plan, members: Sequence[Trial], groups: Mapping[int, Sequence[Trial]]
) -> Difference | None:
    wanted = dict(members[0].first)
    for join in ("model.join", "model.bias_join"):
        if join in wanted:
            wanted[join] = "basic"
    if wanted == members[0].first:
        return None
    reference = next((group for group in groups.values() if group[0].first == wanted), None)
    if reference is None:
        return None
    ours, theirs = finals(members, plan.metric), finals(reference, plan.metric)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return Difference(reference[0].label, Estimate.of(pairs)) if pairs else None


def in_words(plan: Plan, found: Sequence[Cell]) -> list[str]:
    """Say what may be said of the differences, a sentence each; the first is about the best cell."""
    compared = [cell for cell in found if cell.difference is not None]
    lines = []
    if found and found[0].estimate is not None:
        lines.append(_best_in_words(plan, found))
    trials = [trial for cell in found for trial in cell.trials]
    if stopped := sum(trial.state == "stopped" for trial in trials):
        lines.append(
            f"{stopped} of {len(trials)} trials were ended early, by {plan.schedule}; their values are not to be "
            "ranked among those that trained to the end."
        )
    lines += [verdict(plan, cell) for cell in compared]
    intervals = [cell for cell in compared if cell.difference and cell.difference.estimate.interval]
    if len(plan.seeds) == 2 and intervals:
        lines.append(
            "With 2 seeds an interval is 18 standard deviations wide, with 3 it is 5: one more seed tells far more."
        )
    if len(intervals) > 1:
        chance = (1 - LEVEL) * len(intervals)
        lines.append(
            f"{len(intervals)} differences were looked at: where there is none at all, about {chance:.1g} of "
            "them would still seem larger than the noise."
        )
    return lines


def _best_in_words(plan: Plan, found: Sequence[Cell]) -> str:
    best, unit = found[0], unit_of(plan.metric)
    assert best.estimate is not None
    text = f"{best.label} came out best: {best.estimate.mean:.2f}{unit} over {_seeds(best.estimate.n)}."
    others = [cell for cell in found[1:] if cell.estimate is not None]
    if not others:
        return text
    ours, theirs = finals(best.trials, plan.metric), finals(others[0].trials, plan.metric)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(pairs) < 2:
        return f"{text} With one seed nothing says how much of its lead over {others[0].label} is noise."
    lead = Difference(others[0].label, Estimate.of(pairs))
    word = "larger than" if lead.clear else "not larger than"
    return f"{text} Its lead over the next, {others[0].label}, is {word} the noise ({_interval(plan, lead.estimate)})."


def verdict(plan: Plan, cell: Cell) -> str:
    """Put the cell's difference to `basic` in words."""
    assert cell.difference is not None
    estimate, reference = cell.difference.estimate, cell.difference.reference
    amount = f"{estimate.mean:+.2f}{_points(plan.metric)}"
    if estimate.interval is None:
        return f"{cell.label}: {amount} against {reference}, from one seed; nothing says how much of that is noise."
    if cell.difference.clear:
        better = "better" if plan.sign * estimate.mean > 0 else "worse"
        word = f"{better} than {reference} by more than the noise"
    else:
        word = f"cannot be told from {reference}, as the noise is larger"
    return f"{cell.label}: {word}, {amount} ({_interval(plan, estimate)}, {_seeds(estimate.n)})."


def _interval(plan: Plan, estimate: Estimate) -> str:
    assert estimate.interval is not None
    low, high = estimate.interval
    return f"{LEVEL:.0%} interval {low:+.2f} to {high:+.2f}{_points(plan.metric)}"


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def unit_of(metric: str) -> str:
    """Return what stands behind a value of the metric."""
    return " %" if "acc" in metric else ""


def _points(metric: str) -> str:
    return " points" if "acc" in metric else ""
