"""Which point of the space is tried next: a pure function of the plan, the point's number and what is known so far.

Nothing is remembered between two calls, so that a continued search asks the same questions as an undisturbed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lape_ray.search.cells import Space
from lape_ray.search.ledger import Trial, by_point
from lape_ray.search.plan import Plan, Sample
from lape_ray.search.space import Choice

Point = dict[str, Any]
CELL = "cell"


def share(*key: object) -> float:
    """Draw a number from [0, 1) that depends on nothing but its key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2**56


def _grid(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    return plan.space.points()[number]


def _random(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    seed, space = plan.base.training.seed, plan.space
    cell = space.cells[int(share(seed, number, CELL) * len(space.cells))]
    return {**cell, **{name: axis.at(share(seed, number, name)) for name, axis in space.axes.items()}}


def _tpe(plan: Plan, number: int, trials: Sequence[Trial]) -> Point:
    """Tree-structured Parzen estimators (Bergstra et al., 2011) by Optuna, from all points that are known.

    Points that still train count with what they have reached, so that concurrent trials spread.
    """
    import optuna  # takes a second to import, and only this strategy needs it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = plan.space
    distributions = _distributions(space, optuna)
    seed = int(share(plan.base.training.seed, number, "tpe") * 2**31)
    sampler = optuna.samplers.TPESampler(
        seed=seed, multivariate=True, n_startup_trials=min(10, max(3, plan.points // 3))
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point in by_point(trials).values():
        if point[0].point >= number:
            continue
        values = [value for trial in point if (value := trial.last(plan.metric)) is not None]
        if values:
            study.add_trial(
                optuna.trial.create_trial(
                    params=_parameters(space, point[0].values),
                    distributions=distributions,
                    value=plan.sign * sum(values) / len(values),
                )
            )
    found = study.ask(distributions).params
    axes = {
        name: axis.values[found[name]] if isinstance(axis, Choice) else _rounded(found[name])
        for name, axis in space.axes.items()
    }
    return {**space.cells[found.get(CELL, 0)], **axes}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _distributions(space: Space, optuna: Any) -> dict[str, Any]:
    kinds = optuna.distributions
    found: dict[str, Any] = {}
    if len(space.cells) > 1:
        found[CELL] = kinds.CategoricalDistribution(range(len(space.cells)))
    for name, axis in space.axes.items():
        if isinstance(axis, Choice):
            found[name] = kinds.CategoricalDistribution(range(len(axis.values)))
        elif axis.whole:
            found[name] = kinds.IntDistribution(int(axis.low), int(axis.high))
        else:
            found[name] = kinds.FloatDistribution(axis.low, axis.high, log=axis.log)
    return found


def _parameters(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a point to Optuna's terms: choices and cells by their number."""
    found = {
        name: axis.values.index(values[name]) if isinstance(axis, Choice) else values[name]
        for name, axis in space.axes.items()
    }
    if len(space.cells) > 1:
        found[CELL] = next(
            index for index, cell in enumerate(space.cells) if all(values[n] == v for n, v in cell.items())
        )
    return found


SAMPLERS: dict[Sample, Callable[[Plan, int, Sequence[Trial]], Point]] = {
    "grid": _grid,
    "random": _random,
    "tpe": _tpe,
}
