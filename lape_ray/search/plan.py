"""Define a search: all that decides which trials there are and what becomes of them. Standard library only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lape_ray.config import TrainConfig, replace_fields, what_is_learned
from lape_ray.search.record import Trial
from lape_ray.search.space import Space

Sample = Literal["grid", "random", "tpe"]
Schedule = Literal["full", "asha", "hyperband", "pbt"]
METRICS = ("val/acc1", "val/acc5", "val/loss", "val_ema/acc1", "val_ema/acc5", "val_ema/loss")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A search, before anything of it has run.

    Attributes:
        base: the config that every trial starts from
        space: what is varied
        space_name: of the named space, for people
        sample: how points of the space are chosen
        schedule: which trials train to the end
        points: how many points are tried; every one of a grid
        seeds: each point is trained once with each
        metric: what is compared
        grace: epochs that every trial gets, and between two generations of PBT
        eta: one in `eta` trials goes on at a rung; of a population, one in `eta` is replaced
    """

    base: TrainConfig
    space: Space
    space_name: str
    sample: Sample
    schedule: Schedule
    points: int
    seeds: tuple[int, ...]
    metric: str = "val/acc1"
    grace: int = 1
    eta: int = 3

    @property
    def epochs(self) -> int:
        """Return the epochs of a trial that trains to the end."""
        return self.base.optim.total_epochs

    @property
    def trials(self) -> int:
        return self.points * len(self.seeds)

    @property
    def workers(self) -> int:
        """Return the number of workers of each trial."""
        return self.base.run.workers.low

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return -1 if self.metric.endswith("loss") else 1

    @property
    def unit(self) -> str:
        """Return what stands behind a value of the metric."""
        return " %" if "acc" in self.metric else ""

    def definition(self) -> dict[str, Any]:
        """Collect all that a continued search must share with what it continues, as plain JSON values."""
        names = ("sample", "schedule", "points", "seeds", "metric", "grace", "eta")
        data = {"data.train": self.base.data.train, "data.val": self.base.data.val}
        values = {
            "space": self.space_name,
            "cells": [dict(cell) for cell in self.space.cells],
            "axes": {name: str(axis) for name, axis in self.space.axes.items()},
            **{name: getattr(self, name) for name in names},
            "base": what_is_learned(self.base) | data,
        }
        return json.loads(json.dumps(values))

    @property
    def name(self) -> str:
        """The search's name: the one that was given, else one that is the same for the same search."""
        text = json.dumps(self.definition(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        return self.base.run.name or f"{self.space_name}-{self.base.recipe or 'config'}-{digest}"

    def config(self, trial: Trial) -> TrainConfig:
        """Make the whole config of a trial as it is now; a ValueError says which settings contradict each other."""
        name = f"{self.name}-{trial.id}"
        return replace_fields(self.base, {**trial.values, "training.seed": trial.seed, "run.name": name})


def plan_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List `what: old -> new` for whatever two definitions do not share."""
    changed = []
    for key, after in new.items():
        before = old.get(key)
        if isinstance(after, dict) and isinstance(before, dict):
            changed += plan_differences(before, dict.fromkeys(before) | after)
        elif before != after:
            changed.append("the cells" if key == "cells" else f"{key}: {before!r} -> {after!r}")
    return changed


# A run may change these while it goes on: no tensor of it changes its shape, and no schedule its length.
_MOVING = (
    "optim.lr", "optim.min_lr", "optim.weight_decay", "optim.label_smoothing", "optim.clip_norm",
    "model.drop_path", "model.attention_dropout",
    "data.flip", "data.mixup", "data.cutmix", "data.mix_prob", "data.mix_switch_prob", "data.erase_prob",
    "data.color_jitter", "data.rand_augment", "data.crop_scale", "data.crop_ratio",
)  # fmt: skip


def check_plan(plan: Plan) -> None:
    """Refuse a plan whose parts contradict each other.

    Raises:
        ValueError: says which, and what to give instead.
    """
    base, schedule = plan.base, plan.schedule
    fixed = ", ".join(name for name in plan.space.axes if name not in _MOVING)
    variants = {cell.get("model.variant", base.model.variant) for cell in plan.space.cells}
    problems = [
        (base.run.in_process, "--run.num_workers 0 trains without Ray, which a search needs: give 1, or leave it out"),
        (base.run.workers.low < base.run.workers.high,
         f"--run.num_workers {base.run.num_workers} may not vary in a search, whose trials are to be compared; give "
         "one number"),
        (plan.metric not in METRICS,
         f"--metric {plan.metric!r} is not known; choose one of {', '.join(METRICS)}"),
        (plan.metric.startswith("val_ema") and not base.optim.ema_decay,
         f"--metric {plan.metric} needs a moving average: set --optim.ema_decay, such as 0.999"),
        (plan.points < 1 or not plan.seeds,
         "a search needs at least one trial and one seed; raise --trials or --seeds"),
        (plan.eta < 2, f"--eta {plan.eta} keeps every trial; give 2 or more"),
        (not 1 <= plan.grace <= plan.epochs,
         f"--grace {plan.grace} must be from 1 to the {plan.epochs} epochs of a trial"),
        (schedule != "full" and base.run.eval_epochs != 1,
         f"the schedule {schedule} decides by every epoch's metric: set --run.eval_epochs 1"),
        (schedule != "full" and plan.grace == plan.epochs,
         f"the schedule {schedule} has no epoch to decide at: --grace {plan.grace} is all of a trial; lower it, raise "
         "--optim.epochs, or use --schedule full"),
        (base.run.stop_after_epochs is not None,
         "--run.stop_after_epochs is for single runs; a search is continued by its own command"),
        (base.optim.teacher is None and any(variant.endswith("distilled") for variant in variants),
         "a distilled network needs a teacher: give --optim.teacher, or --model.variant of another network"),
        (schedule == "pbt" and (len(plan.space.cells) > 1 or not plan.space.axes),
         "--schedule pbt changes settings of a run while it goes on, which the cells of the space "
         f"{plan.space_name} do not allow; use the space `free` with axes such as --space "
         "optim.lr=loguniform(1e-4,1e-2)"),
        (schedule == "pbt" and fixed != "",
         f"--schedule pbt cannot change {fixed} while a run goes on; it can change {', '.join(_MOVING)}"),
        (schedule == "pbt" and (plan.trials < 2 * plan.eta or plan.points < plan.trials),
         f"--schedule pbt replaces one in {plan.eta} members of a population of one seed: give --seeds 1 and --trials "
         f"{2 * plan.eta} or more, or a lower --eta"),
    ]  # fmt: skip
    for wrong, words in problems:
        if wrong:
            raise ValueError(words)
