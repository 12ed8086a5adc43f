"""Which trials go on: pure functions of the plan and the trials' records.

`after` is asked when a trial has reported an epoch, `resume` when a worker group is free and some trials pause.
ASHA decides at once by what is there; HyperBand and population-based training wait until all trials that are to be
compared have arrived, so that their outcome does not depend on which worker was faster.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from lape_ray.search.ledger import Clone, Trial
from lape_ray.search.plan import Plan, Schedule
from lape_ray.search.samplers import share

Decision = Literal["go", "pause", "stop"]


class Scheduler(ABC):
    """The interface: decisions about the trials of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @abstractmethod
    def after(self, trial: Trial, trials: Sequence[Trial]) -> Decision:
        """Decide what becomes of a trial that has just reported an epoch other than its last."""

    def settle(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the paused trials that can go on now, in order; those that lost are set to `stopped`."""
        return []

    def _score(self, trial: Trial, epoch: int) -> float:
        """Of an epoch that the trial has reported, larger is better; a metric that is no number is the worst."""
        value = trial.at(epoch, self.plan.metric)
        return -math.inf if value is None or value != value else self.plan.sign * value

    def _ranked(self, trials: Sequence[Trial], epoch: int) -> list[Trial]:
        """Sort the best first; of equals the one that was begun first."""
        return sorted(trials, key=lambda one: (-self._score(one, epoch), one.number))


class Full(Scheduler):
    """Every trial trains to its end."""

    def after(self, trial: Trial, trials: Sequence[Trial]) -> Decision:
        return "go"


class Asha(Scheduler):
    """Asynchronous successive halving (Li et al., 2020), in the form that stops instead of pausing.

    At epochs grace * eta^k a trial goes on if it is among the best 1/eta of those that have come so far.
    """

    def rungs(self) -> list[int]:
        found, epoch = [], self.plan.grace
        while epoch < self.plan.epochs:
            found.append(epoch)
            epoch *= self.plan.eta
        return found

    def after(self, trial: Trial, trials: Sequence[Trial]) -> Decision:
        if trial.done not in self.rungs():
            return "go"
        here = [one for one in trials if one.at(trial.done, self.plan.metric) is not None or one is trial]
        best = self._ranked(here, trial.done)[: max(1, len(here) // self.plan.eta)]
        return "go" if trial in best else "stop"


class HyperBand(Scheduler):
    """Brackets of successive halving from many short trials to few long ones (Li et al., 2018, algorithm 1)."""

    def brackets(self) -> list[list[tuple[int, int]]]:
        """Of each bracket, (trials, epochs) of each rung; the last rung's epochs are those of a whole trial."""
        eta, whole = self.plan.eta, self.plan.epochs
        largest = int(math.log(whole / self.plan.grace, eta) + 1e-9)
        found: list[list[tuple[int, int]]] = []
        for s in range(largest, -1, -1):
            count = math.ceil((largest + 1) / (s + 1) * eta**s)
            found.append([(max(1, count // eta**i), round(whole / eta ** (s - i))) for i in range(s + 1)])
        return found

    def _members(self, trials: Sequence[Trial]) -> list[tuple[list[tuple[int, int]], list[Trial], bool]]:
        """(rungs, trials, whether all trials have begun) of every bracket; after the last it starts again."""
        found: list[tuple[list[tuple[int, int]], list[Trial], bool]] = []
        begin = 0
        brackets = self.brackets()
        while begin < self.plan.trials:
            rungs = brackets[len(found) % len(brackets)]
            end = min(begin + rungs[0][0], self.plan.trials)
            found.append((rungs, [one for one in trials if begin <= one.number < end], len(trials) >= end))
            begin = end
        return found

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
                for one in arrived:
                    if one.state == "paused" and one.done == epochs:
                        if one in alive:
                            ready.append(one)
                        else:
                            one.state = "stopped"
        return ready


class PopulationBased(Scheduler):
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


SCHEDULES: dict[Schedule, type[Scheduler]] = {
    "full": Full,
    "asha": Asha,
    "hyperband": HyperBand,
    "pbt": PopulationBased,
}
