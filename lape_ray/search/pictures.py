"""The figures of a search: accuracy by cell, learning curves, and hyper-parameters side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lape_ray.config import write_value
from lape_ray.report.figures import curve_axes
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial
from lape_ray.search.space import Axis, Choice
from lape_ray.search.statistics import Cell

MOST_CELLS = 40
MOST_CURVES = 8
LABEL = 48
MAP = matplotlib.colormaps["viridis"]


def _cut(label: str) -> str:
    return label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"


def cells_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Every trial that trained to the end as a dot, by cell, with mean and interval; None where there is none."""
    shown = [(cell, cell.estimate) for cell in found if cell.estimate is not None][:MOST_CELLS]
    if not shown:
        return None
    compared = any(cell.difference is not None for cell, _ in shown)
    figure = Figure(figsize=(9.5, 1.1 + 0.32 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for row, (cell, estimate) in enumerate(shown):
        color = "C1" if compared and cell.difference is None else "C0"
        values = list(cell.finals.values())
        axis.plot(values, [row] * len(values), "o", color=color, markersize=4, alpha=0.55)
        half = None if estimate.interval is None else estimate.mean - estimate.interval[0]
        axis.errorbar(
            estimate.mean, row, xerr=half, fmt="D", color=color, markersize=6, markeredgecolor="black"
        )
    # Few seeds have intervals far wider than what was seen; the picture keeps to the dots, and the bars leave it.
    dots = [value for cell, _ in shown for value in cell.finals.values()]
    margin = 0.35 * max(max(dots) - min(dots), 1e-3)
    highest = 100.0 if "acc" in plan.metric else math.inf
    axis.set_xlim(max(min(dots) - margin, 0.0), min(max(dots) + margin, highest))
    axis.set_yticks(range(len(shown)), [_cut(cell.label) for cell, _ in shown], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{plan.metric}{plan.unit} after the last epoch", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(labelsize=8)
    orange = " Orange: join basic." if compared else ""
    figure.suptitle(f"Dots: seeds. Diamonds: means, with 95 % interval.{orange}", fontsize=9)
    return figure


def curves_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Draw the metric by epoch: means of the best cells in colour, all other trials in grey; None without any."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis = figure.subplots()
    for index, cell in enumerate(found):
        best = index < MOST_CURVES
        curves = [curve for trial in cell.trials if (curve := _curve(trial, plan.metric))]
        for curve in curves:
            line = axis.plot(list(curve), list(curve.values()), color="0.8", linewidth=0.7, zorder=0)[0]
            if best:
                line.set(color=f"C{index}", alpha=0.35, zorder=2)
        if best and curves:  # over the epochs that all of the cell's trials with any result have come to
            epochs = sorted(set.intersection(*map(set, curves)))
            means = [np.mean([curve[epoch] for curve in curves]) for epoch in epochs]
            axis.plot(
                epochs, means, "o-", color=f"C{index}", linewidth=1.8, markersize=3, label=_cut(cell.label)
            )
    if not axis.lines:
        return None
    curve_axes(axis, "", "epoch", f"{plan.metric}{plan.unit}")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _curve(trial: Trial, metric: str) -> dict[int, float]:
    return {one.epoch: one.metrics[metric] for one in trial.epochs if metric in one.metrics}


def parallel_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Draw a line for each trial through its searched values to its metric, coloured by it.

    Without axes to show it is None.
    """
    last = [(trial, trial.last(plan.metric)) for cell in found for trial in cell.trials]
    scored = sorted(
        ((trial, score) for trial, score in last if score is not None), key=lambda pair: plan.sign * pair[1]
    )
    if not plan.space.axes or len(scored) < 2:
        return None
    trials, scores = zip(*scored, strict=True)
    low, high = min(scores), max(scores)
    heights = [(score - low) / ((high - low) or 1.0) for score in scores]
    titles = [name.partition(".")[2] for name in plan.space.axes]
    columns = [
        _places(axis, [trial.values[name] for trial in trials]) for name, axis in plan.space.axes.items()
    ]
    if len(plan.space.cells) > 1:
        labels = [trial.label for trial in trials]
        titles, columns = [*titles, "cell"], [*columns, _places(Choice(tuple(sorted(set(labels)))), labels)]
    columns.append((heights, {0.0: f"{low:.2f}", 1.0: f"{high:.2f}"}))
    figure = Figure(figsize=(max(6.0, 1.9 * len(columns)), 4.4), layout="constrained")
    axis = figure.subplots()
    for share, *line in zip(heights, *(places for places, _ in columns), strict=True):
        axis.plot(line, color=MAP(share if plan.sign > 0 else 1 - share), linewidth=1.4, alpha=0.8)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for x, (_, ticks) in enumerate(columns):
        axis.axvline(x, color="0.3", linewidth=0.8)
        for y, text in ticks.items():
            axis.text(x + 0.04, y, text, fontsize=7, va="center", bbox=box)
    axis.set_xticks(range(len(columns)), [*titles, plan.metric], fontsize=9)
    axis.set_xlim(-0.3, len(columns) - 0.4)
    axis.set_ylim(-0.05, 1.05)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return figure


def _places(axis: Axis, values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Return heights from 0 to 1 of each value, and the text of the ticks by their heights."""
    if isinstance(axis, Choice):
        known = {
            write_value(value): index / max(1, len(axis.values) - 1)
            for index, value in enumerate(axis.values)
        }
        return [known[write_value(value)] for value in values], {
            height: text for text, height in known.items()
        }
    scale = math.log if axis.log else float
    low, high = scale(axis.low), scale(axis.high)
    return [(scale(value) - low) / (high - low) for value in values], {
        0.0: f"{axis.low:g}",
        1.0: f"{axis.high:g}",
    }
