"""From what a person types to a plan: the step behind jobs/tune_position.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from lape_ray.config import replace_fields
from lape_ray.recipes import recipe as recipe_of
from lape_ray.search.cells import build_space, labels
from lape_ray.search.plan import Plan, Sample, Schedule, check_plan
from lape_ray.search.schedules import HyperBand
from lape_ray.search.space import parse_axes

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
    sample: str | None = None,
    schedule: str = "full",
    trials: int | None = None,
    seeds: int = 1,
    metric: str = "val/acc1",
    grace: int = 1,
    eta: int = 3,
    overrides: Mapping[str, Any] | None = None,
) -> Plan:
    """Make the plan of a command line, checked.

    Raises:
        ValueError: what was given is unknown, empty or contradictory; says what to give instead.
    """
    overrides = dict(overrides or {})
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} trains nothing; give 1 or more")
    base = replace_fields(recipe_of(recipe), overrides)
    found = build_space(space, base, parse_axes(axes, base), tuple(overrides))
    if sample is None:
        whole = found.finite and schedule != "pbt" and (trials is None or trials >= len(found.points()))
        sample = "grid" if whole else "random"
    if sample == "grid" and not found.finite:
        ranges = [name for name, axis in found.axes.items() if not hasattr(axis, "values")]
        raise ValueError(
            f"a grid needs choices, but {', '.join(ranges)} is a range: write {ranges[0]}=choice(...), "
            "or use --sample random or tpe"
        )
    plan = Plan(
        base=base,
        space=found,
        space_name=space,
        sample=cast(Sample, sample),
        schedule=cast(Schedule, schedule),
        points=1,
        seeds=tuple(base.training.seed + number for number in range(seeds)),
        metric=metric,
        grace=grace,
        eta=eta,
    )
    plan = _with_points(plan, trials)
    check_plan(plan)
    return plan


def _with_points(plan: Plan, trials: int | None) -> Plan:
    if plan.sample == "grid":
        count = len(plan.space.points())
        if trials is not None and trials != count:
            raise ValueError(
                f"the grid has {count} points, so --trials {trials} cannot be: leave it out, or use --sample random"
            )
        return replace(plan, points=count)
    if trials is None and plan.schedule == "hyperband":
        check_plan(plan)
        return replace(plan, points=sum(rungs[0][0] for rungs in HyperBand(plan).brackets()))
    return replace(plan, points=TRIALS if trials is None else trials)


def listing(plan: Plan) -> str:
    """Describe the plan in words: its points, or what they are drawn from."""
    head = (
        f"{plan.name}: {plan.points} points x {len(plan.seeds)} seeds of {plan.epochs} epochs, "
        f"points by {plan.sample}, schedule {plan.schedule}"
    )
    if plan.sample == "grid":
        return "\n".join([head, *(f"  {name}" for name in labels(plan.space.points()))])
    lines = [f"  {name} = {axis}" for name, axis in plan.space.axes.items()]
    if len(plan.space.cells) > 1:
        lines += [f"  cell = {name}" for name in labels(plan.space.cells)]
    return "\n".join([head, *lines])
