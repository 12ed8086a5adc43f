"""What scheduler, searcher and callbacks of one search share in the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune.experiment import Trial as TuneTrial

from lape_ray.search import resources
from lape_ray.search.cells import label, labels
from lape_ray.search.live import Display
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial
from lape_ray.search.runs import Runs
from lape_ray.search.samplers import SAMPLERS
from lape_ray.search.schedules import SCHEDULES
from lape_ray.search.settings import Settings, train_config
from lape_ray.search.space import differing
from lape_ray.search.trials import Records, trial_config

_OPEN: dict[str, Session] = {}


class Session:
    """A search while a driver is at work on it.

    Tune pickles its scheduler, searcher and callbacks as a search begins, and continues it with what it reads again.
    A session is pickled as what it was made from, and read again as the one that is open in this process.
    """

    display: Display
    runs: Runs
    supervisor: Any

    def __init__(self, plan: Plan, settings: Settings, concurrent: int | None) -> None:
        self.plan, self.settings, self.concurrent = plan, settings, concurrent
        self.records = Records()
        self.scheduler = SCHEDULES[plan.schedule](plan)
        self.names = labels(plan.space.points()) if plan.sample == "grid" else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.plan, self.settings, self.concurrent)

    def open(self, display: Display, runs: Runs, supervisor: Any) -> None:
        """Make this the session that Tune's objects of the search belong to."""
        self.display, self.runs, self.supervisor = display, runs, supervisor
        _OPEN[self.settings.folder] = self

    def close(self) -> None:
        _OPEN.pop(self.settings.folder, None)

    @property
    def trials(self) -> list[Trial]:
        """All that were begun, by number."""
        return self.records.trials

    @property
    def over(self) -> bool:
        return is_over(self.plan, self.trials)

    @property
    def training(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "running"]

    @property
    def busy(self) -> int:
        """Trials that train, or wait for room to."""
        return sum(trial.state in ("running", "waiting") for trial in self.trials)

    @property
    def full(self) -> bool:
        """Tell whether no more trials may begin now."""
        most = self.concurrent
        if most is None and self.plan.sample == "tpe":  # which asks only when there is room, to know the most
            most = resources.room(self.settings.need, self.settings.workers)
        return most is not None and self.busy >= most

    def next_trial(self) -> dict[str, Any] | None:
        """Return the config of the next trial for Tune, or None while there is none."""
        number = len(self.trials)
        if number == self.plan.trials or self.full:
            return None
        trial = self._new_trial(number)
        config = trial_config(trial)
        if self.runs is not None:
            try:
                whole = train_config(self.plan.base, self.plan.name, config)
            except (
                ValueError
            ):  # settings of a sampled point contradict each other, of which the trial will tell
                return config
            config["run_id"] = self.runs.open_child(trial, whole)
        return config

    def _new_trial(self, number: int) -> Trial:
        plan, trials = self.plan, self.trials
        repeat, point = divmod(number, plan.points)
        if repeat:
            first = next(trial for trial in trials if trial.point == point)
            values, name = dict(first.first), first.label
        else:
            values = SAMPLERS[plan.sample](plan, point, trials)
            name = self.names[point] if self.names else _sampled_label(point, values, plan)
        return Trial(number=number, point=point, seed=plan.seeds[repeat], label=name, first=values)

    def refresh(self, trials: list[TuneTrial]) -> None:
        """Bring all records up to date."""
        for trial in trials:
            self.records.update(trial)


def is_over(plan: Plan, trials: Sequence[Trial]) -> bool:
    return len(trials) == plan.trials and all(trial.over for trial in trials)


def _reopened(plan: Plan, settings: Settings, concurrent: int | None) -> Session:
    return _OPEN.get(settings.folder) or Session(plan, settings, concurrent)


def _sampled_label(number: int, values: dict[str, Any], plan: Plan) -> str:
    """Join the number and the settings of a sampled point."""
    fields = [*(differing(plan.space.cells) if len(plan.space.cells) > 1 else ()), *plan.space.axes]
    return f"#{number:03} {label(values, fields)}"
