"""The report of a search: tables for people and programs, figures, and one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lape_ray.config import write_value
from lape_ray.report.figures import save
from lape_ray.report.page import Page
from lape_ray.report.statistics import Estimate
from lape_ray.search.pictures import MOST_CELLS, MOST_CURVES, cells_figure, curves_figure, parallel_figure
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial, best_epoch
from lape_ray.search.statistics import Cell, in_words
from lape_ray.storage import write_rows
from lape_ray.training.metrics import duration

HTML = "search.html"


def write_report(
    plan: Plan, found: Sequence[Cell], folder: Path, *, command: str, best_command: str, cost: str
) -> Path:
    """Write page, figures and tables of a search into the folder; returns the page.

    `command` repeats the search, `best_command` trains its best config, `cost` says what it took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = sorted((trial for cell in found for trial in cell.trials), key=lambda trial: trial.number)
    page = Page(f"Search: {plan.name}", _subtitle(plan))
    page.facts(_headline(plan, found, trials))
    page.heading("What came out")
    for sentence in in_words(plan, found):
        page.text(sentence)
    if all(cell.difference is None for cell in found):
        page.note("No cell has a counterpart with join basic here, so that no paired difference is shown.")
    page.heading("Cells")
    page.note(
        f"{plan.metric}{plan.unit} after the last epoch, over seeds. In brackets: what a cell had come to whose trials "
        "were ended early. Against basic: mean of the differences, seed by seed, to the same cell with join basic."
    )
    _table(page, table(found))
    _figures(page, plan, found, folder)
    _failures(page, [trial for trial in trials if trial.state == "failed"])
    page.heading("Train the best")
    page.code(best_command)
    page.heading("Repeat the search")
    page.code(command)
    page.note(cost)
    page.heading("Every trial")
    _table(page, [
        {"trial": one.number, "cell": one.label, "seed": one.seed, "state": one.state, "epochs": one.done,
         plan.metric: _text(one.last(plan.metric)), "training": duration(one.seconds), "MLflow run": one.run_id}
        for one in trials
    ])  # fmt: skip
    (folder / "table.md").write_text(markdown(plan, found))
    write_csv(folder / "cells.csv", cell_rows(found))
    write_csv(folder / "trials.csv", trial_rows(plan, trials))
    (folder / HTML).write_text(page.html())
    return folder / HTML


def _subtitle(plan: Plan) -> str:
    axes = ", ".join(f"{name} {axis}" for name, axis in plan.space.axes.items())
    cells = f"{len(plan.space.cells)} cells" if len(plan.space.cells) > 1 else ""
    what = " x ".join(filter(None, (cells, axes)))
    return (
        f"space {plan.space_name} ({what}) over {plan.base.recipe or 'a config'}; points by {plan.sample}, schedule "
        f"{plan.schedule}, {plan.epochs} epochs, seeds {', '.join(map(str, plan.seeds))}"
    )


def _headline(plan: Plan, found: Sequence[Cell], trials: Sequence[Trial]) -> list[tuple[str, str]]:
    best, states = found[0], [trial.state for trial in trials]
    cards = [("trials", str(len(trials)))]
    if best.estimate is not None:
        value = f"{best.estimate.mean:.2f}{plan.unit}"
        cards = [("best cell", best.label), (f"its {plan.metric}", value), *cards]
    cards += [
        (state, str(states.count(state))) for state in ("finished", "stopped", "failed") if state in states
    ]
    return [*cards, ("training, all trials", duration(sum(trial.seconds for trial in trials)))]


def _figures(page: Page, plan: Plan, found: Sequence[Cell], folder: Path) -> None:
    limited = f"; {MOST_CELLS} of {len(found)} cells" if len(found) > MOST_CELLS else ""
    drawn = {
        "cells": (cells_figure, f"By cell, the best first{limited}."),
        "curves": (
            curves_figure,
            f"Learning curves: thick, the mean of a cell's seeds; the best {MOST_CURVES} cells in colour.",
        ),
        "parallel": (
            parallel_figure,
            "Each line is a trial: its settings, and on the right what it last came to; yellow is best.",
        ),
    }
    for name, (draw, caption) in drawn.items():
        if (figure := draw(plan, found)) is not None:
            page.figure(save(figure, folder, name), caption)


def _failures(page: Page, failed: Sequence[Trial]) -> None:
    if not failed:
        return
    page.heading("Failed trials")
    _table(page, [
        {"trial": one.number, "cell": one.label, "seed": one.seed, "after epoch": one.done, "error": one.reason}
        for one in failed
    ])  # fmt: skip
    for trial in failed:
        if trial.error != trial.reason:
            page.note(f"trial {trial.number}")
            page.code(trial.error)


