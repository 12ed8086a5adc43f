"""One session of a search: between engine, worker groups, MLflow and the display."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from lape_ray import tracking
from lape_ray.cluster.launch import refuse_local_store
from lape_ray.config import to_dict
from lape_ray.search import lanes as worker_groups
from lape_ray.search.engine import Engine, Job
from lape_ray.search.ledger import Ledger, Trial
from lape_ray.search.live import Display
from lape_ray.search.plan import Plan
from lape_ray.search.runs import Runs

POLL_S = 1.0
DIED = "its workers died: killed, out of memory, or their node went away"


class Conductor:
    """Hands out trials and hears what becomes of them, until every trial is over."""

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
        """Open the search's own record and MLflow run, and close them with the status that is true."""
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
        refuse_local_store(self.runs.uri)
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
