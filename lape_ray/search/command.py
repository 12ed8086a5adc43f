"""From what a person types to a plan: the step behind jobs/tune_position.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lape_ray.config import replace_fields
from lape_ray.recipes import recipe as recipe_of
from lape_ray.search.cells import build_space, labels
from lape_ray.search.plan import Plan, check_plan
from lape_ray.search.space import parse_axes
from lape_ray.search.strategies import HyperBand

TRIALS = 16


def run_command(*, list: bool, concurrent: int | None, gpus_per_worker: float | None, **options: Any) -> str:
    """Carry out a command line, or only `list` its points; returns what to print."""
    plan = plan_of(**options)
    if list:
        return listing(plan)
    from lape_ray.search.run import search  # only here: it imports Ray

    return search(plan, concurrent=concurrent, gpus_per_worker=gpus_per_worker).summary()


def plan_of(
    *,
    space: str,
    recipe: str,
    axes: Sequence[str] = (),
    sample: Any = None,
    schedule: Any = "full",
    trials: int | None = None,
    seeds: int = 1,
    overrides: Mapping[str, Any] | None = None,
    **rules: Any,
) -> Plan:
    """Make the plan of a command line, checked; `rules` are the fields `metric`, `grace` and `eta` of a plan.

    Raises:
        ValueError: what was given is unknown, empty or contradictory; says what to give instead.
    """
    overrides = overrides or {}
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} trains nothing; give 1 or more")
    base = replace_fields(recipe_of(recipe), overrides)
    found = build_space(space, base, parse_axes(axes, base), tuple(overrides))
    whole = len(found.points()) if found.finite else None
    if sample is None:
        fits = whole is not None and schedule != "pbt" and (trials is None or trials >= whole)
        sample = "grid" if fits else "random"
    if sample == "grid":
        if whole is None:
            ranges = [name for name, axis in found.axes.items() if not hasattr(axis, "values")]
            raise ValueError(
                f"a grid needs choices, but {', '.join(ranges)} is a range: write {ranges[0]}=choice(...), "
                "or use --sample random or tpe"
            )
        if trials not in (None, whole):
            raise ValueError(
                f"the grid has {whole} points, so --trials {trials} cannot be: leave it out, or use --sample random"
            )
        trials = whole
    plan = Plan(
        base=base, space=found, space_name=space, sample=sample, schedule=schedule,
        points=TRIALS if trials is None else trials,
        seeds=tuple(base.training.seed + number for number in range(seeds)), **rules,
    )  # fmt: skip
    check_plan(plan)
    if trials is None and schedule == "hyperband":
        return replace(plan, points=sum(rungs[0][0] for rungs in HyperBand(plan).brackets()))
    return plan


def listing(plan: Plan) -> str:
    """Describe the plan in words: its points, or what they are drawn from."""
    lines = [
        f"{plan.name}: {plan.points} points x {len(plan.seeds)} seeds of {plan.epochs} epochs, "
        f"points by {plan.sample}, schedule {plan.schedule}"
    ]
    if plan.sample == "grid":
        lines += labels(plan.space.points())
    else:
        lines += [f"{name} = {axis}" for name, axis in plan.space.axes.items()]
        lines += [f"cell = {name}" for name in labels(plan.space.cells) if len(plan.space.cells) > 1]
    return "\n  ".join(lines)
