"""The figures of a search: accuracy by cell, learning curves, and hyper-parameters side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lape_ray.config import write_value
from lape_ray.report.figures import curve_axes, shortened
from lape_ray.report.statistics import Estimate
from lape_ray.search.plan import Plan
from lape_ray.search.space import Axis, Choice, Range
from lape_ray.search.statistics import Cell

MOST_CELLS = 40
MOST_CURVES = 8
MAP = matplotlib.colormaps["viridis"]


def cells_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Draw every trial that trained to the end as a dot, by cell, with mean and interval; None where there is none."""
    shown = [(cell, cell.estimate) for cell in found if cell.estimate is not None]
    if not shown:
        return None
    compared = any(cell.difference is not None for cell, _ in shown)
    rows = [
        _Row(cell.label, list(cell.finals.values()), estimate, compared and cell.difference is None)
        for cell, estimate in shown
    ]
    figure = _rows_figure(rows, "Orange: join basic." if compared else "")
    axis = figure.axes[0]
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, 0.0), min(high, 100.0 if "acc" in plan.metric else math.inf))
    axis.set_xlabel(f"{plan.metric}{plan.unit} after the last epoch", fontsize=9)
    return figure


def differences_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Draw each cell's difference from the same cell with join `basic`, seed by seed; None for fewer than two."""
    rows = [
        _Row(cell.label, list(cell.paired.values()), cell.difference, cell.difference.clear)
        for cell in found
        if cell.difference is not None
    ]
    if len(rows) < 2:
        return None
    figure = _rows_figure(rows, "Orange: larger than the noise.")
    axis = figure.axes[0]
    axis.axvline(0, color="0.4", lw=1, zorder=0)
    axis.set_xlabel(f"difference in {plan.metric}{plan.unit} from the same cell with join basic", fontsize=9)
    return figure


class _Row(NamedTuple):
    label: str
    values: list[float]
    estimate: Estimate
    orange: bool


def _rows_figure(rows: Sequence[_Row], legend: str) -> Figure:
    """Draw a row for each cell: a dot for each seed, and a diamond with its interval for their mean."""
    rows = rows[:MOST_CELLS]
    figure = Figure(figsize=(9.5, 1.1 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for height, row in enumerate(rows):
        color = "C1" if row.orange else "C0"
        axis.plot(row.values, [height] * len(row.values), "o", color=color, ms=4, alpha=0.55)
        half = None if row.estimate.interval is None else row.estimate.mean - row.estimate.interval[0]
        axis.errorbar(row.estimate.mean, height, xerr=half, fmt="D", color=color, ms=6, mec="black")
    # Few seeds have intervals far wider than what was seen; the picture keeps to the dots, and the bars leave it.
    dots = [value for row in rows for value in row.values]
    margin = 0.35 * max(max(dots) - min(dots), 1e-3)
    axis.set_xlim(min(dots) - margin, max(dots) + margin)
    axis.set_yticks(range(len(rows)), [shortened(row.label) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(labelsize=8)
    figure.suptitle(f"Dots: seeds. Diamonds: means, with 95 % interval. {legend}".strip(), fontsize=9)
    return figure


def curves_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Draw the metric by epoch: means of the best cells in colour, all other trials in grey; None without any."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis = figure.subplots()
    for index, cell in enumerate(found):
        best = index < MOST_CURVES
        curves = [curve for trial in cell.trials if (curve := trial.curve(plan.metric))]
        color, alpha, zorder = (f"C{index}", 0.35, 2) if best else ("0.8", 1.0, 0)
        for curve in curves:
            axis.plot(list(curve), list(curve.values()), color=color, alpha=alpha, zorder=zorder, lw=0.7)
        if best and curves:  # over the epochs that all of the cell's trials with any result have come to
            epochs = sorted(set.intersection(*map(set, curves)))
            means = [np.mean([curve[epoch] for curve in curves]) for epoch in epochs]
            axis.plot(epochs, means, "o-", color=color, lw=1.8, ms=3, label=shortened(cell.label))
    if not axis.lines:
        return None
    curve_axes(axis, "", "epoch", f"{plan.metric}{plan.unit}")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def parallel_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Draw a line for each trial through its searched values to its metric, coloured by it.

    Without axes to show it is None.
    """
    last = [(trial, trial.last(plan.metric)) for cell in found for trial in cell.trials]
    scored = [(trial, score) for trial, score in last if score is not None]
    if not plan.space.axes or len(scored) < 2:
        return None
    trials, scores = zip(*sorted(scored, key=lambda pair: plan.sign * pair[1]), strict=True)
    columns: dict[str, tuple[Axis, Sequence[Any]]] = {}
    for name, axis in plan.space.axes.items():
        columns[name.partition(".")[2]] = axis, [trial.values[name] for trial in trials]
    if len(plan.space.cells) > 1:
        labels = [trial.label for trial in trials]
        columns["cell"] = Choice(tuple(sorted(set(labels)))), labels
    columns[plan.metric] = Range(min(scores), max(scores)), scores
    heights = [[axis.place(value) for value in values] for axis, values in columns.values()]
    figure = Figure(figsize=(max(6.0, 1.9 * len(columns)), 4.4), layout="constrained")
    panel = figure.subplots()
    for line in zip(*heights, strict=True):
        panel.plot(line, color=MAP(line[-1] if plan.sign > 0 else 1 - line[-1]), linewidth=1.4, alpha=0.8)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for x, (axis, _) in enumerate(columns.values()):
        panel.axvline(x, color="0.3", linewidth=0.8)
        for value in axis.values if isinstance(axis, Choice) else (axis.low, axis.high):
            text = write_value(value) if isinstance(axis, Choice) else f"{value:.4g}"
            panel.text(x + 0.04, axis.place(value), text, fontsize=7, va="center", bbox=box)
    panel.set_xticks(range(len(columns)), list(columns), fontsize=9)
    panel.set(xlim=(-0.3, len(columns) - 0.4), ylim=(-0.05, 1.05), yticks=[])
    panel.spines[:].set_visible(False)
    return figure
