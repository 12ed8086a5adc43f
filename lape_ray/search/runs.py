"""A search in MLflow: one run for the search, and below it one for each trial."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from lape_ray import tracking
from lape_ray.cli import typed_command
from lape_ray.config import NETWORK_FIELDS, TrainConfig, write_value
from lape_ray.search.plan import Plan
from lape_ray.search.record import State, Trial

TRIAL = "trial"
"""The tag that holds a trial's number."""
_ENDS: dict[State, tracking.Status] = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


class Runs:
    """The MLflow runs of one search, on the driver."""

    def __init__(self, plan: Plan, uri: str, datasets: tracking.Datasets) -> None:
        self.plan, self.uri, self.parent = plan, uri, ""
        self.command, self._source = typed_command(), tracking.source_tags(sys.argv[0])
        self._create = partial(tracking.create_run, command=self.command, datasets=datasets)
        self._children: dict[str, str] = {}  # what an earlier driver has made, by the trials' numbers
        self._opened: set[str] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")

    def open_parent(self, earlier: str | None) -> str:
        """Continue the search's run, or make it; returns its id."""
        if earlier and tracking.reopen_run(self.uri, earlier):
            self.parent = earlier
            self._children = tracking.runs_below(self.uri, earlier, TRIAL)
            return earlier
        plan = self.plan
        tags = {"recipe": plan.base.recipe, "search": plan.name, "space": plan.space_name, "sample": plan.sample,
                "schedule": plan.schedule, "metric": plan.metric, "trials": str(plan.trials)}  # fmt: skip
        tags |= {f"space.{name}": str(axis) for name, axis in plan.space.axes.items()}
        self.parent = self._create(plan.base, name=plan.name, tags={**tags, **self._source})
        return self.parent

    def open_child(self, trial: Trial, config: TrainConfig) -> str:
        """Make a trial's run, or find the one that an earlier driver made; returns its id."""
        if known := self._children.get(str(trial.number)):
            return known
        tags = {"mlflow.parentRunId": self.parent, "search": self.plan.name, TRIAL: str(trial.number),
                "cell": trial.label, "seed": str(trial.seed), "recipe": config.recipe}  # fmt: skip
        tags |= {key: str(getattr(config.model, key)) for key in NETWORK_FIELDS}
        name = f"{trial.label} seed {trial.seed}"
        run_id = self._create(config, name=name, tags={**tags, **self._source})
        self._opened.add(run_id)
        return run_id

    def reopen(self, trial: Trial) -> None:
        """Set the run of a trial that an earlier driver began to running again."""
        if trial.run_id and trial.run_id not in self._opened:
            self._opened.add(trial.run_id)
            self._thread.submit(tracking.reopen_run, self.uri, trial.run_id)

    def settle(self, trial: Trial) -> None:
        """Bring the state of a trial's run into line with the trial, which nobody trains any more."""
        if trial.run_id:
            self._thread.submit(self._settle, replace(trial))

    def _settle(self, trial: Trial) -> None:
        tags = {"state": trial.state, "checkpoint": trial.checkpoint}
        if trial.error:
            tags["error"] = trial.error[:5000]
        for clone in trial.lineage:
            values = " ".join(f"{name}={write_value(value)}" for name, value in clone.values.items())
            tags[f"clone.{clone.epoch:06}"] = f"trial {clone.source}, then {values}"
        tracking.tag_run(self.uri, trial.run_id, tags)
        tracking.finish_run(self.uri, trial.run_id, _ENDS.get(trial.state, "KILLED"))

    def log_results(self, folder: Path, values: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Put the search's report, its best values and the best config's command on its run."""
        tracking.log_files(self.uri, self.parent, folder, "search")
        tracking.log_values(self.uri, self.parent, values)
        tracking.tag_run(self.uri, self.parent, tags)

    def close(self) -> None:
        """Wait until MLflow has all of the trials."""
        self._thread.shutdown()
