"""Ray Tune's scheduler and searcher of a search: the rules and the samplers of `strategies`, behind Tune's interfaces.

Tune's own schedulers keep their state in themselves, and Tune keeps it in no snapshot: after a restore ASHA decides
otherwise, and HyperBand waits for ever. A rule is a function of what the trials have reported: no state to lose.
The private names of Ray, `_tune_controller` and what it has, have tests that fail where Ray changes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher, SearchGenerator

from lape_ray.search.trials import Session, is_over


class Rule(FIFOScheduler):
    """Decide by the plan's rule, on Tune's behalf."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self._decided = False
        self._idle = 0

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Take up a trial: a new one, one of a restored search, or one that is to be tried again."""
        session, resources = self.session, self.session.settings.resources
        known = trial.config["number"] in {one.number for one in session.trials}
        record = session.update(trial)
        trial.set_config({**trial.config, "folder": session.settings.folder})
        if trial.is_finished():
            return
        if trial.placement_group_factory != resources:
            trial.update_resources(resources)
        # A restored search has forgotten which of its trials paused.
        if not known and record.epochs and session.rule.after(record, session.trials) == "pause":
            trial.set_status(TuneTrial.PAUSED)
            session.update(trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Decide what becomes of a trial that has reported an epoch other than its last."""
        session = self.session
        record = session.update(trial, result)
        if result.get("interrupted"):
            return self.NOOP
        if result["epoch"] < record.done:  # known already: its checkpoint was lost, and it is trained again
            return self.CONTINUE
        trial.set_config({**trial.config, "done": record.done})
        decision = session.rule.after(record, session.trials)
        if decision == "pause":
            tune_controller.pause_trial(trial, should_checkpoint=False)
            return self.NOOP
        self._decided = self._decided or session.rule.decides_at(record.done)
        return self.STOP if decision == "stop" else self.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Return the next trial to run: one whose pause is over, else the first that waits."""
        trials = {trial.config["number"]: trial for trial in tune_controller.get_trials()}
        if self._decided:
            self._decided = False
            # Now, so that a decision which depends on who came first is never taken again.
            tune_controller._tune_controller.checkpoint(force=True)
        ready = self._settle(tune_controller, trials)
        self._keep_idle(tune_controller)
        if ready and not (self.session.concurrent and self.session.full):
            return ready[0]
        waiting = sorted(number for number, trial in trials.items() if trial.status == TuneTrial.PENDING)
        return trials[waiting[0]] if waiting else None

    def _settle(self, controller: Any, trials: dict[int, TuneTrial]) -> list[TuneTrial]:
        """Stop the paused trials that have lost; returns those that go on, clones with their new config."""
        session = self.session
        session.refresh(trials.values())
        ready = session.rule.settle(session.trials)
        for record in session.trials:
            trial = trials[record.number]
            if record.state == "stopped" and trial.status == TuneTrial.PAUSED:
                controller.stop_trial(trial)
            if len(record.lineage) > len(trial.config["lineage"]):
                trial.set_config({**trial.config, "lineage": record.config()["lineage"]})
        return [trials[record.number] for record in ready]

    def _keep_idle(self, controller: Any) -> None:
        """Keep as many idle actors as there are trials that may still need one."""
        session = self.session
        later = session.plan.trials - len(session.trials)
        later += sum(trial.state == "paused" for trial in session.trials)
        if later != self._idle:
            # By itself Tune keeps none while all trials pause.
            cache = controller._tune_controller._actor_cache
            cache.increase_max(session.settings.resources, by=later - self._idle)
            self._idle = later


class Points(SearchGenerator):
    """Hand out the plan's trials in the order of their numbers.

    The search is over when all have ended, not when all are handed out: until then Tune keeps idle actors.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(_Suggestions(session))

    def is_finished(self) -> bool:
        """Tell whether every trial of the plan is over."""
        return is_over(self.searcher.session.plan, self.searcher.session.trials)


class _Suggestions(Searcher):
    """Suggest the next trial's config; the trials that Tune restores are its only state."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next trial's config; None while there is none."""
        return self.session.next_trial()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing: what a trial came to is in its record."""

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file, as Tune expects one."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: there is no state."""