# --- tables: rows of column -> value --------------------------------------------------------------------------------


def table(found: Sequence[Cell]) -> list[dict[str, str]]:
    """Make a row of text for each cell, as people read it; differences have columns only where any are known.

    A value in brackets is that of trials which did not train to the end.
    """
    compared = any(cell.difference is not None for cell in found)
    rows = []
    for cell in found:
        reached = "–" if cell.reached is None else f"({cell.reached:.2f})"
        one = {"n": "0", "mean": reached, "sd": "–"}
        if cell.estimate is not None:
            one = {
                "n": str(cell.estimate.n),
                "mean": _text(cell.estimate.mean),
                "sd": _text(cell.estimate.sd),
            }
        if compared:
            low_high = cell.difference and cell.difference.interval
            one["against basic"] = f"{cell.difference.mean:+.2f}" if cell.difference else "–"
            one["95 % interval"] = "{:+.2f} to {:+.2f}".format(*low_high) if low_high else "–"
        took = duration(sum(trial.seconds for trial in cell.trials))
        rows.append(
            {"cell": cell.label, **one, "epochs": str(cell.epochs), "training": took, "state": _states(cell)}
        )
    return rows


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _states(cell: Cell) -> str:
    states = [trial.state for trial in cell.trials]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    return ", ".join(f"{count} {state}" if len(counts) > 1 else state for state, count in counts.items())


def _table(page: Page, rows: Sequence[dict[str, Any]]) -> None:
    page.table(list(rows[0]), [list(row.values()) for row in rows])


def markdown(plan: Plan, found: Sequence[Cell]) -> str:
    """Write the table in Markdown; a value in brackets is that of a trial which did not train to the end."""
    rows = table(found)
    head, *body = (
        [text.replace("|", "/") for text in row] for row in (rows[0], *(row.values() for row in rows))
    )
    lines = [f"| {' | '.join(row)} |" for row in (head, *body)]
    lines.insert(1, "|" + "---|" * len(head))
    return f"{plan.metric}{plan.unit} after the last epoch\n\n" + "\n".join(lines) + "\n"


def plain(found: Sequence[Cell]) -> str:
    """Write the table in columns, for a terminal or a job's log."""
    rows = table(found)
    rows.insert(0, {name: name for name in rows[0]})
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    sides = {name: "<" if name in ("cell", "state") else ">" for name in widths}
    lines = ("  ".join(f"{text:{sides[name]}{widths[name]}}" for name, text in row.items()) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def cell_rows(found: Sequence[Cell]) -> list[dict[str, Any]]:
    """Make a row for each cell, numbers with all their digits."""
    rows = []
    for rank, cell in enumerate(found, 1):
        n, mean, sd, low, high = _numbers(cell.estimate)
        _, difference, _, difference_low, difference_high = _numbers(cell.difference)
        reference = None if cell.difference is None else cell.reference[0].label
        rows.append({
            "rank": rank, "cell": cell.label, "n": n, "failed": cell.failed, "mean": mean, "sd": sd, "low95": low,
            "high95": high, "reference": reference, "difference": difference, "difference_low95": difference_low,
            "difference_high95": difference_high, "epochs": cell.epochs, **_settings(cell.trials[0]),
        })  # fmt: skip
    return rows


def _numbers(one: Estimate | None) -> tuple[float | None, ...]:
    return (
        (0, None, None, None, None)
        if one is None
        else (one.n, one.mean, one.sd, *(one.interval or (None, None)))
    )


def trial_rows(plan: Plan, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Make a row for each trial, numbers with all their digits."""
    rows = []
    for one in trials:
        best = best_epoch(one.epochs, plan.metric, plan.sign)
        rows.append({
            "trial": one.number, "cell": one.label, "seed": one.seed, "state": one.state, "epochs": one.done,
            f"last {plan.metric}": one.last(plan.metric),
            f"best {plan.metric}": None if best is None else best.metrics[plan.metric],
            "seconds": f"{one.seconds:.1f}", "crashes": one.crashes, "error": one.reason, "mlflow_run_id": one.run_id,
            "checkpoint": one.checkpoint, **_settings(one),
        })  # fmt: skip
    return rows


def _settings(trial: Trial) -> dict[str, str]:
    return {name: write_value(value) for name, value in trial.values.items()}


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with file.open("w", newline="") as stream:
        write_rows(stream, [rows[0].keys(), *(row.values() for row in rows)])
