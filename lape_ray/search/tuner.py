"""The Tuner of a search: made, or restored from what an earlier driver has left, and run to the end."""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from lape_ray import storage
from lape_ray.cluster.resources import wait_for_room
from lape_ray.cluster.supervisor import StopRequest, until_stopped
from lape_ray.search.scheduler import Points, Rule
from lape_ray.search.trial import LapeTrial
from lape_ray.search.trials import Session, error_of
from lape_ray.training.loop import StoppedError
from lape_ray.values.environment import environment

PATIENCE_S = 120.0  # for a step and a checkpoint of every trial that trains, once the search is asked to end
LOOK_S = 1.0  # between two looks at whether there is room, while no trial trains
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the search shows itself
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # and keeps its curves
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every epoch is evaluated
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


class ResourcesGoneError(RuntimeError):
    """The cluster can hold no trial of the search any more."""

    exit_code = 1


def run_tuner(session: Session, trainable: type[LapeTrial] = LapeTrial) -> tune.ResultGrid:
    """Train until every trial is over; SIGTERM or Ctrl-C ends it after a checkpoint of each.

    Raises:
        StoppedError: it was asked to end.
        ResourcesGoneError: the cluster can hold no trial any more.
    """
    folder = session.settings.folder
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with environment(_ENVIRONMENT):
        tuner = make_tuner(session, trainable)
        if whole_snapshot(folder, session.display.line):
            tuner = tune.Tuner.restore(folder, trainable)  # with the objects that were just written
        return until_stopped(tuner.fit, session.supervisor)


def make_tuner(session: Session, trainable: type[LapeTrial]) -> tune.Tuner:
    """Make the Tuner of a new search."""
    plan = session.plan
    root, _, name = session.settings.folder.rpartition("/")
    return tune.Tuner(
        trainable,
        param_space={},
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode="max" if plan.sign > 0 else "min",
            search_alg=Points(session),
            scheduler=Rule(session),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=root,
            failure_config=tune.FailureConfig(max_failures=plan.base.run.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[Watch(session)],
            verbose=0,
        ),
    )


def _trial_name(trial: TuneTrial) -> str:
    return f"trial-{trial.config['number']:04}"


_READERS: dict[str, Callable[[bytes], Any]] = {
    "search_gen_state-": pickle.loads,
    "experiment_state-": lambda text: json.loads(text)["trial_data"][0],  # Tune restores none without trials
}


def whole_snapshot(folder: str, tell: Callable[[str], None]) -> bool:
    """Tell whether Tune has a snapshot in `folder` that it can restore; delete what a kill has cut in half.

    Tune itself would start every trial anew from a torn one, without an error. Without any, a new search finds what its
    trials have stored.
    """
    whole = set()
    for name in sorted(storage.names(folder)):
        for prefix in filter(name.startswith, _READERS):
            address = storage.join(folder, name)
            try:
                with storage.opened(address) as file:
                    _READERS[prefix](file.read_bytes())
                whole.add(prefix)
            except Exception as error:  # whatever half a file makes its reader say
                tell(f"{address} is torn, going on from what is older: {type(error).__name__}")
                storage.delete_file(address)
    return whole == set(_READERS)


class Watch(tune.Callback):
    """Show the search to people, keep its trials' runs in MLflow true, and end it where it cannot go on."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._interrupted: set[str] = set()
        self._stop: StopRequest | None = None
        self._asked = self._looked = 0.0

    def on_trial_start(self, *, trial: TuneTrial, **info: Any) -> None:
        """Reopen the run of a trial that an earlier driver closed."""
        self.session.runs.reopen(self.session.update(trial))

    def on_trial_result(self, *, trial: TuneTrial, result: dict[str, Any], **info: Any) -> None:
        """Show an epoch, or note that the workers have left a checkpoint because the search is to end."""
        record = self.session.update(trial, result)
        if result.get("interrupted"):
            self._interrupted.add(trial.trial_id)
        elif not result.get("failed"):
            decision = "  pauses" if trial.status == TuneTrial.PAUSED else ""
            if result["done"] and not result["complete"]:
                decision = "  stopped: among the worse of its rung"
            self.session.display.reported(record, self.session.trials, decision)

    def on_trial_complete(self, *, trial: TuneTrial, **info: Any) -> None:
        """Close the run of a trial that is over."""
        record = self.session.update(trial)
        record.state = record.state if record.over else "stopped"
        self.session.runs.settle(record)
        self.session.display.ended(record, self.session.trials)

    on_trial_error = on_trial_complete

    def on_trial_recover(self, *, trial: TuneTrial, **info: Any) -> None:
        """Say that a trial is tried again."""
        self.session.display.line(
            f"trial {self.session.update(trial).id} goes on from its newest checkpoint, as it was interrupted: "
            f"{error_of(trial).splitlines()[0]}"
        )

    def on_step_end(self, *, trials: list[TuneTrial], **info: Any) -> None:
        """Draw the table anew, and look whether the search can go on.

        Raises:
            StoppedError: it was asked to end, and every trial that trained has left a checkpoint.
            ResourcesGoneError: for `run.wait_s` the cluster has had no room for a trial.
        """
        self.session.refresh(trials)
        self.session.display.draw(self.session.trials)
        running = {trial.trial_id for trial in trials if trial.status == TuneTrial.RUNNING}
        if self._stop is None:
            self._stop = StopRequest(self.session.supervisor)
        if not running and time.monotonic() > self._looked + LOOK_S:
            self._wait_for_nodes(self._stop)
            self._looked = time.monotonic()
        if self._stop:
            self._asked = self._asked or time.monotonic()
            if running <= self._interrupted or time.monotonic() > self._asked + PATIENCE_S:
                raise StoppedError("the search was stopped, and every trial left a checkpoint")

    def _wait_for_nodes(self, stop: StopRequest) -> None:
        plan, need, tell = self.session.plan, self.session.settings.need, self.session.display.line
        wait_s = plan.base.run.wait_s
        try:
            wait_for_room("a trial", need, plan.workers, wait_s=wait_s, tell=tell, stop=stop.__bool__)
        except ValueError as error:
            if not stop:
                raise ResourcesGoneError(f"{error}; the same command continues the search") from None
