"""The Tuner of a search: made, or restored from what an earlier driver has left, and run to the end."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lape_ray import storage
from lape_ray.cluster.connection import only_actor
from lape_ray.cluster.supervisor import until_stopped
from lape_ray.search.callbacks import Show, Watch
from lape_ray.search.live import Display
from lape_ray.search.runs import Runs
from lape_ray.search.scheduler import Rule
from lape_ray.search.searcher import Points
from lape_ray.search.session import Session
from lape_ray.search.settings import SearchSupervisor
from lape_ray.search.trial import LapeTrial
from lape_ray.values.environment import environment

SNAPSHOT, SEARCHER = "experiment_state-", "search_gen_state-"
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the search shows itself
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # and keeps its curves
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every epoch is evaluated
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@contextlib.contextmanager
def opened(session: Session, display: Display, runs: Runs) -> Iterator[None]:
    """Open a session: start its supervisor, by whose name trials find it; a second driver is refused."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    supervisor = only_actor(
        SearchSupervisor,
        session.settings.folder,
        session.settings,
        max_concurrency=1000,
        scheduling_strategy=here,
    )
    session.open(display, runs, supervisor)
    try:
        with environment(_ENVIRONMENT):
            yield
    finally:
        session.close()
        ray.kill(supervisor)


def run_tuner(session: Session, trainable: type[LapeTrial] = LapeTrial) -> tune.ResultGrid:
    """Train until every trial is over; SIGTERM or Ctrl-C ends it after a checkpoint of each.

    Raises:
        StoppedError: it was asked to end.
        ResourcesGoneError: the cluster can hold no trial any more.
    """
    folder = session.settings.folder
    tuner = make_tuner(session, trainable)
    if whole_snapshot(
        folder, session.display.line
    ):  # what is restored are the objects that were just written
        tuner = tune.Tuner.restore(folder, trainable)
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
    found = sorted(storage.names(folder), reverse=True)
    for name in [name for name in found if name.startswith(SEARCHER)]:
        _drop_torn(folder, name, pickle.loads, tell)
    for name in [name for name in found if name.startswith(SNAPSHOT)]:
        _drop_torn(folder, name, _trials_of, tell)
    left = storage.names(folder)
    return all(any(name.startswith(prefix) for name in left) for prefix in (SNAPSHOT, SEARCHER))


def _drop_torn(folder: str, name: str, read: Callable[[bytes], Any], tell: Callable[[str], None]) -> None:
    address = storage.join(folder, name)
    try:
        with storage.opened(address) as file:
            read(file.read_bytes())
    except Exception as error:  # whatever half a file makes its reader say
        tell(f"{address} is torn, going on from what is older: {type(error).__name__}")
        storage.delete_file(address)


def _trials_of(snapshot: bytes) -> list[Any]:
    """Return the trials of a snapshot; a ValueError where it has none, which Tune cannot restore."""
    trials: list[Any] = json.loads(snapshot)["trial_data"]
    if not trials:
        raise ValueError("no trial has begun")
    return trials
