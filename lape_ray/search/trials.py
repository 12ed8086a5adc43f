"""The trials of a search as Ray Tune holds them, and as the rest of this room sees them.

What the driver decides about a trial lies in its config, and what the trial reports, its whole curve so far, in its
last result. Both are in every snapshot that Tune takes, so that a record is a view of one and needs no file.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.experiment import Trial as TuneTrial

from lape_ray.search.record import Epoch, State, Trial

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
    states: dict[str, State] = {
        TuneTrial.TERMINATED: "stopped", TuneTrial.PAUSED: "paused", TuneTrial.RUNNING: "running",
    }  # fmt: skip
    return states.get(trial.status, "waiting")


def _given_up(trial: TuneTrial) -> str:
    """Say why a trial is not tried again."""
    first, *more = error_of(trial).splitlines()
    words = f"{first}, {trial.num_failures} times; --run.max_failures allows {trial.max_failures}"
    return "\n".join([words, *more])


def error_of(trial: TuneTrial) -> str:
    """Put the last error of a trial's actors in words: what it was in the first line, then where it came from."""
    local = trial.pickled_error_file
    here = local and Path(local).exists()
    error = pickle.loads(Path(local).read_bytes()) if here else trial.get_pickled_error()
    cause = cause_of(error)
    if cause is None or isinstance(cause, RayError):
        return DIED
    return f"{type(cause).__name__}: {cause}\n{error}"


def cause_of(error: BaseException) -> BaseException:
    """Return what was raised in the process that an error comes from."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def analysis(folder: str, metric: str | None = None, mode: str | None = None) -> tune.ExperimentAnalysis:
    """Open the search in `folder` as Ray Tune's analysis of it.

    Its `results_df` has a row for each trial, with all that it reported at last; `curve` holds its epochs.
    """
    # It warns of files by which it would read epochs, and which no trial here writes.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    return tune.ExperimentAnalysis(folder, default_metric=metric, default_mode=mode)


def read_trials(folder: str) -> list[Trial]:
    """Read the trials of the search in `folder` from Tune's newest snapshot of it, by number."""
    records = Records()
    records.refresh(analysis(folder).trials)
    return records.trials
