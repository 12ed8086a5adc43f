"""search(): a plan, carried out over a cluster, to its report. The same call continues what was interrupted."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ray import tune

from lape_ray import storage, tracking
from lape_ray.cli import typed_command
from lape_ray.cluster.connection import connected
from lape_ray.cluster.controller import variables
from lape_ray.cluster.launch import prepared
from lape_ray.cluster.on_ray import refuse_local_store, uses_gpu
from lape_ray.config import replace_fields
from lape_ray.model import build_model
from lape_ray.search import resources
from lape_ray.search.cells import check_point
from lape_ray.search.live import Display
from lape_ray.search.page import HTML, write_report
from lape_ray.search.plan import Plan, check_plan, plan_differences
from lape_ray.search.record import Trial, read_search, write_search
from lape_ray.search.runs import Runs
from lape_ray.search.session import Session, is_over
from lape_ray.search.settings import Settings
from lape_ray.search.statistics import Cell, cells, in_words
from lape_ray.search.tables import command_line, plain
from lape_ray.search.trials import analysis, read_trials
from lape_ray.search.tuner import opened, run_tuner, whole_snapshot
from lape_ray.training.inputs import changed_inputs, input_digests
from lape_ray.training.loop import StoppedError
from lape_ray.training.metrics import duration
from lape_ray.training.preflight import check_before_start


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a finished search leaves behind."""

    plan: Plan
    cells: tuple[Cell, ...]
    """The best first."""
    folder: str
    """Address of the search's folder, which `tune.Tuner.restore` takes with `LapeTrial`."""
    page: str
    """Address of the HTML report; tables and figures lie beside it."""
    best_command: str
    cost: str
    mlflow_run_id: str
    tracking_uri: str

    @property
    def trials(self) -> list[Trial]:
        """By number."""
        return sorted((trial for cell in self.cells for trial in cell.trials), key=lambda trial: trial.number)

    def analysis(self) -> tune.ExperimentAnalysis:
        """Open the search as Ray Tune's analysis of it, see `trials.analysis`."""
        return analysis(self.folder, self.plan.metric, "max" if self.plan.sign > 0 else "min")

    def summary(self) -> str:
        return "\n".join(
            (
                "",
                plain(self.plan, self.cells),
                "",
                *in_words(self.plan, self.cells),
                "",
                f"train the best: {self.best_command}",
                self.cost,
                f"report: {self.page}",
                f"MLflow run {self.mlflow_run_id}: {tracking.run_page(self.tracking_uri, self.mlflow_run_id)}",
            )
        )


def search(
    plan: Plan,
    *,
    concurrent: int | None = None,
    gpus_per_worker: float | None = None,
    display: Display | None = None,
) -> SearchResult:
    """Carry out `plan`, or continue it, and write its report.

    Args:
        concurrent: trials at once; None: as many as the cluster has room for.
        gpus_per_worker: share of a GPU that a worker takes; None: a whole one, where the cluster has any.

    Raises:
        ValueError, OSError: bad input, before any worker starts; says how to mend it.
        StoppedError: SIGTERM or Ctrl-C ended it; the same call continues it.
        ResourcesGoneError: the cluster cannot hold its trials any more; the same call continues it.
    """
    plan, folder, uri, inputs = _checked(plan)
    display = display or Display(plan)
    command = typed_command()
    runs = Runs(plan, uri, command=command, program=sys.argv[0])
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(storage.leased(folder, f"search {plan.name}"))
        earlier = _earlier(plan, folder, inputs)
        if plan.base.run.overwrite:
            storage.empty_folder(folder, but=storage.LEASE_FILES)
        trials = read_trials(folder) if earlier and whole_snapshot(folder, display.line) else []
        session = None
        if not is_over(plan, trials):
            stack.enter_context(connected(show_logs=not display.draws))
            session = Session(plan, _settings(plan, folder, lease.token, uri, gpus_per_worker), concurrent)
        record = stack.enter_context(_recorded(earlier, inputs, folder, runs, trials, display))
        if session is not None:
            trials = _train(session, display, runs, lease, record, resumed=earlier is not None)
            lease.check()
        return _conclude(plan, trials, record, runs, folder, command)


def _checked(plan: Plan) -> tuple[Plan, str, str, Mapping[str, str]]:
    """Check all that can be checked before anything waits.

    Returns also the search's folder, MLflow's address, and what is in the files that its trials read.
    """
    base, root = prepared(plan.base)
    plan = replace(plan, base=base)
    check_plan(plan)
    uri = tracking.tracking_uri(plan.base)
    folder = storage.join(root, plan.name)
    check_before_start(plan.base, storage_root=root)
    tracking.check_reachable(uri)
    tracking.check_trackers(base.tracking)
    _check_networks(plan)
    inputs = input_digests(base)
    _earlier(plan, folder, inputs)
    return plan, folder, uri, inputs


def _settings(plan: Plan, folder: str, lease: str, uri: str, gpus_per_worker: float | None) -> Settings:
    run = plan.base.run
    need = resources.worker_need(run, use_gpu=uses_gpu(plan.base), gpus_per_worker=gpus_per_worker)
    return Settings(
        base=plan.base, name=plan.name, folder=folder, lease=lease, tracking_uri=uri, metric=plan.metric,
        sign=plan.sign, need=need, workers=run.workers.low, variables=variables(),
    )  # fmt: skip


