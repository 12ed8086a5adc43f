"""Ray Tune's controller as a search sees it, without Ray: trials, lanes, snapshots, and a restore from any of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial as TuneTrial

from lape_ray.search.live import Display
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial
from lape_ray.search.scheduler import Points, Rule
from lape_ray.search.settings import Settings
from lape_ray.search.trials import Session

Entry = tuple[dict[str, Any], list[list[int]]]
"""An epoch as a trial reports it, and the trial's lineage as it was trained."""


class KilledError(Exception):
    """The driver was killed."""


def session_of(plan: Plan, concurrent: int | None = None) -> Session:
    settings = Settings(
        plan=plan, folder="simulated", lease="", tracking_uri="", need={"CPU": 1}, variables={}
    )
    runs: Any = SimpleNamespace(open_child=lambda trial, config: f"run-{trial.number}")
    return Session(settings, concurrent, Display(plan), runs, supervisor=None)


@dataclass
class Simulation:
    """A search on as many lanes, one epoch at a time in a random order.

    Args:
        accuracy: of a trial after an epoch.
        fails: the error of a trial, or nothing.
        stored: what trials have stored, by their numbers; it outlives every kill.
        every: reports between two snapshots.

    Attributes:
        trained: epochs that were trained and not only reported again.
        decisions: of the last run, (trial, epoch) -> what became of the trial there.
    """

    plan: Plan
    accuracy: Callable[[Trial, int], float]
    lanes: int = 1
    order: int = 0
    fails: Callable[[Trial], str] = lambda trial: ""
    stored: dict[int, list[Entry]] = field(default_factory=dict)
    every: int = 4
    trained: int = 0
    snapshot: list[Any] = field(default_factory=list)
    decisions: dict[tuple[int, int], str] = field(default_factory=dict)

    def run(self, *, kill_after: int | None = None) -> list[Trial]:
        """Run to the end, or raise a KilledError after so many reports; from the last snapshot, if there is one."""
        self._draw, self._reports, self._clock = random.Random(self.order), 0, 0
        self.decisions = {}
        self.session = session_of(self.plan, self.lanes if self.plan.sample == "tpe" else None)
        self.rule, self.points = Rule(self.session), Points(self.session)
        self._tune_controller = self
        self._actor_cache = SimpleNamespace(increase_max=lambda resources, by: None)
        self._trials: list[TuneTrial] = []
        self._at: dict[int, int] = {}
        for state in sorted(self.snapshot, key=lambda state: -state[2]):
            self._restore(*state)
        self.session.refresh(self._trials)
        while not self.points.is_finished():
            self._step(kill_after)
            self.session.refresh(self._trials)
        return self.session.trials

    # --- what the rule calls -----------------------------------------------------------------------------------

    def get_trials(self) -> list[TuneTrial]:
        return self._trials

    def pause_trial(self, trial: TuneTrial, should_checkpoint: bool) -> None:
        trial.set_status(TuneTrial.PAUSED)

    def stop_trial(self, trial: TuneTrial) -> None:
        trial.set_status(TuneTrial.TERMINATED)

    def checkpoint(self, force: bool = False) -> None:
        """Take the snapshot from which a later run begins: what survives a trip through JSON."""
        self.snapshot = [
            (*trial.get_json_state(), trial.run_metadata.last_result_time) for trial in self._trials
        ]

    # --- what Tune does ----------------------------------------------------------------------------------------

    def _restore(self, state: str, metadata: str, time: float) -> None:
        trial = TuneTrial.from_json_state(state, stub=True)
        trial.restore_run_metadata(metadata)
        if not trial.is_finished():
            trial.set_status(TuneTrial.PENDING)
        self._add(trial)

    def _add(self, trial: TuneTrial) -> None:
        self.rule.on_trial_add(self, trial)
        self._trials.append(trial)

    def _running(self) -> list[TuneTrial]:
        return [trial for trial in self._trials if trial.status == TuneTrial.RUNNING]

    def _start(self, trial: TuneTrial) -> None:
        trial.set_status(TuneTrial.RUNNING)
        self._at[trial.config["number"]] = trial.config["done"]

    def _step(self, kill_after: int | None) -> None:
        waiting = [trial for trial in self._trials if trial.status == TuneTrial.PENDING]
        if not waiting and (config := self.session.next_trial()) is not None:
            self._add(TuneTrial("LapeTrial", config=config, stub=True))
        chosen = self.rule.choose_trial_to_run(self)
        for trial in [chosen, *self._trials]:
            if trial is None or len(self._running()) >= self.lanes:
                continue
            if trial is chosen or trial.status == TuneTrial.PENDING:
                self._start(trial)
        if running := sorted(self._running(), key=lambda trial: trial.config["number"]):
            self._report(self._draw.choice(running))
            self._reports += 1
            if self._reports == kill_after:
                raise KilledError
            if self._reports % self.every == 0:
                self.checkpoint()

    def _report(self, trial: TuneTrial) -> None:
        result = self._next_result(trial)
        decision = Rule.STOP if result["done"] else self.rule.on_trial_result(self, trial, result)
        self.decisions[trial.config["number"], result["epoch"]] = decision
        self._clock += 1
        trial.run_metadata.last_result, trial.run_metadata.last_result_time = result, float(self._clock)
        if decision == Rule.STOP:
            self.stop_trial(trial)
        trial.invalidate_json_state()
        trial.run_metadata.invalidate_cache()

    def _next_result(self, trial: TuneTrial) -> dict[str, Any]:
        """What `LapeTrial.step` returns: an epoch that is stored already, or one that is trained now."""
        number, record = trial.config["number"], self.session.update(trial)
        lineage = [[clone["epoch"], clone["source"]] for clone in trial.config["lineage"]]
        known = [
            entry for entry, of in self.stored.get(number, [])
            if of == [clone for clone in lineage if clone[0] < entry["epoch"]]
        ]  # fmt: skip
        at = self._at[number]
        if error := self.fails(record):
            return {"epoch": at, "curve": known[:at], "failed": error, "done": True}
        self._at[number] = epoch = at + 1
        if epoch > len(known):
            self.trained += 1
            metrics = {self.plan.metric: self.accuracy(record, epoch)}
            known.append({"epoch": epoch, "metrics": metrics, "seconds": 1.0})
            before = self.stored.get(number, [])[: epoch - 1]
            self.stored[number] = [*before, (known[-1], lineage)]
        complete = epoch == self.plan.epochs
        curve = known[:epoch]
        return {
            "epoch": epoch,
            "curve": curve,
            "checkpoint": f"at-{epoch}",
            "complete": complete,
            "done": complete,
        }
