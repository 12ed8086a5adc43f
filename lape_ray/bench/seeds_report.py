"""The record of `seeds` as a table: means, spreads and paired differences, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lape_ray.bench.record import heading
from lape_ray.bench.seeds import PAPER
from lape_ray.bench.table import table
from lape_ray.estimate import LEVEL, Estimate

COLUMNS = (
    "recipe",
    "n",
    "top-1",
    "sd",
    "over basic",
    f"{LEVEL:.0%} interval",
    "paper",
    "paper's gain",
    "s a run",
)


def report(record: Mapping[str, Any]) -> str:
    """Means over the seeds of a record; a difference is of the seeds that both recipes have."""
    settings, rows = record["settings"], record["sections"]["runs"]
    of = (
        f"{settings['holdout']} training images that were held out" if settings["holdout"] else "the test set"
    )
    epochs = sorted({row["epochs"] for row in rows})
    title = (
        f"Top-1 on {of} after the last of {', '.join(map(str, epochs))} epochs, in percent; "
        f"{settings['at_once']} at once on {settings['device']}"
        + (f"; {settings['per_class']} training images of each class" if settings["per_class"] else "")
    )
    by_recipe: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], {})[row["seed"]] = row
    return "\n\n".join(
        [heading(record), table(title, COLUMNS, [_row(name, by_recipe) for name in by_recipe])]
    )


def _row(name: str, by_recipe: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str | int | None]:
    runs = by_recipe[name]
    ours = Estimate.of([run["acc1"] for run in runs.values()])
    basic = name.replace("_lape", "_basic")
    pairs = [
        run["acc1"] - by_recipe[basic][seed]["acc1"]
        for seed, run in runs.items()
        if seed in by_recipe.get(basic, {})
    ]
    gain = interval = paper_gain = None
    if basic != name and pairs:
        difference = Estimate.of(pairs)
        gain = f"{difference.mean:+.2f}"
        interval = "{:+.2f} to {:+.2f}".format(*difference.interval) if difference.interval else None
        paper_gain = f"{PAPER[name] - PAPER[basic]:+.2f}" if name in PAPER else None
    seconds = [run["seconds"] for run in runs.values()]
    return [
        name,
        ours.n,
        f"{ours.mean:.2f}",
        None if ours.sd is None else f"{ours.sd:.2f}",
        gain,
        interval,
        f"{PAPER[name]:.2f}" if name in PAPER else None,
        paper_gain,
        f"{min(seconds):.0f} to {max(seconds):.0f}",
    ]
