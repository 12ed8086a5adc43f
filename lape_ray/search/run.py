"""search(): a plan, carried out over a cluster, to its report. The same call continues what was interrupted."""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lape_ray import storage, tracking
from lape_ray.cluster import connected
from lape_ray.config import to_dict
from lape_ray.launch import prepared, uses_gpu
from lape_ray.metrics import duration
from lape_ray.model import build_model
from lape_ray.preflight import check_before_start
from lape_ray.search import lanes as worker_groups
from lape_ray.search.cells import check_point
from lape_ray.search.engine import Engine, Job
from lape_ray.search.ledger import Ledger, Trial
from lape_ray.search.live import Display
from lape_ray.search.page import HTML, write_report
from lape_ray.search.plan import Plan, check_plan, plan_differences
from lape_ray.search.runs import Runs
from lape_ray.search.statistics import Cell, cells, in_words
from lape_ray.search.tables import command_line, plain

POLL_S = 1.0
DIED = "its workers died: killed, out of memory, or their node went away"


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
    check_before_start(plan.base, storage_root=root, tracking_uri=uri)
    _check_networks(plan)
    if plan.base.run.overwrite:
        storage.delete_folder(ledger.folder)
    earlier = _earlier(plan, ledger)
    display = display or Display(plan)
    command = shlex.join(["python", *sys.argv])
    runs = Runs(plan, uri, command=command, program=sys.argv[0])
    conductor = _Conductor(plan, ledger, runs, display, earlier)
    with contextlib.ExitStack() as stack:
        group = None
        if not conductor.engine.over:
            stack.enter_context(connected(show_logs=not display.draws))
            group = worker_groups.Group.of(
                plan.base.run, use_gpu=uses_gpu(plan.base), gpus_per_worker=gpus_per_worker
            )
        stack.enter_context(conductor.recorded())
        if group is not None:
            conductor.train(group, concurrent)
        return conductor.conclude(command)


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
    """The record of a search of this name; refuses one with another definition."""
    earlier = ledger.read_search()
    if earlier is None:
        return None
    if changed := plan_differences(earlier["definition"], plan.definition()):
        raise ValueError(
            f"search {plan.name!r} exists with another definition ({'; '.join(changed)}); "
            "choose another --run.name, or --run.overwrite true to delete it"
        )
    return earlier


