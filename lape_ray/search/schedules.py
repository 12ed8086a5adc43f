"""Which trials go on: pure functions of the plan and the trials' records.

`after` is asked when a trial has reported an epoch, `settle` when some trials pause.
ASHA decides at once by what is there; HyperBand and population-based training wait until all trials that are to be
compared have arrived, so that their outcome does not depend on which worker was faster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from lape_ray.search.plan import Plan, Schedule
from lape_ray.search.record import Clone, Trial
from lape_ray.search.samplers import share

Decision = Literal["go", "pause", "stop"]
Rungs = list[tuple[int, int]]
"""Of each rung of a bracket: how many trials come to it, and after which epoch."""


class Full:
    """Every trial trains to its end; the base of the other schedules."""

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
            value = trial.at(epoch, self.plan.metric)
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
        here = [one for one in trials if one.at(trial.done, self.plan.metric) is not None or one is trial]
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
        ready = []
        for one in trials:
            if one.state == "paused" and self._all_arrived(trials, one.done):
                if (clone := self._exploit(one, trials)) is not None and clone not in one.lineage:
                    one.lineage.append(clone)
                ready.append(one)
        return ready

    def _all_arrived(self, trials: Sequence[Trial], epoch: int) -> bool:
        begun = len(trials) == self.plan.trials
        return begun and all(one.done >= epoch or one.state == "failed" for one in trials)

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
