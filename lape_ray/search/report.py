"""The report of a search: tables for people and programs, figures, and one HTML page that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lape_ray.config import write_value
from lape_ray.report.figures import save
from lape_ray.report.page import Page
from lape_ray.report.statistics import Estimate
from lape_ray.search.pictures import (
    MOST_CELLS,
    MOST_CURVES,
    cells_figure,
    curves_figure,
    differences_figure,
    parallel_figure,
)
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial, best_epoch
from lape_ray.search.statistics import Cell, in_words, trials_of
from lape_ray.storage import write_rows
from lape_ray.training.metrics import duration

HTML = "search.html"
Row = dict[str, Any]


def write_report(
    plan: Plan, found: Sequence[Cell], folder: Path, *, command: str, best_command: str, cost: str
) -> Path:
    """Write page, figures and tables of a search into the folder; returns the page.

    `command` repeats the search, `best_command` trains its best config, `cost` says what it took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = trials_of(found)
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
    what = [f"{len(plan.space.cells)} cells"] if len(plan.space.cells) > 1 else []
    if plan.space.axes:
        what.append(", ".join(f"{name} {axis}" for name, axis in plan.space.axes.items()))
    return (
        f"space {plan.space_name} ({' x '.join(what)}) over {plan.base.recipe or 'a config'}; points by {plan.sample}, "
        f"schedule {plan.schedule}, {plan.epochs} epochs, seeds {', '.join(map(str, plan.seeds))}"
    )


def _headline(plan: Plan, found: Sequence[Cell], trials: Sequence[Trial]) -> list[tuple[str, str]]:
    best, states = found[0], Counter(trial.state for trial in trials)
    cards = [("trials", str(len(trials)))]
    if best.estimate is not None:
        value = f"{best.estimate.mean:.2f}{plan.unit}"
        cards = [("best cell", best.label), (f"its {plan.metric}", value), *cards]
    cards += [(state, str(states[state])) for state in ("finished", "stopped", "failed") if states[state]]
    return [*cards, ("training, all trials", duration(sum(trial.seconds for trial in trials)))]


def _figures(page: Page, plan: Plan, found: Sequence[Cell], folder: Path) -> None:
    limited = f"; {MOST_CELLS} of {len(found)} cells" if len(found) > MOST_CELLS else ""
    best = f"the best {MOST_CURVES} cells in colour"
    for name, draw, caption in (
        ("cells", cells_figure, f"By cell, the best first{limited}."),
        ("differences", differences_figure, "Each cell against the same with join basic, seed by seed."),
        ("curves", curves_figure, f"Learning curves: thick, the mean of a cell's seeds; {best}."),
        ("parallel", parallel_figure,
         "Each line is a trial: its settings, and on the right what it last came to; yellow is best."),
    ):  # fmt: skip
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
        n, mean, sd, _, _ = _numbers(cell.estimate)
        row = {"cell": cell.label, "n": str(n), "mean": _text(mean), "sd": _text(sd)}
        if cell.estimate is None and cell.reached is not None:
            row["mean"] = f"({cell.reached:.2f})"
        if compared:
            _, difference, _, low, high = _numbers(cell.difference)
            row["against basic"] = "–" if difference is None else f"{difference:+.2f}"
            row["95 % interval"] = "–" if low is None else f"{low:+.2f} to {high:+.2f}"
        states = Counter(trial.state for trial in cell.trials)
        several = [f"{count} {state}" for state, count in states.items()]
        row |= {"epochs": str(cell.epochs), "training": duration(sum(trial.seconds for trial in cell.trials)),
                "state": ", ".join(several if len(states) > 1 else states)}  # fmt: skip
        rows.append(row)
    return rows


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(page: Page, rows: Sequence[Row]) -> None:
    page.table(list(rows[0]), [list(row.values()) for row in rows])


def markdown(plan: Plan, found: Sequence[Cell]) -> str:
    """Write the table in Markdown; a value in brackets is that of a trial which did not train to the end."""
    rows = table(found)
    lines = [[text.replace("|", "/") for text in row] for row in (rows[0], *(row.values() for row in rows))]
    lines.insert(1, ["---"] * len(rows[0]))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{plan.metric}{plan.unit} after the last epoch\n\n{text}\n"


def plain(found: Sequence[Cell]) -> str:
    """Write the table in columns, for a terminal or a job's log."""
    rows = table(found)
    rows.insert(0, {name: name for name in rows[0]})
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    sides = {name: "<" if name in ("cell", "state") else ">" for name in widths}
    lines = ("  ".join(f"{text:{sides[name]}{widths[name]}}" for name, text in row.items()) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def cell_rows(found: Sequence[Cell]) -> list[Row]:
    """Make a row for each cell, numbers with all their digits."""
    rows = []
    for rank, cell in enumerate(found, 1):
        n, mean, sd, low, high = _numbers(cell.estimate)
        _, difference, _, difference_low, difference_high = _numbers(cell.difference)
        reference = cell.difference and cell.reference and cell.reference.label
        failed = sum(trial.state == "failed" for trial in cell.trials)
        rows.append({
            "rank": rank, "cell": cell.label, "n": n, "failed": failed, "mean": mean, "sd": sd, "low95": low,
            "high95": high, "reference": reference, "difference": difference, "difference_low95": difference_low,
            "difference_high95": difference_high, "epochs": cell.epochs, **_settings(cell.trials[0]),
        })  # fmt: skip
    return rows


def _numbers(one: Estimate | None) -> tuple[float | None, ...]:
    if one is None:
        return 0, None, None, None, None
    return one.n, one.mean, one.sd, *(one.interval or (None, None))


def trial_rows(plan: Plan, trials: Sequence[Trial]) -> list[Row]:
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


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    with file.open("w", newline="") as stream:
        write_rows(stream, [rows[0].keys(), *(row.values() for row in rows)])
