"""The records of `step`, `compare`, `ray` and `checkpoint` as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lape_ray.bench.loader_report import targets_table
from lape_ray.bench.record import heading
from lape_ray.bench.table import Cell, middle, table

Row = Mapping[str, Any]
ROUNDS = "median (lowest to highest round)"


def step_report(record: Row) -> str:
    """Ceilings, steps, the costliest kernels where there are any, targets."""
    sections, settings = record["sections"], record["settings"]
    columns = ["model", "batch", "mode", "images/s", "ms/step", "MFU, matmul", "MFU, data sheet", "peak MB",
               "operators", "kernels", "first step s"]  # fmt: skip
    cells = [
        _or_missing(
            [row["model"], row["batch_size"], _mode(row)],
            row,
            lambda row: [
                middle(row["images_per_second"], 1),
                middle(_scaled(row["step_s"], 1e3), 1),
                _percent(row["mfu_measured"]),
                _percent(row["mfu_datasheet"]),
                None if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}",
                row.get("operators"),
                row.get("kernels"),
                None if row["first_step_s"] is None else f"{row['first_step_s']:.1f}",
            ],
            len(columns),
        )
        for row in sections["step"]
    ]
    title = (
        f"Training steps of our loop, join {settings['join']}: forward, backward, optimizer, moving average"
    )
    parts = [_head(record), _ceilings(sections["ceilings"]), table(title, columns, cells)]
    for row in sections["step"]:
        if row.get("attention"):
            kernels = "\n".join(f"  {name}" for name in row["attention"])
            parts.append(
                f"Attention kernels of {row['model']}, batch {row['batch_size']}, {_mode(row)}:\n{kernels}"
            )
    return _joined(parts, record)


def compare_report(record: Row) -> str:
    """The gate, times, ratios, memory, targets."""
    sections = record["sections"]
    gate = table(
        "Same weights, logits and gradients: distance from our network in float64, relative",
        ["model", "contender", "precision", "logits", "worst gradient", "of"],
        [
            _or_missing(
                [row["model"], row["name"]],
                row,
                lambda row: [
                    row["precision"],
                    f"{row['logits']:.1e}",
                    f"{row['gradient']:.1e}",
                    row["worst"],
                ],
                6,
            )
            for row in sections["gate"]
        ],
    )
    columns = ["model", "contender", "images/s", "ms/step", "CPU ms/step", "first step s", "mean loss"]
    times = table(
        "The same loop around every network; rounds interleaved, there and back",
        columns,
        [
            _or_missing(
                [row["model"], row["name"]],
                row,
                lambda row: [
                    middle(row["images_per_second"], 1),
                    middle(_scaled(row["step_s"], 1e3), 1),
                    middle(_scaled(row["cpu_s"], 1e3), 1),
                    f"{row['first_step_s']:.1f}",
                    f"{row['loss']:.3f}",
                ],
                len(columns),
            )
            for row in sections["compare"]
        ],
    )
    ratios = table(
        "Time over time, round by round; the first of each model is what a ratio is uncertain by",
        ["model", "time of", "over", "ratio", "of"],
        [
            _or_missing(
                [row["model"], row["over"], row["under"]],
                row,
                lambda row: [middle(row["ratio"], 3), "CPU time" if row["of"] == "cpu_s" else "time"],
                5,
            )
            for row in sections["ratios"]
        ],
    )
    over = {(row["model"], row["name"]): row["over_explicit"] for row in sections["memory_ratios"]}
    memory = table(
        "The most memory that tensors hold in a step, each in a fresh process",
        ["model", "contender", "MB", "over explicit softmax"],
        [
            _or_missing(
                [row["model"], row["name"]],
                row,
                lambda row: [
                    f"{row['peak_bytes'] / 1e6:,.0f}",
                    f"{over[row['model'], row['name']]:.3f}" if (row["model"], row["name"]) in over else None,
                ],
                4,
            )
            for row in sections["memory"]
        ],
    )
    return _joined([_head(record), gate, times, ratios, memory], record)


def ray_report(record: Row) -> str:
    """Steps, start-up, report(), targets."""
    sections, settings = record["sections"], record["settings"]
    steps = table(
        f"{settings['model']}, {settings['workers']} processes of {settings['threads']} thread(s), "
        f"batch {settings['batch_size']} each, {settings['steps']} steps a round",
        ["launcher", "ms/step", "CPU ms/step", "start-up s", "threads"],
        [
            [
                row["name"],
                middle(_scaled(row["step_s"], 1e3), 3),
                middle(_scaled(row["cpu_s"], 1e3), 3),
                middle(row["startup_s"], 1),
                row["threads"],
            ]
            for row in sections["steps"]
        ],
    )
    ratios = table(
        "Ray Train over torchrun, round by round",
        ["", "ratio"],
        [["time of a step", middle(sections["ratios"][0]["step_s"], 3)],
         ["CPU time of a step", middle(sections["ratios"][0]["cpu_s"], 3)]],
    )  # fmt: skip
    report = table(
        "One report() of metrics, without a checkpoint, by rank 0",
        ["calls", "ms"],
        [[row["calls"], middle(row["report_ms"], 2)] for row in sections["report"]],
    )
    return _joined([_head(record), steps, ratios, report], record)


def checkpoint_report(record: Row) -> str:
    """Sizes and times."""
    columns = ["model", "MB", "copy s", "on disk after s", "restore s"]
    title = "Checkpoints: training waits for `copy`; restored states were compared bit for bit"
    cells: list[list[Cell]] = [
        [
            row["model"],
            f"{row['bytes'] / 1e6:,.1f}",
            middle(row["copy_s"], 3),
            middle(row["save_s"], 3),
            middle(row["restore_s"], 3),
        ]
        for row in record["sections"]["checkpoint"]
    ]
    return _joined([_head(record), table(title, columns, cells)], record)


def _head(record: Row) -> str:
    settings = record["settings"]
    threads = "" if settings["device"].startswith("cuda") else f", {settings['threads']} thread(s)"
    rounds = f"{settings['rounds']} rounds" if "rounds" in settings else ""
    return f"{heading(record)}\ndevice {settings['device']}{threads}, {rounds}; {ROUNDS}"


def _joined(parts: list[str], record: Row) -> str:
    return "\n\n".join(parts + ([targets_table(record["targets"])] if record["targets"] else []))


def _ceilings(rows: list[Row]) -> str:
    cells: list[list[Cell]] = [
        [
            f"{row['side']}^3 {row['precision']}",
            middle(_scaled(row["matmul_flops"], 1e-12), 3),
            middle(_scaled(row["copy_bytes"], 1e-9), 1),
        ]
        for row in rows
    ]
    return table("Ceilings, measured with random values", ["matmul", "TFLOP/s", "copy GB/s"], cells)


def _or_missing(head: Sequence[Cell], row: Row, rest: Any, width: int) -> list[Cell]:
    if "missing" in row:
        return [*head, row["missing"], *[None] * (width - len(head) - 1)]
    return [*head, *rest(row)]


def _mode(row: Row) -> str:
    mode = "eager" if row["compile"] == "off" else f"compiled ({row['compile']})"
    return mode + (", one graph" if row.get("cuda_graph") else "")


def _scaled(value: Row, factor: float) -> dict[str, float]:
    return {name: value[name] * factor for name in ("median", "low", "high")}


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"
