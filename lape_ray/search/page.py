"""The report of a search: tables and figures as files, and one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lape_ray.report.figures import save
from lape_ray.report.page import Page
from lape_ray.search.pictures import MOST_CELLS, MOST_CURVES, cells_figure, curves_figure, parallel_figure
from lape_ray.search.plan import Plan
from lape_ray.search.record import Trial
from lape_ray.search.statistics import Cell, in_words, unit_of
from lape_ray.search.tables import cells_csv, first_line, markdown, table, trials_csv
from lape_ray.training.metrics import duration

HTML = "search.html"


def write_report(
    plan: Plan, found: Sequence[Cell], folder: Path, *, command: str, best_command: str, cost: str
) -> Path:
    """Write page, figures and tables of a search into the folder; returns the page.

    `command` repeats the search, `best_command` trains its best config, `cost` says what it took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = [trial for cell in found for trial in cell.trials]
    page = Page(f"Search: {plan.name}", _subtitle(plan))
    page.facts(_headline(plan, found, trials))
    page.heading("What came out")
    for sentence in in_words(plan, found):
        page.text(sentence)
    if found and all(cell.difference is None for cell in found):
        page.note("No cell has a counterpart with join basic here, so that no paired difference is shown.")
    page.heading("Cells")
    page.note(
        f"{plan.metric}{unit_of(plan.metric)} after the last epoch, over seeds. In brackets: what a cell had come to "
        "whose trials were ended early. Against basic: mean of the differences, seed by seed, to the same cell with "
        "join basic."
    )
    head, *body = table(plan, found)
    page.table(head, body)
    if (figure := cells_figure(plan, found)) is not None:
        page.figure(
            save(figure, folder, "cells"),
            _limited("By cell, the best first", len(found), MOST_CELLS, "cells"),
        )
    if (figure := curves_figure(plan, found)) is not None:
        text = f"Learning curves: thick, the mean of a cell's seeds; the best {MOST_CURVES} cells in colour."
        page.figure(save(figure, folder, "curves"), text)
    if (figure := parallel_figure(plan, found)) is not None:
        text = "Each line is a trial: its settings, and on the right what it last came to; yellow is best."
        page.figure(save(figure, folder, "parallel"), text)
    _failures(page, trials)
    page.heading("Train the best")
    page.code(best_command)
    page.heading("Repeat the search")
    page.code(command)
    page.note(cost)
    page.heading("Every trial")
    page.table(
        ("trial", "cell", "seed", "state", "epochs", plan.metric, "training", "MLflow run"),
        [
            (trial.number, trial.label, trial.seed, trial.state, trial.done, _number(trial.last(plan.metric)),
             duration(trial.seconds), trial.run_id)
            for trial in sorted(trials, key=lambda trial: trial.number)
        ],
    )  # fmt: skip
    (folder / "table.md").write_text(markdown(plan, found))
    (folder / "cells.csv").write_text(cells_csv(plan, found))
    (folder / "trials.csv").write_text(trials_csv(plan, found))
    target = folder / HTML
    target.write_text(page.html())
    return target


def _subtitle(plan: Plan) -> str:
    axes = ", ".join(f"{name} {axis}" for name, axis in plan.space.axes.items())
    cells = f"{len(plan.space.cells)} cells" if len(plan.space.cells) > 1 else ""
    what = " x ".join(filter(None, (cells, axes)))
    return (
        f"space {plan.space_name} ({what}) over {plan.base.recipe or 'a config'}; points by {plan.sample}, schedule "
        f"{plan.schedule}, {plan.epochs} epochs, seeds {', '.join(map(str, plan.seeds))}"
    )


def _headline(plan: Plan, found: Sequence[Cell], trials: Sequence[Trial]) -> list[tuple[str, str]]:
    states = [trial.state for trial in trials]
    cards = [("trials", str(len(trials)))]
    cards += [
        (state, str(states.count(state))) for state in ("finished", "stopped", "failed") if state in states
    ]
    cards.append(("training, all trials", duration(sum(trial.seconds for trial in trials))))
    if found and found[0].estimate is not None:
        cards.insert(0, ("best cell", found[0].label))
        cards.insert(1, (f"its {plan.metric}", f"{found[0].estimate.mean:.2f}{unit_of(plan.metric)}"))
    return cards


def _failures(page: Page, trials: Sequence[Trial]) -> None:
    failed = [trial for trial in trials if trial.state == "failed"]
    if not failed:
        return
    page.heading("Failed trials")
    shown = [(each.number, each.label, each.seed, each.done, first_line(each)) for each in failed]
    page.table(("trial", "cell", "seed", "after epoch", "error"), shown)
    for trial in failed:
        if len(trial.error.splitlines()) > 1:
            page.note(f"trial {trial.number}")
            page.code(trial.error)


def _limited(text: str, count: int, most: int, what: str) -> str:
    return f"{text}; {most} of {count} {what}." if count > most else f"{text}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
