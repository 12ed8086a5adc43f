"""What a search does beside training: Ray Tune's callbacks that tell MLflow and people, and that end it early."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from lape_ray.cluster.resources import lack, room
from lape_ray.cluster.supervisor import StopRequest
from lape_ray.search.session import Session
from lape_ray.search.trials import error_of
from lape_ray.training.loop import StoppedError

PATIENCE_S = 120.0  # for a step and a checkpoint of every trial that trains, once the search is asked to end
LOOK_S = 1.0


class ResourcesGoneError(RuntimeError):
    """The cluster can hold no trial of the search any more."""

    exit_code = 1


class Show(tune.Callback):
    """Show the search to people, and keep its trials' runs in MLflow true."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_trial_start(self, *, trial: TuneTrial, **info: Any) -> None:
        """Reopen the run of a trial that an earlier driver closed."""
        self.session.runs.reopen(self.session.update(trial))

    def on_trial_result(self, *, trial: TuneTrial, result: dict[str, Any], **info: Any) -> None:
        """Show an epoch that was trained."""
        session = self.session
        record = session.update(trial, result)
        if result.get("failed") or result.get("interrupted"):
            return
        stopped = result["done"] and not result["complete"]
        decision = "stop" if stopped else "pause" if trial.status == TuneTrial.PAUSED else "go"
        session.display.reported(record, session.trials, decision)

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
        """Draw the table anew."""
        self.session.refresh(trials)
        self.session.display.draw(self.session.trials)


class Watch(tune.Callback):
    """End the search, so that it can be continued, where it is asked to or where it has no machines left."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._interrupted: set[str] = set()
        self._stop: StopRequest | None = None
        self._asked = self._idle = self._looked = 0.0

    def on_trial_result(self, *, trial: TuneTrial, result: dict[str, Any], **info: Any) -> None:
        """Note a trial whose workers have left a checkpoint because the search is to end."""
        if result.get("interrupted"):
            self._interrupted.add(trial.trial_id)

    def on_step_end(self, *, trials: list[TuneTrial], **info: Any) -> None:
        """Look whether the search can go on.

        Raises:
            StoppedError: it was asked to end, and every trial that trained has left a checkpoint.
            ResourcesGoneError: for `run.wait_s` the cluster has had no room for a trial.
        """
        now = time.monotonic()
        running = {trial.trial_id for trial in trials if trial.status == TuneTrial.RUNNING}
        if self._stop is None:
            self._stop = StopRequest(self.session.supervisor)
        if self._stop:
            self._asked = self._asked or now
            if running <= self._interrupted or now > self._asked + PATIENCE_S:
                raise StoppedError("the search was stopped, and every trial left a checkpoint")
        if running or now < self._looked + LOOK_S:
            self._idle = 0.0 if running else self._idle
            return
        self._looked = now
        self._wait_for_nodes(now)

    def _wait_for_nodes(self, now: float) -> None:
        plan, need = self.session.plan, self.session.settings.need
        wait_s = plan.base.run.wait_s
        if room(need, plan.workers):
            self._idle = 0.0
            return
        words = lack(need, plan.workers)
        if not self._idle:
            self._idle = now
            self.session.display.line(f"waiting up to {wait_s:g} s for nodes: a trial needs {words}")
        if now > self._idle + wait_s:
            raise ResourcesGoneError(
                f"a trial needs {words}, and has had no more for {wait_s:g} s (run.wait_s): the same command "
                "continues the search"
            )
