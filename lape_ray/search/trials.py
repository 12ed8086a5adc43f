"""The trials of a search as Ray Tune holds them, and as the rest of this room sees them.

What the driver decides about a trial lies in its config, and what the trial reports, its whole curve so far, in its
last result. Both are in every snapshot that Tune takes, so that a record is a view of one and needs no file.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune.experiment import Trial as TuneTrial

from lape_ray.cluster.resources import room
from lape_ray.cluster.supervisor import supervised
from lape_ray.search.cells import label, labels
from lape_ray.search.live import Display
from lape_ray.search.plan import Plan
from lape_ray.search.record import Epoch, State, Trial
from lape_ray.search.runs import Runs
from lape_ray.search.settings import SearchSupervisor, Settings, cause_of
from lape_ray.search.space import differing
from lape_ray.search.strategies import SAMPLERS, SCHEDULES

_OPEN: dict[str, Session] = {}
_STATES: dict[str, State] = {"TERMINATED": "stopped", "PAUSED": "paused", "RUNNING": "running"}
DIED = "its workers died: killed, out of memory, or their node went away"


class Records:
    """The records of one search's trials, brought up to date from Tune's trials."""

    def __init__(self) -> None:
        self._known: dict[int, Trial] = {}

    @property
    def trials(self) -> list[Trial]:
        """Return all that were begun, by number."""
        return [self._known[number] for number in sorted(self._known)]

    def refresh(self, trials: Iterable[TuneTrial]) -> None:
        for trial in trials:
            self.update(trial)

    def update(self, trial: TuneTrial, result: Mapping[str, Any] | None = None) -> Trial:
        """Bring the record of `trial` up to date; `result` is one that Tune has not taken over yet."""
        result = trial.run_metadata.last_result if result is None else result
        decided = Trial.of(trial.config)
        record = self._known.setdefault(decided.number, decided)
        record.epochs += [Epoch(**one) for one in result.get("curve", ())[len(record.epochs) :]]
        record.lineage += decided.lineage[len(record.lineage) :]
        record.run_id, record.crashes = decided.run_id, trial.num_failures
        record.checkpoint = result.get("checkpoint") or record.checkpoint
        record.loaded = result.get("loaded") or record.loaded
        record.state = _state(trial, result)
        if record.state == "failed" and not record.error:
            record.error = result.get("failed") or _given_up(trial)
        return record


def _state(trial: TuneTrial, result: Mapping[str, Any]) -> State:
    """Tell the state of a Tune trial in the search's terms."""
    if result.get("failed") or trial.status == TuneTrial.ERROR:
        return "failed"
    if result.get("complete"):
        return "finished"
    return _STATES.get(trial.status, "waiting")


def _given_up(trial: TuneTrial) -> str:
    """Say why a trial is not tried again."""
    first, *more = error_of(trial).splitlines()
    first += f", {trial.num_failures} times; --run.max_failures allows {trial.max_failures}"
    return "\n".join([first, *more])


def error_of(trial: TuneTrial) -> str:
    """Put the last error of a trial's actors in words: what it was in the first line, then where it came from."""
    local = trial.pickled_error_file
    here = local and Path(local).exists()
    error = pickle.loads(Path(local).read_bytes()) if here else trial.get_pickled_error()
    cause = cause_of(error)
    if cause is None or isinstance(cause, RayError):
        return DIED
    return f"{type(cause).__name__}: {cause}\n{error}"


def analysis(folder: str) -> tune.ExperimentAnalysis:
    """Open the search in `folder` as Ray Tune's analysis of it.

    Its `results_df` has a row for each trial, with all that it reported at last; `curve` holds its epochs.
    """
    # It warns of files by which it would read epochs, and which no trial here writes.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    return tune.ExperimentAnalysis(folder)


def read_trials(folder: str) -> list[Trial]:
    """Read the trials of the search in `folder` from Tune's newest snapshot of it, by number."""
    records = Records()
    records.refresh(analysis(folder).trials)
    return records.trials


# --- while a driver is at work on them ----------------------------------------------------------------------------


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
            values, name = dict(trials[point].first), trials[point].label
        else:
            values = SAMPLERS[plan.sample](plan, point, trials)
            fields = [*differing(plan.space.cells), *plan.space.axes]
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