class _Conductor:
    """One session of a search: between engine, worker groups, MLflow and the display."""

    def __init__(
        self, plan: Plan, ledger: Ledger, runs: Runs, display: Display, earlier: dict[str, Any] | None
    ) -> None:
        self.plan, self.ledger, self.runs, self.display = plan, ledger, runs, display
        self.engine = Engine(plan, ledger)
        self.record = earlier or {"definition": plan.definition(), "mlflow_run_id": "", "sessions": []}
        self._training: dict[int, int] = {}  # worker group -> trial
        self._idle: dict[int, int] = {}  # worker group that waits for work -> its ticket
        self._error = ""

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """The search's own record and MLflow run, closed with the status that is true."""
        self.record["mlflow_run_id"] = self.runs.open_parent(self.record["mlflow_run_id"])
        self.ledger.write_search(self.record)
        known = len(self.engine.trials)
        if known:
            over = sum(trial.over for trial in self.engine.trials)
            here = f"{over} of {self.plan.trials} trials are over"
            self.display.line(f"search {self.plan.name} exists: continuing it, {here}")
        self.display.line(f"search {self.plan.name}  storage {self.ledger.folder}")
        self.display.line(f"MLflow run {self.runs.parent}: {tracking.ui_command(self.runs.uri)}")
        status: tracking.Status = "KILLED"
        try:
            yield
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self.runs.close(self.engine.trials, status)

    # --- training ---------------------------------------------------------------------------------------------

    def train(self, group: worker_groups.Group, concurrent: int | None) -> None:
        """Train until every trial is over."""
        started = time.time()
        room = worker_groups.concurrency(group, asked=concurrent, wait_s=self.plan.base.run.wait_s)
        if (nodes := worker_groups.node_count()) > 1 and tracking.is_local(self.runs.uri):
            raise ValueError(
                f"the MLflow store {self.runs.uri!r} is a file on this machine, but the cluster has {nodes} nodes: "
                "start an MLflow server and set MLFLOW_TRACKING_URI"
            )
        count = min(room, self.engine.most_at_once)
        workers = f"{group.workers} worker" + ("s" if group.workers > 1 else "")
        need = " and ".join(f"{amount:g} {kind}" for kind, amount in group.need.items())
        self.display.line(f"{self.plan.trials} trials, {count} at a time; each {workers} with {need}")
        before = sum(trial.seconds for trial in self.engine.trials)
        with worker_groups.opened(self.plan.base.run, group, folder=self.ledger.folder) as lanes:
            lanes.start(count)
            while lanes.alive:
                for ticket, lane, message in lanes.questions(POLL_S):
                    self._hear(lanes, ticket, lane, message)
                self._hand_out(lanes)
                for lane, reason in lanes.ended():
                    self._lane_ended(lane, reason)
                self.display.draw(self.engine.trials, self._training)
        if not self.engine.over:
            raise RuntimeError(
                f"no worker group could be kept up: {self._error}; the same command continues the search"
            )
        trained = sum(trial.seconds for trial in self.engine.trials) - before
        self.record["sessions"].append(
            {"wall_s": time.time() - started, "trained_s": trained, "concurrent": count}
        )
        self.ledger.write_search(self.record)

    def _hear(self, lanes: worker_groups.Lanes, ticket: int, lane: int, message: dict[str, Any]) -> None:
        kind, answer = message["kind"], "noted"
        if kind == "ready":
            if lane in self._training:  # it was training, and did not say that it left: it has started anew
                self._crashed(lane, DIED)
            self._idle[lane] = ticket
            return
        trial = self.engine.trials[message["trial"]]
        if kind == "epoch":
            decision = self.engine.report(
                trial.number, message["epoch"], message["metrics"],
                seconds=message["seconds"], checkpoint=message["checkpoint"],
            )  # fmt: skip
            self.display.reported(trial, self.engine.trials, decision, lanes=len(self._training))
            answer = decision
        elif kind == "loaded":
            self.engine.loaded(trial.number, message["what"])
        elif (
            self._training.get(lane) == trial.number
        ):  # of several workers that report the end, the first counts
            if kind == "left":
                self._left(lane)
            elif kind == "failed":
                self.engine.failed(trial.number, message["error"])
                self._left(lane)
            else:
                self._crashed(lane, message["error"])
        lanes.answer(ticket, answer)

    def _left(self, lane: int) -> None:
        trial = self.engine.trials[self._training.pop(lane)]
        self.engine.left(trial.number)
        self.runs.settle(trial)
        self.display.ended(trial, self.engine.trials)

    def _crashed(self, lane: int, reason: str) -> None:
        number = self._training[lane]
        trial = self.engine.trials[number]
        if self.engine.crashed(number, reason):
            first = reason.splitlines()[0]
            self.display.line(
                f"trial {trial.id} goes on from its newest checkpoint, as it was interrupted: {first}"
            )
            del self._training[lane]
        else:
            self._left(lane)

    def _hand_out(self, lanes: worker_groups.Lanes) -> None:
        """Give work to the groups that wait for it; let those go for which there can be none any more."""
        for lane, ticket in list(self._idle.items()):
            job = self.engine.next_job()
            if isinstance(job, Job):
                del self._idle[lane]
                self._training[lane] = job.trial.number
                lanes.answer(ticket, self._order(job), to_all=True)
            elif job == "over" or self.engine.most_at_once < len(self._idle) + len(self._training):
                del self._idle[lane]
                lanes.answer(ticket, {"kind": "end"}, to_all=True)

    def _lane_ended(self, lane: int, reason: str) -> None:
        self._idle.pop(lane, None)
        if lane in self._training:
            self._crashed(lane, DIED)
        if reason:
            self._error = reason.splitlines()[-1]
            self.display.line(f"a worker group could not be kept up: {self._error}")

    def _order(self, job: Job) -> dict[str, Any]:
        trial = job.trial
        run_id = self.runs.open_child(trial, job.config)
        if run_id != trial.run_id:
            trial.run_id = run_id
            self.ledger.save(trial)
        clone = None
        if job.clone is not None:
            folder = self.ledger.trial_folder(job.clone.source)
            clone = {"epoch": job.clone.epoch, "source": job.clone.source, "folder": folder}
        return {
            "kind": "train",
            "trial": trial.number,
            "config": to_dict(job.config),
            "folder": self.ledger.trial_folder(trial.number),
            "reported": trial.done,
            "clone": clone,
            "best": self._best_checkpoint(trial),
            "metric": self.plan.metric,
            "sign": self.plan.sign,
            "tracking_uri": self.runs.uri,
            "run_id": run_id,
        }

    def _best_checkpoint(self, trial: Trial) -> tuple[float, str] | None:
        """Score and name of the best checkpoint that earlier parts of the trial have left."""
        best = trial.best(self.plan.metric, self.plan.sign)
        return (
            None
            if best is None
            else (self.plan.sign * best, trial.checkpoint.partition("?")[0].rpartition("/")[2])
        )

    # --- results ----------------------------------------------------------------------------------------------

    def conclude(self, command: str) -> SearchResult:
        """Write the report, and put it into MLflow."""
        plan = self.plan
        found = cells(plan, self.engine.trials)
        best = replace(
            self.engine.config(found[0].trials[0]),
            run=replace(plan.base.run, seed=plan.seeds[0], name=None, overwrite=False),
        )
        best_command, cost = command_line(best), self._cost()
        folder = storage.join(self.ledger.folder, "report")
        with tempfile.TemporaryDirectory(prefix="lape-search-") as temporary:
            write_report(plan, found, Path(temporary), command=command, best_command=best_command, cost=cost)
            storage.delete_folder(folder)
            storage.upload_folder(Path(temporary), folder)
            values = {}
            if (estimate := found[0].estimate) is not None:
                values = {f"best/{plan.metric.partition('/')[2]}": estimate.mean}
            self.runs.log_results(
                Path(temporary), values, {"best": found[0].label, "best_command": best_command}
            )
        return SearchResult(
            plan=plan,
            cells=tuple(found),
            page=storage.join(folder, HTML),
            best_command=best_command,
            cost=cost,
            mlflow_run_id=self.runs.parent,
            tracking_uri=self.runs.uri,
        )

    def _cost(self) -> str:
        """What the search took, beside the sum of its trials' training."""
        trained = sum(trial.seconds for trial in self.engine.trials)
        text = f"{len(self.engine.trials)} trials trained for {duration(trained)} in sum"
        sessions = self.record["sessions"]
        if len(sessions) != 1 or sessions[0]["trained_s"] < trained - 1:
            return f"{text}, in several sessions"  # what an interrupted one took was not recorded
        one = sessions[0]
        ideal = one["trained_s"] / one["concurrent"]
        return (
            f"{text}, {one['concurrent']} at a time, in {duration(one['wall_s'])} from the start of the first process "
            f"to the end of the last: {one['wall_s'] / ideal:.2f} times {duration(ideal)}"
        )
