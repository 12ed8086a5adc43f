"""A search in MLflow: one run for the search, and below it one for each trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lape_ray import tracking
from lape_ray.config import NETWORK_FIELDS, TrainConfig
from lape_ray.data.split import read_split_info
from lape_ray.search.ledger import Trial
from lape_ray.search.plan import Plan
from lape_ray.search.space import as_text


class Runs:
    """The MLflow runs of one search, on the driver."""

    def __init__(self, plan: Plan, uri: str, *, command: str, program: str) -> None:
        self._plan, self.uri, self._command = plan, uri, command
        self._source = tracking.source_tags(program)
        splits = {
            "train": read_split_info(plan.base.data, "train"),
            "val": read_split_info(plan.base.data, "val"),
        }
        self._datasets = {role: (facts.path, facts.sha256) for role, facts in splits.items() if facts.sha256}
        self.parent = ""

    def open_parent(self, earlier: str | None) -> str:
        """Continue the search's run, or make it; returns its id."""
        if earlier and tracking.reopen_run(self.uri, earlier):
            self.parent = earlier
            return earlier
        plan = self._plan
        tags = {"recipe": plan.base.recipe, "search": plan.name, "space": plan.space_name, "sample": plan.sample,
                "schedule": plan.schedule, "metric": plan.metric, "trials": str(plan.trials)}  # fmt: skip
        tags |= {f"space.{name}": str(axis) for name, axis in plan.space.axes.items()}
        self.parent = tracking.create_run(
            plan.base,
            name=plan.name,
            command=self._command,
            tags={**tags, **self._source},
            datasets=self._datasets,
        )
        return self.parent

    def open_child(self, trial: Trial, config: TrainConfig) -> str:
        """Continue the trial's run, or make it; returns its id."""
        if trial.run_id and tracking.reopen_run(self.uri, trial.run_id):
            return trial.run_id
        tags = {"mlflow.parentRunId": self.parent, "search": self._plan.name, "trial": str(trial.number),
                "cell": trial.label, "seed": str(trial.seed), "recipe": config.recipe}  # fmt: skip
        tags |= {key: str(getattr(config.model, key)) for key in NETWORK_FIELDS}
        name = f"{trial.label} seed {trial.seed}"
        return tracking.create_run(
            config, name=name, command=self._command, tags={**tags, **self._source}, datasets=self._datasets
        )

    def settle(self, trial: Trial) -> None:
        """Bring the state of a trial's run into line with the trial, which no worker group trains any more."""
        status: tracking.Status = {"finished": "FINISHED", "stopped": "FINISHED", "paused": "FINISHED"}.get(
            trial.state, "FAILED" if trial.state == "failed" else "KILLED"
        )  # type: ignore[assignment]
        tags = {"state": trial.state, "checkpoint": trial.checkpoint}
        if trial.error:
            tags["error"] = trial.error[:5000]
        for clone in trial.lineage:
            values = " ".join(f"{name}={as_text(value)}" for name, value in clone.values.items())
            tags[f"clone.{clone.epoch:06}"] = f"trial {clone.source}, then {values}"
        tracking.tag_run(self.uri, trial.run_id, tags)
        tracking.finish_run(self.uri, trial.run_id, status)

    def log_results(self, folder: Path, values: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Put the search's report, its best values and the best config's command on its run."""
        tracking.log_files(self.uri, self.parent, folder, "search")
        tracking.log_values(self.uri, self.parent, values)
        tracking.tag_run(self.uri, self.parent, tags)

    def close(self, trials: Sequence[Trial], status: tracking.Status) -> None:
        """Close the search's run and those of trials that were left in the middle."""
        for trial in trials:
            if trial.state == "running" and trial.run_id:
                self.settle(trial)
        tracking.finish_run(self.uri, self.parent, status)
