"""search(): a plan, carried out over a cluster, to its report. The same call continues what was interrupted."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lape_ray import storage, tracking
from lape_ray.cluster.connection import connected
from lape_ray.cluster.launch import prepared, uses_gpu
from lape_ray.config import replace_fields
from lape_ray.model import build_model
from lape_ray.search import lanes as worker_groups
from lape_ray.search.cells import check_point
from lape_ray.search.conductor import Conductor
from lape_ray.search.engine import Engine
from lape_ray.search.ledger import Ledger, Trial
from lape_ray.search.live import Display
from lape_ray.search.page import HTML, write_report
from lape_ray.search.plan import Plan, check_plan, plan_differences
from lape_ray.search.runs import Runs
from lape_ray.search.statistics import Cell, cells, in_words
from lape_ray.search.tables import command_line, plain
from lape_ray.training.metrics import duration
from lape_ray.training.preflight import check_before_start


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a finished search leaves behind."""

    plan: Plan
    cells: tuple[Cell, ...]
    """The best first."""
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
        RuntimeError: no worker group could be kept up.
    """
    base, root = prepared(plan.base)
    plan = replace(plan, base=base)
    check_plan(plan)
    uri = tracking.tracking_uri(plan.base)
    ledger = Ledger(storage.join(root, plan.name))
    check_before_start(plan.base, storage_root=root)
    tracking.check_reachable(uri)
    tracking.check_trackers(base.tracking)
    _check_networks(plan)
    _earlier(plan, ledger)  # a name that cannot be used is refused before anything waits
    display = display or Display(plan)
    command = shlex.join(["python", *sys.argv])
    runs = Runs(plan, uri, command=command, program=sys.argv[0])
    with contextlib.ExitStack() as stack:
        ledger.lease = stack.enter_context(storage.leased(ledger.folder, f"search {plan.name}"))
        earlier = _earlier(plan, ledger)
        if plan.base.run.overwrite:
            storage.empty_folder(ledger.folder, but=storage.LEASE_FILES)
        conductor = Conductor(plan, ledger, runs, display, earlier)
        group = None
        if not conductor.engine.over:
            stack.enter_context(connected(show_logs=not display.draws))
            group = worker_groups.Group.of(
                plan.base.run, use_gpu=uses_gpu(plan.base), gpus_per_worker=gpus_per_worker
            )
        stack.enter_context(conductor.recorded())
        if group is not None:
            conductor.train(group, concurrent)
        return _conclude(conductor, command)


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


def _earlier(plan: Plan, ledger: Ledger) -> dict[str, Any] | None:
    """Read the record of the search that `plan` continues; None where a new one begins.

    Raises:
        ValueError: the search of this name has another definition, or its folder holds something else.
    """
    earlier = ledger.read_search()
    if earlier is None or plan.base.run.overwrite:
        return None
    if changed := plan_differences(earlier["definition"], plan.definition()):
        raise ValueError(
            f"search {plan.name!r} exists with another definition ({'; '.join(changed)}); "
            "choose another --run.name, or --run.overwrite true to delete it"
        )
    return earlier


def _conclude(conductor: Conductor, command: str) -> SearchResult:
    """Write the report, and put it into MLflow."""
    plan, runs = conductor.plan, conductor.runs
    found = cells(plan, conductor.engine.trials)
    best_command, cost = _best_command(conductor.engine, found), _cost(conductor)
    folder = storage.join(conductor.ledger.folder, "report")
    with storage.staging(folder) as written:
        write_report(plan, found, written, command=command, best_command=best_command, cost=cost)
        values = {}
        if (estimate := found[0].estimate) is not None:
            values = {f"best/{plan.metric.partition('/')[2]}": estimate.mean}
        runs.log_results(written, values, {"best": found[0].label, "best_command": best_command})
        storage.publish(written, folder)
    return SearchResult(
        plan=plan,
        cells=tuple(found),
        page=storage.join(folder, HTML),
        best_command=best_command,
        cost=cost,
        mlflow_run_id=runs.parent,
        tracking_uri=runs.uri,
    )


def _best_command(engine: Engine, found: Sequence[Cell]) -> str:
    """Write the command that trains the best cell, as a separate run."""
    best = found[0].trials[0]
    if best.last(engine.plan.metric) is None:
        return "no trial came so far as to be evaluated; see the errors of the trials"
    config = replace(engine.config(best), run=replace(engine.plan.base.run, name=None, overwrite=False))
    return command_line(replace_fields(config, {"training.seed": engine.plan.seeds[0]}))


def _cost(conductor: Conductor) -> str:
    """Say what the search took, beside the sum of its trials' training."""
    trials, sessions = conductor.engine.trials, conductor.record["sessions"]
    trained = sum(trial.seconds for trial in trials)
    text = f"{len(trials)} trials trained for {duration(trained)} in sum"
    if not trained:
        return text
    if len(sessions) != 1 or sessions[0]["trained_s"] < trained - 1:
        return f"{text}, in several sessions"  # what an interrupted one took was not recorded
    one = sessions[0]
    ideal = one["trained_s"] / one["concurrent"]
    return (
        f"{text}, {one['concurrent']} at a time, in {duration(one['wall_s'])} from the start of the first process "
        f"to the end of the last: {one['wall_s'] / ideal:.2f} times {duration(ideal)}"
    )
