"""search(): a plan, carried out over a cluster, to its report. The same call continues what was interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lape_ray import storage, tracking
from lape_ray.cluster.connection import connected
from lape_ray.cluster.controller import variables
from lape_ray.cluster.launch import prepared, status_of
from lape_ray.cluster.on_ray import refuse_local_store, uses_gpu
from lape_ray.cluster.resources import lack, wait_for_room
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.model import resolve
from lape_ray.recipes import command_line
from lape_ray.search.cells import check_point
from lape_ray.search.live import Display
from lape_ray.search.plan import Plan, check_plan, plan_differences
from lape_ray.search.record import Trial, read_search, trial_folder, write_search
from lape_ray.search.report import HTML, plain, write_report
from lape_ray.search.runs import Runs
from lape_ray.search.settings import Settings, worker_need
from lape_ray.search.statistics import Cell, cells, in_words, trials_of
from lape_ray.search.trials import is_over, opened, read_trials
from lape_ray.search.tuner import run_tuner, whole_snapshot
from lape_ray.training.inputs import changed_inputs, dataset_digests, input_digests
from lape_ray.training.metrics import duration
from lape_ray.training.preflight import check_before_start, check_data, dry_network

REPORT = "report"


@dataclass(frozen=True)
class SearchResult:
    """Hold what a finished search leaves behind.

    Attributes:
        cells: the best first
        folder: address of the search's folder, which `tune.Tuner.restore` takes with `LapeTrial`
    """

    plan: Plan
    cells: tuple[Cell, ...]
    folder: str
    best_command: str
    cost: str
    mlflow_run_id: str
    tracking_uri: str

    @property
    def page(self) -> str:
        """Return the address of the HTML report; tables and figures lie beside it."""
        return storage.join(self.folder, REPORT, HTML)

    @property
    def trials(self) -> list[Trial]:
        """By number."""
        return trials_of(self.cells)

    def summary(self) -> str:
        page = tracking.run_page(self.tracking_uri, self.mlflow_run_id)
        words = "\n".join(in_words(self.plan, self.cells))
        return (
            f"\n{plain(self.cells)}\n\n{words}\n\ntrain the best: {self.best_command}\n{self.cost}\n"
            f"report: {self.page}\nMLflow run {self.mlflow_run_id}: {page}"
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
    one = _checked(plan, display)
    plan = one.plan
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(storage.leased(one.folder, f"search {plan.name}"))
        earlier = one.earlier()
        if plan.base.run.overwrite:
            storage.empty_folder(one.folder, but=storage.LEASE_FILES)
        trials = read_trials(one.folder) if earlier and whole_snapshot(one.folder, one.display.line) else []
        settings = None
        if not is_over(plan, trials):
            stack.enter_context(connected(show_logs=not one.display.draws))
            settings = one.settings(lease, gpus_per_worker)
        record = stack.enter_context(one.recorded(earlier, trials))
        if settings is not None:
            started, at_once = time.time(), one.wait_for_room(settings, concurrent)
            trials = one.train(settings, concurrent, lease)
            took = {"wall_s": time.time() - started, "concurrent": at_once, "resumed": earlier is not None}
            record["sessions"].append(took)
            write_search(one.folder, record)
            lease.check()
        return one.conclude(trials, record)


def _checked(plan: Plan, display: Display | None) -> _Search:
    """Check all that can be checked before anything waits."""
    base, root = prepared(plan.base)
    plan = replace(plan, base=base)
    check_plan(plan)
    uri = tracking.tracking_uri(base)
    check_before_start(base, storage_root=root)
    tracking.check_reachable(uri)
    tracking.check_trackers(base.tracking)
    check_points(plan)
    folder, inputs = storage.join(root, plan.name), input_digests(base)
    runs = Runs(plan, uri, dataset_digests(base, inputs))
    one = _Search(plan=plan, folder=folder, inputs=inputs, runs=runs, display=display or Display(plan))
    one.earlier()
    return one


def check_points(plan: Plan) -> None:
    """Check every network of the space, ranges at their middle: at each size of its images, and with its data.

    Networks are built without memory, and once where points share one. The base is known to fit its data.

    Raises:
        ValueError: one cannot be built, or does not fit the data; names the point.
    """
    built, fitting = set(), {_of_data(plan.base)}
    for point in plan.space.examples():
        config = check_point(plan.base, point)
        network, needs = (config.model, config.data.image_size_schedule), _of_data(config)
        try:
            if network not in built:
                dry_network(config)
            if needs not in fitting:
                check_data(config)
        except ValueError as error:
            raise ValueError(f"the cell {point} cannot be trained: {error}") from None
        built.add(network)
        fitting.add(needs)


def _of_data(config: TrainConfig) -> tuple[object, ...]:
    """Return what a config asks of its data."""
    data, spec = config.data, resolve(config.model)
    return spec.image_size, spec.num_classes, data.image_size_schedule, data.upscale, data.batch_size


@dataclass(frozen=True, kw_only=True)
class _Search:
    """A search whose input is good; `inputs` says what is in the files that its trials read."""

    plan: Plan
    folder: str
    inputs: Mapping[str, str]
    runs: Runs
    display: Display

    def earlier(self) -> dict[str, Any] | None:
        """Read the record of the search that this one continues; None where a new one begins.

        Raises:
            ValueError: the search of this name has another definition or other files as inputs, or its folder holds
                something else.
        """
        earlier = read_search(self.folder)
        if earlier is None or self.plan.base.run.overwrite:
            return None
        changed = plan_differences(earlier["definition"], self.plan.definition())
        if changed := changed + changed_inputs(earlier.get("inputs", {}), self.inputs):
            raise ValueError(
                f"search {self.plan.name!r} exists with another definition ({'; '.join(changed)}); "
                "choose another --run.name, or --run.overwrite true to delete it"
            )
        return earlier

    @contextlib.contextmanager
    def recorded(self, earlier: dict[str, Any] | None, trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
        """Open the search's own record and MLflow run, and close them with the status that is true."""
        plan, runs, line = self.plan, self.runs, self.display.line
        record = earlier or {"definition": plan.definition(), "mlflow_run_id": "", "sessions": []}
        record["inputs"] = dict(self.inputs)
        record["mlflow_run_id"] = runs.open_parent(record["mlflow_run_id"])
        write_search(self.folder, record)
        if earlier is not None:
            over = sum(trial.over for trial in trials)
            line(f"search {plan.name} exists: continuing it, {over} of {plan.trials} trials are over")
        line(f"search {plan.name}  storage {self.folder}")
        line(f"MLflow run {runs.parent}: {tracking.ui_command(runs.uri)}")
        with status_of(runs.uri, runs.parent), contextlib.closing(runs):
            yield record

    def settings(self, lease: storage.Lease, gpus_per_worker: float | None) -> Settings:
        """Say what all trials share; a ValueError says why the connected cluster cannot give it."""
        base, uri = self.plan.base, self.runs.uri
        need = worker_need(base.run, use_gpu=uses_gpu(base), gpus_per_worker=gpus_per_worker)
        return Settings(
            plan=self.plan, folder=self.folder, lease=lease.token, tracking_uri=uri, need=need, variables=variables()
        )  # fmt: skip

    def train(self, settings: Settings, concurrent: int | None, lease: storage.Lease) -> list[Trial]:
        """Train until every trial is over; returns them by number."""
        runs = self.runs
        with opened(settings, concurrent, self.display, runs) as session:
            lease.call_when_lost(lambda: session.supervisor.stop.remote())
            try:
                run_tuner(session)
            except BaseException:
                lease.check()  # where it is lost another driver continues the search, and says what becomes of it
                for trial in session.trials:
                    if not trial.over:
                        runs.settle(trial)
                raise
        for trial in session.trials:
            if trial.run_id:
                tracking.send_unsent(trial_folder(self.folder, trial.number), runs.uri, trial.run_id)
        return session.trials

    def wait_for_room(self, settings: Settings, concurrent: int | None) -> int:
        """Wait until one trial, or `concurrent` at once, could fit; returns how many will train at once."""
        plan, need, line = self.plan, settings.need, self.display.line
        workers, wait_s = plan.workers, plan.base.run.wait_s
        room = wait_for_room("a trial", need, workers, groups=concurrent or 1, wait_s=wait_s, tell=line)
        if concurrent and room < concurrent:
            raise ValueError(
                f"--concurrent {concurrent} is more than fits: a trial needs {lack(need, workers)}, which is room "
                f"for {room}; lower it, or leave it out"
            )
        refuse_local_store(self.runs.uri)
        at_once = min(concurrent or room, plan.trials)
        each = f"{workers} worker" + ("s" if workers > 1 else "")
        takes = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
        line(f"{plan.trials} trials, {at_once} at a time; each {each} with {takes}")
        return at_once

    def conclude(self, trials: Sequence[Trial], record: Mapping[str, Any]) -> SearchResult:
        """Write the report, and put it into MLflow."""
        plan, runs, found = self.plan, self.runs, cells(self.plan, trials)
        best_command, cost = _best_command(plan, found[0]), _cost(trials, record["sessions"])
        report, best = storage.join(self.folder, REPORT), found[0].estimate
        values = {} if best is None else {f"best/{plan.metric.partition('/')[2]}": best.mean}
        with storage.staging(report) as written:
            write_report(plan, found, written, command=runs.command, best_command=best_command, cost=cost)
            runs.log_results(written, values, {"best": found[0].label, "best_command": best_command})
            storage.publish(written, report)
        return SearchResult(plan, tuple(found), self.folder, best_command, cost, runs.parent, runs.uri)


def _best_command(plan: Plan, cell: Cell) -> str:
    """Write the command that trains the best cell, as a separate run."""
    best = cell.trials[0]
    if best.last(plan.metric) is None:
        return "no trial came so far as to be evaluated; see the errors of the trials"
    values = {**best.values, "training.seed": plan.seeds[0], "run.overwrite": False}
    return command_line(replace_fields(plan.base, values))


def _cost(trials: Sequence[Trial], sessions: Sequence[Mapping[str, Any]]) -> str:
    """Say what the search took, beside the sum of its trials' training."""
    trained = sum(trial.seconds for trial in trials)
    text = f"{len(trials)} trials trained for {duration(trained)} in sum"
    if not trained:
        return text
    if len(sessions) != 1 or sessions[0]["resumed"]:
        return f"{text}, in several sessions"  # what an interrupted one took was not recorded
    wall_s, at_once = sessions[0]["wall_s"], sessions[0]["concurrent"]
    ideal = trained / at_once
    return (
        f"{text}, {at_once} at a time, in {duration(wall_s)} from the start of the first process to the end of the "
        f"last: {wall_s / ideal:.2f} times {duration(ideal)}"
    )
