"""Decide which point of the space is tried next, and which trials go on: functions of the plan and the trials' records.

Nothing is remembered between two calls, so that a continued search asks the same questions as an undisturbed one.

`after` is asked when a trial has reported an epoch, `settle` when some trials pause.
ASHA decides at once by what is there; HyperBand and population-based training wait until all trials that are to be
compared have arrived, so that their outcome does not depend on which worker was faster.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from lape_ray.search.plan import Plan, Sample, Schedule
from lape_ray.search.record import Clone, Trial, by_point
from lape_ray.search.space import Axis, Choice, Space

Point = dict[str, Any]
Sampler = Callable[[Plan, int, Sequence[Trial]], Point]
CELL = "cell"
Decision = Literal["go", "pause", "stop"]
Rungs = list[tuple[int, int]]
"""Of each rung of a bracket: how many trials come to it, and after which epoch."""


def share(*key: object) -> float:
    """Draw a number from [0, 1) that depends on nothing but its key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2**56


def _grid(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    return plan.space.points()[number]


def _axes(space: Space) -> dict[str, Axis]:
    """Return all that is chosen: the cell, as if it were an axis, and the axes."""
    return {CELL: Choice(space.cells), **space.axes}


def _random(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    seed = plan.base.training.seed
    drawn: Point = {name: axis.at(share(seed, number, name)) for name, axis in _axes(plan.space).items()}
    return {**drawn.pop(CELL), **drawn}


def _tpe(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    """Tree-structured Parzen estimators (Bergstra et al., 2011) by Optuna, from all points that are known.

    Points that still train count with what they have reached, so that concurrent trials spread. Optuna hears of choices
    by their number, and of ranges by how far through them a value is.
    """
    import optuna  # takes a second to import, and only this strategy needs it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = _axes(plan.space)
    distributions = {name: optuna.distributions.FloatDistribution(0, 1) for name in axes}
    for name, axis in axes.items():
        if isinstance(axis, Choice):
            distributions[name] = optuna.distributions.CategoricalDistribution(range(len(axis.values)))
    seed = int(share(plan.base.training.seed, number, "tpe") * 2**31)
    startup = min(10, max(3, plan.points // 3))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=startup)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point in by_point(trials):
        values = [value for trial in point if (value := trial.last(plan.metric)) is not None]
        if values and point[0].point < number:
            known = point[0].values
            known[CELL] = next(cell for cell in plan.space.cells if cell.items() <= known.items())
            parameters = {
                name: axis.values.index(known[name]) if isinstance(axis, Choice) else axis.place(known[name])
                for name, axis in axes.items()
            }
            value = plan.sign * statistics.fmean(values)
            made = optuna.trial.create_trial(params=parameters, distributions=distributions, value=value)
            study.add_trial(made)
    found = study.ask(distributions).params
    asked: Point = {
        name: axis.values[found[name]] if isinstance(axis, Choice) else axis.at(found[name])
        for name, axis in axes.items()
    }
    return {**asked.pop(CELL), **asked}


SAMPLERS: dict[Sample, Sampler] = {"grid": _grid, "random": _random, "tpe": _tpe}


# --- which trials go on ----------------------------------------------------------------------------------------------


class Full:
    """Train every trial to its end; the base of the other schedules."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def after(self, trial: Trial, trials: Sequence[Trial]) -> Decision:
        """Decide what becomes of a trial that has just reported an epoch other than its last."""
        return "go"

    def settle(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the paused trials that can go on now, in order; those that lost are set to `stopped`."""
        return []

    def decides_at(self, epoch: int) -> bool:
        """Tell whether what `after` says of this epoch depends on which trials came to it first."""
        return False

    def _ranked(self, trials: Sequence[Trial], epoch: int) -> list[Trial]:
        """Sort by the metric after `epoch`, the best first; of equals the one that was begun first.

        A metric that is no number is the worst.
        """

        def score(trial: Trial) -> float:
            value = trial.curve(self.plan.metric).get(epoch)
            return -math.inf if value is None or value != value else self.plan.sign * value

        return sorted(trials, key=lambda one: (-score(one), one.number))


class Asha(Full):
    """Asynchronous successive halving (Li et al., 2020), in the form that stops instead of pausing.

    At epochs grace * eta^k a trial goes on if it is among the best 1/eta of those that have come so far.
    """

    def decides_at(self, epoch: int) -> bool:
        """Tell whether this epoch is a rung."""
        rung = self.plan.grace
        while rung < epoch:
            rung *= self.plan.eta
        return rung == epoch < self.plan.epochs

    def after(self, trial: Trial, trials: Sequence[Trial]) -> Decision:
        if not self.decides_at(trial.done):
            return "go"
        here = [one for one in trials if trial.done in one.curve(self.plan.metric) or one is trial]
        best = self._ranked(here, trial.done)[: max(1, len(here) // self.plan.eta)]
        return "go" if trial in best else "stop"


class HyperBand(Full):
    """Brackets of successive halving from many short trials to few long ones (Li et al., 2018, algorithm 1)."""

    def brackets(self) -> list[Rungs]:
        """List the rungs of each bracket; the last rung's epochs are those of a whole trial."""
        eta, whole = self.plan.eta, self.plan.epochs
        largest = int(math.log(whole / self.plan.grace, eta) + 1e-9)
        found: list[Rungs] = []
        for s in range(largest, -1, -1):
            count = math.ceil((largest + 1) / (s + 1) * eta**s)
            found.append([(max(1, count // eta**i), round(whole / eta ** (s - i))) for i in range(s + 1)])
        return found

    def _members(self, trials: Sequence[Trial]) -> Iterator[tuple[Rungs, list[Trial], bool]]:
        """Yield (rungs, trials, whether all trials have begun) of every bracket; after the last it starts again."""
        begin = 0
        for rungs in itertools.cycle(self.brackets()):
            end = min(begin + rungs[0][0], self.plan.trials)
            yield rungs, [one for one in trials if begin <= one.number < end], len(trials) >= end
            if end == self.plan.trials:
                return
            begin = end

    def after(self, trial: Trial, trials: Sequence[Trial]) -> Decision:
        rungs = next(rungs for rungs, members, _ in self._members(trials) if trial in members)
        return "pause" if trial.done in [epochs for _, epochs in rungs] else "go"

    def settle(self, trials: Sequence[Trial]) -> list[Trial]:
        ready: list[Trial] = []
        for rungs, members, complete in self._members(trials):
            if not complete:
                continue
            alive = members
            for (_, epochs), (places, _) in itertools.pairwise(rungs):
                if any(one.done < epochs and one.state != "failed" for one in alive):
                    break  # somebody is still on the way to this rung
                arrived = [one for one in alive if one.done >= epochs]
                # A bracket that the number of trials cut short has as many fewer places.
                places = max(1, places * len(members) // rungs[0][0])
                alive = self._ranked(arrived, epochs)[:places]
                here = [one for one in arrived if one.state == "paused" and one.done == epochs]
                ready += [one for one in here if one in alive]
                for one in here:
                    one.state = "paused" if one in alive else "stopped"
        return ready


class PopulationBased(Full):
    """Population-based training (Jaderberg et al., 2017): truncation selection, every `grace` epochs.

    When the whole population has arrived, each of the worst 1/eta takes the weights of one of the best 1/eta, and its
    values, each moved to a neighbour: a number by a fifth, a choice by one place.
    """

    def after(self, trial: Trial, trials: Sequence[Trial]) -> Decision:
        return "pause" if trial.done % self.plan.grace == 0 else "go"

    def settle(self, trials: Sequence[Trial]) -> list[Trial]:
        ready, begun = [], len(trials) == self.plan.trials
        for one in trials:
            arrived = begun and all(other.done >= one.done or other.state == "failed" for other in trials)
            if one.state == "paused" and arrived:
                if (clone := self._exploit(one, trials)) is not None and clone not in one.lineage:
                    one.lineage.append(clone)
                ready.append(one)
        return ready

    def _exploit(self, trial: Trial, trials: Sequence[Trial]) -> Clone | None:
        epoch, seed = trial.done, self.plan.base.training.seed
        ranked = self._ranked([one for one in trials if one.done >= epoch], epoch)
        few = max(1, len(ranked) // self.plan.eta)
        if trial not in ranked[-few:] or len(ranked) < 2 * few:
            return None
        source = ranked[int(share(seed, epoch, trial.number, "source") * few)]
        before = source.values_before(epoch)
        values = {
            name: axis.moved(before[name], share(seed, epoch, trial.number, name))
            for name, axis in self.plan.space.axes.items()
        }
        return Clone(epoch=epoch, source=source.number, values=values)


SCHEDULES: dict[Schedule, type[Full]] = {
    "full": Full,
    "asha": Asha,
    "hyperband": HyperBand,
    "pbt": PopulationBased,
}
