"""A search's results as text: Markdown for people, CSV for programs, and the command that trains the best."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from typing import Any

from lape_ray.config import TrainConfig, flatten
from lape_ray.recipes import RECIPES, recipe
from lape_ray.search.ledger import Trial
from lape_ray.search.plan import Plan
from lape_ray.search.space import as_text
from lape_ray.search.statistics import Cell, unit_of
from lape_ray.storage import write_rows
from lape_ray.training.metrics import duration

HEADER = ("cell", "n", "mean", "sd", "against basic", "95 % interval", "epochs", "training", "state")


PAIRED = ("against basic", "95 % interval")


def table(plan: Plan, found: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Make the head, and a row of text for each point in the order of `found`.

    Differences have columns only where any are known.
    """
    whole = [HEADER, *((cell.label, *_numbers(plan, cell), *_state(cell)) for cell in found)]
    if any(cell.difference is not None for cell in found):
        return whole
    kept = [index for index, name in enumerate(HEADER) if name not in PAIRED]
    return [tuple(row[index] for index in kept) for row in whole]


def _numbers(plan: Plan, cell: Cell) -> tuple[str, ...]:
    if cell.estimate is None:
        values = [value for trial in cell.trials if (value := trial.last(plan.metric)) is not None]
        reached = f"({sum(values) / len(values):.2f})" if values else "–"
        return ("0", reached, "–", "–", "–")
    estimate, difference = cell.estimate, cell.difference
    sd = "–" if estimate.sd is None else f"{estimate.sd:.2f}"
    numbers = (str(estimate.n), f"{estimate.mean:.2f}", sd)
    if difference is None:
        return (*numbers, "–", "–")
    interval = difference.estimate.interval
    text = "–" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
    return (*numbers, f"{difference.estimate.mean:+.2f}", text)


def _state(cell: Cell) -> tuple[str, ...]:
    states = [trial.state for trial in cell.trials]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    many = len(states) > 1 and len(counts) > 1
    text = ", ".join(f"{count} {state}" if many else state for state, count in counts.items())
    return (str(cell.epochs), duration(sum(trial.seconds for trial in cell.trials)), text)


def markdown(plan: Plan, found: Sequence[Cell]) -> str:
    """Write the table in Markdown; a value in brackets is that of a trial which did not train to the end."""
    head, *body = table(plan, found)
    lines = [f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in (head, *body)]
    lines.insert(1, "|" + "---|" * len(head))
    return f"{plan.metric}{unit_of(plan.metric)} after the last epoch\n\n" + "\n".join(lines) + "\n"


def plain(plan: Plan, found: Sequence[Cell]) -> str:
    """Write the table in columns, for a terminal or a job's log."""
    whole = table(plan, found)
    widths = [max(len(text) for text in column) for column in zip(*whole, strict=True)]
    lines = []
    for row in whole:
        padded = [
            text.ljust(width) if name in ("cell", "state") else text.rjust(width)
            for name, text, width in zip(whole[0], row, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cells_csv(plan: Plan, found: Sequence[Cell]) -> str:
    """Write a line for each point, numbers with all their digits."""
    header = ["rank", "cell", "n", "failed", "mean", "sd", "low95", "high95", "reference", "difference",
              "difference_low95", "difference_high95", "epochs", *_fields(found)]  # fmt: skip
    lines = []
    for rank, cell in enumerate(found, 1):
        estimate, difference = cell.estimate, cell.difference
        low, high = (estimate.interval if estimate else None) or ("", "")
        d_low, d_high = (difference.estimate.interval if difference else None) or ("", "")
        values = cell.trials[0].values
        lines.append(
            [rank, cell.label, estimate.n if estimate else 0, cell.failed,
             estimate.mean if estimate else "", "" if not estimate or estimate.sd is None else estimate.sd, low, high,
             difference.reference if difference else "", difference.estimate.mean if difference else "",
             d_low, d_high, cell.epochs, *(as_text(values[name]) for name in _fields(found))]
        )  # fmt: skip
    return _csv(header, lines)


def trials_csv(plan: Plan, found: Sequence[Cell]) -> str:
    """Write a line for each trial, by its number."""
    header = ["trial", "cell", "seed", "state", "epochs", f"last {plan.metric}", f"best {plan.metric}", "seconds",
              "crashes", "error", "mlflow_run_id", "checkpoint", *_fields(found)]  # fmt: skip
    trials = sorted((trial for cell in found for trial in cell.trials), key=lambda trial: trial.number)
    lines = [
        [trial.number, trial.label, trial.seed, trial.state, trial.done, _blank(trial.last(plan.metric)),
         _blank(trial.best(plan.metric, plan.sign)), f"{trial.seconds:.1f}", trial.crashes, first_line(trial),
         trial.run_id, trial.checkpoint, *(as_text(trial.values[name]) for name in _fields(found))]
        for trial in trials
    ]  # fmt: skip
    return _csv(header, lines)


def _fields(found: Sequence[Cell]) -> list[str]:
    return list(found[0].trials[0].first) if found else []


def _blank(value: Any) -> Any:
    return "" if value is None else value


def first_line(trial: Trial) -> str:
    """Say what went wrong with a trial, in one line; "" where nothing did."""
    return trial.error.splitlines()[0] if trial.error else ""


def _csv(header: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO(newline="")
    write_rows(buffer, [header, *lines])
    return buffer.getvalue()


def command_line(config: TrainConfig) -> str:
    """Write the command that trains `config`: its recipe, and every option in which it differs from that."""
    known = config.recipe if config.recipe in RECIPES else "smoke"
    plain_config, wanted = flatten(recipe(known)), flatten(config)
    options = [
        f"--{name} {shlex.quote(as_text(value))}"
        for name, value in wanted.items()
        if value != plain_config[name] and name not in ("recipe", "run.name", "tracking.pages")
    ]
    return " ".join(["python jobs/imagenet_deit.py", known, *options])
