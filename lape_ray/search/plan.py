"""What a search is: everything that decides which trials there are and what becomes of them. Standard library only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lape_ray.config import TrainConfig, what_is_learned
from lape_ray.search.cells import Space

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
        """Of a trial that trains to the end."""
        return self.base.optim.total_epochs

    @property
    def trials(self) -> int:
        return self.points * len(self.seeds)

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return -1 if self.metric.endswith("loss") else 1

    def definition(self) -> dict[str, Any]:
        """All that a continued search must share with what it continues, as plain JSON values."""
        values = {
            "space": self.space_name,
            "cells": [dict(cell) for cell in self.space.cells],
            "axes": {name: str(axis) for name, axis in self.space.axes.items()},
            **{name: getattr(self, name) for name in ("sample", "schedule", "points", "seeds")},
            **{name: getattr(self, name) for name in ("metric", "grace", "eta")},
            "base": what_is_learned(self.base)
            | {"data.train": self.base.data.train, "data.val": self.base.data.val},
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @property
    def name(self) -> str:
        """The search's name: the one that was given, else one that is the same for the same search."""
        text = json.dumps(self.definition(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        return self.base.run.name or f"{self.space_name}-{self.base.recipe or 'config'}-{digest}"


def plan_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List `what: old -> new` for whatever two definitions do not share."""
    changed = []
    for key in new:
        before, after = old.get(key), new[key]
        if isinstance(after, dict) and isinstance(before, dict):
            names = sorted(before.keys() | after.keys())
            changed += [
                f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
                for name in names
                if before.get(name) != after.get(name)
            ]
        elif before != after:
            short = key == "cells"
            changed.append("the cells" if short else f"{key}: {before!r} -> {after!r}")
    return changed


def check_plan(plan: Plan) -> None:
    """Refuse a plan whose parts contradict each other.

    Raises:
        ValueError: says which, and what to give instead.
    """
    if plan.base.run.in_process:
        raise ValueError(
            "--run.num_workers 0 trains without Ray, which a search needs: give 1, or leave it out"
        )
    if plan.metric not in METRICS:
        raise ValueError(f"--metric {plan.metric!r} is not known; choose one of {', '.join(METRICS)}")
    if plan.metric.startswith("val_ema") and not plan.base.optim.ema_decay:
        raise ValueError(
            f"--metric {plan.metric} needs a moving average: set --optim.ema_decay, such as 0.999"
        )
    if plan.points < 1 or not plan.seeds:
        raise ValueError("a search needs at least one trial and one seed; raise --trials or --seeds")
    if plan.eta < 2:
        raise ValueError(f"--eta {plan.eta} keeps every trial; give 2 or more")
    if not 1 <= plan.grace <= plan.epochs:
        raise ValueError(f"--grace {plan.grace} must be from 1 to the {plan.epochs} epochs of a trial")
    if plan.schedule != "full" and plan.base.run.eval_epochs != 1:
        raise ValueError(
            f"the schedule {plan.schedule} decides by every epoch's metric: set --run.eval_epochs 1"
        )
    if plan.schedule != "full" and plan.grace == plan.epochs:
        raise ValueError(
            f"the schedule {plan.schedule} has no epoch to decide at: --grace {plan.grace} is all of a trial; lower "
            "it, raise --optim.epochs, or use --schedule full"
        )
    if plan.base.run.stop_after_epochs is not None:
        raise ValueError(
            "--run.stop_after_epochs is for single runs; a search is continued by its own command"
        )
    variants = {cell.get("model.variant", plan.base.model.variant) for cell in plan.space.cells}
    if plan.base.optim.teacher is None and any(variant.endswith("distilled") for variant in variants):
        raise ValueError(
            "a distilled network needs a teacher: give --optim.teacher, or --model.variant of another network"
        )
    if plan.schedule == "pbt":
        _check_population(plan)


# A run may change these while it goes on: no tensor of it changes its shape, and no schedule its length.
_MOVING = (
    "optim.lr", "optim.min_lr", "optim.weight_decay", "optim.label_smoothing", "optim.clip_norm",
    "model.drop_path", "model.attention_dropout",
    "data.flip", "data.mixup", "data.cutmix", "data.mix_prob", "data.mix_switch_prob", "data.erase_prob",
    "data.color_jitter", "data.rand_augment", "data.crop_scale", "data.crop_ratio",
)  # fmt: skip


def _check_population(plan: Plan) -> None:
    if len(plan.space.cells) > 1 or not plan.space.axes:
        raise ValueError(
            "--schedule pbt changes settings of a run while it goes on, which the cells of the space "
            f"{plan.space_name} do not allow; use the space `free` with axes such as "
            "--space optim.lr=loguniform(1e-4,1e-2)"
        )
    if fixed := [name for name in plan.space.axes if name not in _MOVING]:
        raise ValueError(
            f"--schedule pbt cannot change {', '.join(fixed)} while a run goes on; it can change {', '.join(_MOVING)}"
        )
    if plan.trials < 2 * plan.eta or plan.points < plan.trials:
        raise ValueError(
            f"--schedule pbt replaces one in {plan.eta} members of a population of one seed: give --seeds 1 and "
            f"--trials {2 * plan.eta} or more, or a lower --eta"
        )