@contextlib.contextmanager
def _recorded(
    earlier: dict[str, Any] | None,
    inputs: Mapping[str, str],
    folder: str,
    runs: Runs,
    trials: list[Trial],
    display: Display,
) -> Iterator[dict[str, Any]]:
    """Open the search's own record and MLflow run, and close them with the status that is true."""
    plan = runs.plan
    record = earlier or {"definition": plan.definition(), "mlflow_run_id": "", "sessions": []}
    record["inputs"] = dict(inputs)
    record["mlflow_run_id"] = runs.open_parent(record["mlflow_run_id"])
    write_search(folder, record)
    if earlier is not None:
        over = f"{sum(trial.over for trial in trials)} of {plan.trials} trials are over"
        display.line(f"search {plan.name} exists: continuing it, {over}")
    display.line(f"search {plan.name}  storage {folder}")
    display.line(f"MLflow run {runs.parent}: {tracking.ui_command(runs.uri)}")
    status: tracking.Status | None = "KILLED"
    try:
        yield record
        status = "FINISHED"
    except StoppedError:
        raise
    except storage.LeaseLostError:
        status = None
        raise
    except Exception:
        status = "FAILED"
        raise
    finally:
        runs.close(status)


def _train(
    session: Session,
    display: Display,
    runs: Runs,
    lease: storage.Lease,
    record: dict[str, Any],
    *,
    resumed: bool,
) -> list[Trial]:
    """Train until every trial is over; returns them by number."""
    plan, settings, started = session.plan, session.settings, time.time()
    need, workers = settings.need, settings.workers
    room = resources.wait_for_room(
        need, workers, asked=session.concurrent, wait_s=plan.base.run.wait_s, tell=display.line
    )
    refuse_local_store(runs.uri)
    at_once = min(session.concurrent or room, plan.trials)
    each = f"{workers} worker" + ("s" if workers > 1 else "")
    takes = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
    display.line(f"{plan.trials} trials, {at_once} at a time; each {each} with {takes}")
    with opened(session, display, runs):
        lease.call_when_lost(lambda: session.supervisor.stop.remote())
        try:
            run_tuner(session)
        except BaseException:
            lease.check()  # where it is lost another driver continues the search, and says what becomes of it
            runs.settle_unfinished(session.trials)
            raise
    runs.send_unsent(settings.folder, session.trials)
    one = {"wall_s": time.time() - started, "concurrent": at_once, "resumed": resumed}
    record["sessions"].append(one)
    write_search(settings.folder, record)
    return session.trials


def _check_networks(plan: Plan) -> None:
    """Build every network of a finite space, without memory; a ValueError names the cell that cannot be."""
    points = plan.space.points() if plan.space.finite else [dict(cell) for cell in plan.space.cells]
    models = {check_point(plan.base, point).model: point for point in points}
    for model, point in models.items():
        try:
            with torch.device("meta"):
                build_model(model)
        except ValueError as error:
            raise ValueError(f"the cell {point} cannot be built: {error}") from None


def _earlier(plan: Plan, folder: str, inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """Read the record of the search that `plan` continues; None where a new one begins.

    Raises:
        ValueError: the search of this name has another definition or other files as inputs, or its folder holds
            something else.
    """
    earlier = read_search(folder)
    if earlier is None or plan.base.run.overwrite:
        return None
    changed = plan_differences(earlier["definition"], plan.definition())
    if changed := changed + changed_inputs(earlier.get("inputs", {}), inputs):
        raise ValueError(
            f"search {plan.name!r} exists with another definition ({'; '.join(changed)}); "
            "choose another --run.name, or --run.overwrite true to delete it"
        )
    return earlier


def _conclude(
    plan: Plan, trials: Sequence[Trial], record: Mapping[str, Any], runs: Runs, folder: str, command: str
) -> SearchResult:
    """Write the report, and put it into MLflow."""
    found = cells(plan, trials)
    best_command, cost = _best_command(plan, found), _cost(trials, record["sessions"])
    report = storage.join(folder, "report")
    with storage.staging(report) as written:
        write_report(plan, found, written, command=command, best_command=best_command, cost=cost)
        values = {}
        if (estimate := found[0].estimate) is not None:
            values = {f"best/{plan.metric.partition('/')[2]}": estimate.mean}
        runs.log_results(written, values, {"best": found[0].label, "best_command": best_command})
        storage.publish(written, report)
    return SearchResult(
        plan=plan,
        cells=tuple(found),
        folder=folder,
        page=storage.join(report, HTML),
        best_command=best_command,
        cost=cost,
        mlflow_run_id=runs.parent,
        tracking_uri=runs.uri,
    )


def _best_command(plan: Plan, found: Sequence[Cell]) -> str:
    """Write the command that trains the best cell, as a separate run."""
    best = found[0].trials[0]
    if best.last(plan.metric) is None:
        return "no trial came so far as to be evaluated; see the errors of the trials"
    config = replace_fields(plan.base, {**best.values, "training.seed": plan.seeds[0]})
    return command_line(replace(config, run=replace(config.run, name=None, overwrite=False)))


def _cost(trials: Sequence[Trial], sessions: Sequence[Mapping[str, Any]]) -> str:
    """Say what the search took, beside the sum of its trials' training."""
    trained = sum(trial.seconds for trial in trials)
    text = f"{len(trials)} trials trained for {duration(trained)} in sum"
    if not trained:
        return text
    if len(sessions) != 1 or sessions[0]["resumed"]:
        return f"{text}, in several sessions"  # what an interrupted one took was not recorded
    one = sessions[0]
    ideal = trained / one["concurrent"]
    return (
        f"{text}, {one['concurrent']} at a time, in {duration(one['wall_s'])} from the start of the first process "
        f"to the end of the last: {one['wall_s'] / ideal:.2f} times {duration(ideal)}"
    )
