"""The state of a search: which trial a free worker group trains next, and what becomes of each report.

It holds the records and asks sampler and scheduler; it knows no Ray, no MLflow and no clock. Every change is in the
ledger before anybody acts on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lape_ray.config import TrainConfig, replace_fields
from lape_ray.search.cells import label, labels
from lape_ray.search.ledger import Clone, Epoch, Ledger, Trial
from lape_ray.search.plan import Plan
from lape_ray.search.samplers import SAMPLERS
from lape_ray.search.schedules import SCHEDULES, Decision
from lape_ray.search.space import differing


@dataclass(frozen=True)
class Job:
    """A trial that a worker group shall train on."""

    trial: Trial
    config: TrainConfig
    clone: Clone | None
    """Where its weights come from, if it has none of its own at that epoch."""


class Engine:
    """Decides about one search; continues what the ledger holds."""

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.plan, self.ledger = plan, ledger
        self.trials = ledger.load()
        self._scheduler = SCHEDULES[plan.schedule](plan)
        self._sampler = SAMPLERS[plan.sample]
        self._training: set[int] = set()
        self._names = labels(plan.space.points()) if plan.sample == "grid" else None

    @property
    def over(self) -> bool:
        return len(self.trials) == self.plan.trials and all(trial.over for trial in self.trials)

    @property
    def most_at_once(self) -> int:
        """Trials that could train at the same time from now on."""
        return sum(not trial.over for trial in self.trials) + self.plan.trials - len(self.trials)

    def next_job(self) -> Job | Literal["wait", "over"]:
        """Return what a free worker group does next."""
        while (trial := self._next_trial()) is not None:
            trial.state = "running"
            try:
                config = self.config(trial)
            except ValueError as error:  # a sampled point whose settings contradict each other
                self.failed(trial.number, str(error))
                continue
            self._training.add(trial.number)
            self.ledger.save(trial)
            clone = trial.lineage[-1] if trial.lineage and trial.lineage[-1].epoch == trial.done else None
            return Job(trial, config, clone)
        return "over" if self.over else "wait"

    def _next_trial(self) -> Trial | None:
        for trial in self.trials:  # an earlier process began it, or a worker group lost it
            if trial.state == "running" and trial.number not in self._training:
                return trial
        states = [trial.state for trial in self.trials]
        ready = [trial for trial in self._scheduler.settle(self.trials) if trial.number not in self._training]
        for trial, state in zip(self.trials, states, strict=True):
            if trial.state != state:
                self.ledger.save(trial)
        if ready:
            return ready[0]
        return self._new_trial() if len(self.trials) < self.plan.trials else None

    def _new_trial(self) -> Trial:
        number = len(self.trials)
        repeat, point = divmod(number, self.plan.points)
        if repeat:
            first = next(trial for trial in self.trials if trial.point == point)
            values, name = dict(first.first), first.label
        else:
            values = self._sampler(self.plan, point, self.trials)
            name = self._names[point] if self._names else _sampled_label(point, values, self.plan)
        trial = Trial(number=number, point=point, seed=self.plan.seeds[repeat], label=name, first=values)
        self.trials.append(trial)
        return trial

    def config(self, trial: Trial) -> TrainConfig:
        """Make the whole config of a trial as it is now."""
        name = f"{self.plan.name}-{trial.id}"
        return replace_fields(self.plan.base, {**trial.values, "training.seed": trial.seed, "run.name": name})

    def report(
        self, number: int, epoch: int, metrics: Mapping[str, float], *, seconds: float, checkpoint: str
    ) -> Decision:
        """Note that an epoch is done, and saved; returns what the trial does now.

        An epoch that is known already changes nothing.
        """
        trial = self.trials[number]
        trial.checkpoint = checkpoint
        if epoch <= trial.done:
            return "go"
        trial.epochs.append(Epoch(epoch=epoch, metrics=dict(metrics), seconds=seconds))
        decision: Decision = "go" if epoch >= self.plan.epochs else self._scheduler.after(trial, self.trials)
        if epoch >= self.plan.epochs:
            trial.state = "finished"
        elif decision == "stop":
            trial.state = "stopped"
        elif decision == "pause":
            trial.state = "paused"
        self.ledger.save(trial)
        return decision

    def left(self, number: int) -> None:
        """Note that a worker group has let go of a trial."""
        self._training.discard(number)

    def loaded(self, number: int, what: Mapping[str, object]) -> None:
        """Note that a clone has taken over another trial's weights."""
        self.trials[number].loaded.append(dict(what))
        self.ledger.save(self.trials[number])

    def failed(self, number: int, error: str) -> None:
        """Note that a trial cannot go on; the search does."""
        trial = self.trials[number]
        self._training.discard(number)
        if not trial.over:
            trial.state, trial.error = "failed", error
        self.ledger.save(trial)

    def crashed(self, number: int, reason: str) -> bool:
        """Note that a trial's workers died; returns whether it is tried again, from its newest checkpoint."""
        trial = self.trials[number]
        self._training.discard(number)
        trial.crashes += 1
        limit = self.plan.base.run.max_failures
        if trial.over or trial.state == "paused":
            self.ledger.save(trial)  # all that was asked of it was done
            return False
        if trial.crashes > limit:
            self.failed(number, f"{reason}, {trial.crashes} times; --run.max_failures allows {limit}")
            return False
        self.ledger.save(trial)
        return True


def _sampled_label(number: int, values: Mapping[str, object], plan: Plan) -> str:
    """Join the number and the settings of a sampled point."""
    fields = [*(differing(plan.space.cells) if len(plan.space.cells) > 1 else ()), *plan.space.axes]
    return f"#{number:03} {label(values, fields)}"
