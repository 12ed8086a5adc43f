"""Which point of the space is tried next: a pure function of the plan, the point's number and what is known so far.

Nothing is remembered between two calls, so that a continued search asks the same questions as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from lape_ray.search.plan import Plan, Sample
from lape_ray.search.record import Trial, by_point
from lape_ray.search.space import Axis, Choice, Space

Point = dict[str, Any]
CELL = "cell"


def share(*key: object) -> float:
    """Draw a number from [0, 1) that depends on nothing but its key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2**56


def _grid(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    return plan.space.points()[number]


def _axes(space: Space) -> dict[str, Axis]:
    """Return all that is chosen: the cell, as if it were an axis, and the axes."""
    return {CELL: Choice(space.cells), **space.axes}


def _random(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    seed = plan.base.training.seed
    drawn: Point = {name: axis.at(share(seed, number, name)) for name, axis in _axes(plan.space).items()}
    return {**drawn.pop(CELL), **drawn}


def _tpe(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    """Tree-structured Parzen estimators (Bergstra et al., 2011) by Optuna, from all points that are known.

    Points that still train count with what they have reached, so that concurrent trials spread. Optuna hears of choices
    by their number.
    """
    import optuna  # takes a second to import, and only this strategy needs it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = _axes(plan.space)
    distributions = {name: _distribution(axis, optuna.distributions) for name, axis in axes.items()}
    seed = int(share(plan.base.training.seed, number, "tpe") * 2**31)
    startup = min(10, max(3, plan.points // 3))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=startup)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point in by_point(trials).values():
        values = [value for trial in point if (value := trial.last(plan.metric)) is not None]
        if values and point[0].point < number:
            known = point[0].values
            known[CELL] = next(cell for cell in plan.space.cells if cell.items() <= known.items())
            parameters = {
                name: axis.values.index(known[name]) if isinstance(axis, Choice) else known[name]
                for name, axis in axes.items()
            }
            value = plan.sign * statistics.fmean(values)
            study.add_trial(
                optuna.trial.create_trial(params=parameters, distributions=distributions, value=value)
            )
    found = study.ask(distributions).params
    asked = {name: _value(axis, found[name]) for name, axis in axes.items()}
    return {**asked.pop(CELL), **asked}


def _distribution(axis: Axis, kinds: Any) -> Any:
    if isinstance(axis, Choice):
        return kinds.CategoricalDistribution(range(len(axis.values)))
    if axis.whole:
        return kinds.IntDistribution(int(axis.low), int(axis.high))
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)


def _value(axis: Axis, found: Any) -> Any:
    if isinstance(axis, Choice):
        return axis.values[found]
    return found if axis.whole else float(f"{found:.4g}")


SAMPLERS: dict[Sample, Callable[[Plan, int, Sequence[Trial]], Point]] = {
    "grid": _grid,
    "random": _random,
    "tpe": _tpe,
}
