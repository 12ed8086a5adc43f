"""The Tuner of a search: made, or restored from what an earlier driver has left, and run to the end."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from typing import Any

from ray import tune

from lape_ray import storage
from lape_ray.cluster.supervisor import until_stopped
from lape_ray.search.callbacks import Show, Watch
from lape_ray.search.scheduler import Points, Rule
from lape_ray.search.session import Session
from lape_ray.search.trial import LapeTrial
from lape_ray.values.environment import environment

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the search shows itself
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # and keeps its curves
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every epoch is evaluated
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


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
            callbacks=[Show(session), Watch(session)],
            verbose=0,
        ),
    )


def _trial_name(trial: tune.experiment.Trial) -> str:
    return f"trial-{trial.config['number']:04}"


def whole_snapshot(folder: str, tell: Callable[[str], None]) -> bool:
    """Tell whether Tune has a snapshot in `folder` that it can restore; delete what a kill has cut in half.

    Tune itself would start every trial anew from a torn one, without an error. Without any, a new search finds what its
    trials have stored.
    """
    readers: dict[str, Callable[[bytes], Any]] = {
        "search_gen_state-": pickle.loads,
        "experiment_state-": lambda text: json.loads(text)["trial_data"][
            0
        ],  # Tune cannot restore one without trials
    }
    whole = dict.fromkeys(readers, False)
    for name in sorted(storage.names(folder)):
        for prefix in filter(name.startswith, readers):
            address = storage.join(folder, name)
            try:
                with storage.opened(address) as file:
                    readers[prefix](file.read_bytes())
                whole[prefix] = True
            except Exception as error:  # whatever half a file makes its reader say
                tell(f"{address} is torn, going on from what is older: {type(error).__name__}")
                storage.delete_file(address)
    return all(whole.values())
