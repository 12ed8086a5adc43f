"""The figures of a search: accuracy by cell, learning curves, and hyper-parameters side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial
from lape_ray.search.space import Choice, as_text
from lape_ray.search.statistics import Cell, finals, unit_of

MOST_CELLS = 40
MOST_CURVES = 8
LABEL = 48
MAP = matplotlib.colormaps["viridis"]


def cells_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Every trial that trained to the end as a dot, by cell, with mean and interval; None where there is none."""
    shown = [cell for cell in found if cell.estimate is not None][:MOST_CELLS]
    if not shown:
        return None
    compared = any(cell.difference is not None for cell in shown)
    figure = Figure(figsize=(9.5, 1.1 + 0.32 * len(shown)), layout="constrained")
    axis = figure.subplots()
    dots: list[float] = []
    for row, cell in enumerate(shown):
        estimate = cell.estimate
        assert estimate is not None
        values = list(finals(cell.trials, plan.metric).values())
        dots += values
        color = "C1" if compared and cell.difference is None else "C0"
        axis.plot(values, [row] * len(values), "o", color=color, markersize=4, alpha=0.55)
        axis.plot([estimate.mean], [row], "D", color=color, markersize=6, markeredgecolor="black")
        if estimate.interval is not None:
            low, high = estimate.interval
            axis.plot([low, high], [row, row], color=color, linewidth=1.5, zorder=0)
    # Few seeds have intervals far wider than what was seen; the picture keeps to the dots, and the bars leave it.
    span = max(max(dots) - min(dots), 1e-3)
    ends = (min(dots) - 0.35 * span, max(dots) + 0.35 * span)
    axis.set_xlim(max(ends[0], 0.0), min(ends[1], 100.0) if "acc" in plan.metric else ends[1])
    axis.set_yticks(range(len(shown)), [_cut(cell.label) for cell in shown], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{plan.metric}{unit_of(plan.metric)} after the last epoch", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(labelsize=8)
    legend = "Dots: seeds. Diamonds: means, with 95 % interval." + (
        " Orange: join basic." if compared else ""
    )
    figure.suptitle(legend, fontsize=9)
    return figure


def _cut(label: str) -> str:
    return label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"


def curves_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Draw the metric by epoch: means of the best cells in colour, all other trials in grey."""
    first, others = found[:MOST_CURVES], found[MOST_CURVES:]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis = figure.subplots()
    drawn = 0
    for cell in others:
        for trial in cell.trials:
            xs, ys = _curve(trial, plan.metric)
            axis.plot(xs, ys, color="0.8", linewidth=0.8, zorder=0)
            drawn += len(xs)
    for index, cell in enumerate(first):
        for trial in cell.trials:
            xs, ys = _curve(trial, plan.metric)
            axis.plot(xs, ys, color=f"C{index}", linewidth=0.7, alpha=0.35)
            drawn += len(xs)
        epochs, means = _mean_curve(cell, plan.metric)
        axis.plot(epochs, means, "o-", color=f"C{index}", linewidth=1.8, markersize=3, label=_cut(cell.label))
    if not drawn:
        return None
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_ylabel(f"{plan.metric}{unit_of(plan.metric)}", fontsize=9)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _curve(trial: Trial, metric: str) -> tuple[list[int], list[float]]:
    points = [(one.epoch, one.metrics[metric]) for one in trial.epochs if metric in one.metrics]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _mean_curve(cell: Cell, metric: str) -> tuple[list[int], list[float]]:
    """Over the epochs that all trials of the cell with any result have come to."""
    curves = [dict(zip(*_curve(trial, metric), strict=True)) for trial in cell.trials]
    curves = [curve for curve in curves if curve]
    if not curves:
        return [], []
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    return epochs, [statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs]


def parallel_figure(plan: Plan, found: Sequence[Cell]) -> Figure | None:
    """Draw a line for each trial through its searched values to its metric, coloured by it.

    Without axes to show it is None.
    """
    axes = plan.space.axes
    trials = [trial for cell in found for trial in cell.trials if trial.last(plan.metric) is not None]
    if not axes or len(trials) < 2:
        return None
    names = [*axes, *(["cell"] if len(plan.space.cells) > 1 else [])]
    scores = [trial.last(plan.metric) or 0.0 for trial in trials]
    low, high = min(scores), max(scores)
    columns = [_column(plan, name, trials) for name in names]
    columns.append((_scaled(scores, low, high), [(0.0, f"{low:.2f}"), (1.0, f"{high:.2f}")]))
    figure = Figure(figsize=(max(6.0, 1.9 * len(columns)), 4.4), layout="constrained")
    axis = figure.subplots()
    order = sorted(range(len(trials)), key=lambda index: plan.sign * scores[index])
    for place in order:
        share = (scores[place] - low) / ((high - low) or 1.0)
        axis.plot(
            range(len(columns)), [column[place] for column, _ in columns],
            color=MAP(share if plan.sign > 0 else 1 - share), linewidth=1.4, alpha=0.8,
        )  # fmt: skip
    for index, (_, ticks) in enumerate(columns):
        _axis_line(axis, index, ticks)
    titles = [name.partition(".")[2] or name for name in names]
    axis.set_xticks(range(len(columns)), [*titles, plan.metric], fontsize=9)
    axis.set_xlim(-0.3, len(columns) - 0.4)
    axis.set_ylim(-0.05, 1.05)
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    return figure


def _axis_line(axis: Axes, x: int, ticks: Sequence[tuple[float, str]]) -> None:
    axis.axvline(x, color="0.3", linewidth=0.8)
    for y, text in ticks:
        axis.text(
            x + 0.04, y, text, fontsize=7, va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )  # fmt: skip


def _column(plan: Plan, name: str, trials: Sequence[Trial]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1 of each trial's value, and (height, text) of the ticks."""
    if name == "cell":
        labels = sorted({trial.label for trial in trials})
        return _choices([trial.label for trial in trials], labels)
    axis = plan.space.axes[name]
    values: list[Any] = [trial.values[name] for trial in trials]
    if isinstance(axis, Choice):
        return _choices(values, axis.values)
    ticks = [(0.0, f"{axis.low:g}"), (1.0, f"{axis.high:g}")]
    if axis.log:
        return _scaled([math.log(value) for value in values], math.log(axis.low), math.log(axis.high)), ticks
    return _scaled(values, axis.low, axis.high), ticks


def _choices(values: Sequence[Any], known: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    steps = max(1, len(known) - 1)
    heights = {as_text(value): index / steps for index, value in enumerate(known)}
    return [heights[as_text(value)] for value in values], [(height, text) for text, height in heights.items()]


def _scaled(values: Sequence[float], low: float, high: float) -> list[float]:
    return [(value - low) / ((high - low) or 1.0) for value in values]
