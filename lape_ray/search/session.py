"""A search while a driver is at work on it: what scheduler, searcher and callbacks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lape_ray.cluster.resources import room
from lape_ray.cluster.supervisor import supervised
from lape_ray.search.cells import label, labels
from lape_ray.search.live import Display
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial
from lape_ray.search.runs import Runs
from lape_ray.search.samplers import SAMPLERS
from lape_ray.search.schedules import SCHEDULES
from lape_ray.search.settings import SearchSupervisor, Settings
from lape_ray.search.space import differing
from lape_ray.search.trials import Records

_OPEN: dict[str, Session] = {}


class Session(Records):
    """The records of a search's trials, and all that is needed to begin and to judge them.

    Tune pickles its scheduler, searcher and callbacks as a search begins, and continues it with what it reads again.
    They find the session that is open in this process then, and none where their search is only looked at.
    """

    def __init__(
        self, settings: Settings, concurrent: int | None, display: Display, runs: Runs, supervisor: Any
    ) -> None:
        super().__init__()
        self.plan, self.settings, self.concurrent = settings.plan, settings, concurrent
        self.display, self.runs, self.supervisor = display, runs, supervisor
        self.rule = SCHEDULES[self.plan.schedule](self.plan)
        self._labels = labels(self.plan.space.points()) if self.plan.sample == "grid" else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.settings.folder,)

    @property
    def over(self) -> bool:
        return is_over(self.plan, self.trials)

    @property
    def full(self) -> bool:
        """Tell whether no more trials may begin now."""
        most = self.concurrent
        if most is None and self.plan.sample == "tpe":  # which asks only when there is room, to know the most
            most = room(self.settings.need, self.plan.workers)
        busy = sum(trial.state in ("running", "waiting") for trial in self.trials)
        return most is not None and busy >= most

    def next_trial(self) -> dict[str, Any] | None:
        """Return the config of the next trial for Tune, or None while there is none."""
        number = len(self.trials)
        if number == self.plan.trials or self.full:
            return None
        trial = self._new_trial(number)
        try:
            config = self.plan.config(trial)
        except ValueError:  # settings of a sampled point contradict each other, of which the trial will tell
            return trial.config()
        trial.run_id = self.runs.open_child(trial, config)
        return trial.config()

    def _new_trial(self, number: int) -> Trial:
        plan, trials = self.plan, self.trials
        repeat, point = divmod(number, plan.points)
        if repeat:
            first = next(trial for trial in trials if trial.point == point)
            values, name = dict(first.first), first.label
        else:
            values = SAMPLERS[plan.sample](plan, point, trials)
            fields = [*(differing(plan.space.cells) if len(plan.space.cells) > 1 else ()), *plan.space.axes]
            name = self._labels[point] if self._labels else f"#{point:03} {label(values, fields)}"
        return Trial(number=number, point=point, seed=plan.seeds[repeat], label=name, first=values)


def is_over(plan: Plan, trials: Sequence[Trial]) -> bool:
    return len(trials) == plan.trials and all(trial.over for trial in trials)


def _opened(folder: str) -> Session | None:
    return _OPEN.get(folder)


@contextlib.contextmanager
def opened(settings: Settings, concurrent: int | None, display: Display, runs: Runs) -> Iterator[Session]:
    """Open a session, and its supervisor, by whose name trials find it; a second driver is refused."""
    with supervised(SearchSupervisor, settings.folder, settings) as supervisor:
        _OPEN[settings.folder] = Session(settings, concurrent, display, runs, supervisor)
        try:
            yield _OPEN[settings.folder]
        finally:
            del _OPEN[settings.folder]
