"""The record of `loader` as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lape_ray.bench.decoder import OURS, WHOLE
from lape_ray.bench.inputs import MARKERS
from lape_ray.bench.record import heading, ratio
from lape_ray.bench.table import Cell, middle, table

Row = Mapping[str, Any]


def report(record: Row) -> str:
    """Everything in `record`, the targets last; the text ends without a newline."""
    settings, sections = record["settings"], record["sections"]
    head = [
        heading(record),
        f"{record['images']['origin']}; crops of {settings['side']} pixels, batches of {settings['batch_size']}, "
        f"{settings['threads']} threads, {settings['rounds']} interleaved rounds, device {settings['device']}",
        "median (lowest to highest round); CPU time is user and system time of all threads and processes",
    ]
    parts = ["\n".join(head), _gate(sections["gate"]), _decoders(sections["decoder"], settings["threads"])]
    parts += [_loaders(sections["loader"]), _scaling(sections["scaling"]), _memory(sections["memory"])]
    parts += [_startup(sections["startup"]), _augmentation(sections["augmentation"])]
    parts += [_training(sections["training"])] if sections["training"] else []
    parts.append(targets_table(record["targets"]))
    return "\n\n".join(parts)


def _gate(rows: list[Row]) -> str:
    cells: list[list[Cell]] = [
        [row["name"], row["images"], f"{row['mean_error']:.4f}", row["max_error"]] for row in rows
    ]
    title = "Pixels: ours and Pillow's on the same crops, of 255 levels"
    return table(title, ["what", "images", "mean error", "largest"], cells)


def _decoders(rows: list[Row], threads: int) -> str:
    found = {(row["name"], row["input"]): row for row in rows if "missing" not in row}
    cells: list[list[Cell]] = []
    for row in rows:
        if "missing" in row:
            cells.append([row["name"], row["input"], None, f"not installed: {row['missing']}", *[None] * 4])
            continue
        plain = row["input"].removesuffix(MARKERS)
        ours, whole = found[OURS, plain + MARKERS], found.get((WHOLE, plain))
        cells.append(
            [
                row["name"],
                row["input"],
                f"{row['bytes'] / 1e3:.1f}",
                middle(row["cpu_ms"], 3),
                f"{row['cpu_ms_quiet']:.3f}",
                f"{ratio(row['cpu_ms'], ours['cpu_ms'])['median']:.2f}",
                f"{ratio(row['cpu_ms'], whole['cpu_ms'])['median']:.2f}" if whole else None,
                middle(row["images_per_second"], 0),
            ]
        )
    columns = ["decoder", "input", "kB", "CPU ms/image", "quiet", "over ours", "over bare decode"]
    title = "Decoders: random crops out of JPEGs in memory, one thread; over ours: CPU time over ours with markers"
    return table(title, [*columns, f"images/s, {threads} threads"], cells)


def _loaders(rows: list[Row]) -> str:
    cells: list[list[Cell]] = []
    for row in rows:
        if "missing" in row:
            cells.append([row["name"], row["input"], row["missing"], *[None] * 4])
            continue
        cells.append(
            [
                row["name"],
                row["input"],
                middle(row["cpu_ms"], 3),
                middle(row["cpu_over_ours"]),
                middle(row["images_per_second"], 0),
                middle(row["ours_over_images_per_second"]),
                row["images"],
            ]
        )
    columns = [
        "loader",
        "input",
        "CPU ms/image",
        "over ours",
        "images/s",
        "ours over it",
        "images of an epoch",
    ]
    title = (
        "Loaders: whole epochs of crops and flips, delivered to the device; peers read files without markers"
    )
    return table(title, columns, cells)


def _scaling(rows: list[Row]) -> str:
    cells: list[list[Cell]] = [
        [int(row["threads"]), middle(row["images_per_second"], 0), middle(row["over_one"])] for row in rows
    ]
    return table("Our loader's threads", ["threads", "images/s", "over 1 thread"], cells)


def _memory(rows: list[Row]) -> str:
    cells: list[list[Cell]] = [
        [
            row["name"],
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['epochs_growth_bytes'] / 1e6:+,.1f}",
            f"{row['exits_growth_bytes'] / 1e6:+,.1f}",
            row["threads_left"],
            row["epochs"],
        ]
        for row in rows
    ]
    columns = ["process", "peak MB", "growth, epochs MB", "growth, early exits MB", "threads left", "of each"]
    return table("Resident memory of a fresh process, mapped files not counted", columns, cells)


def _startup(rows: list[Row]) -> str:
    cells: list[list[Cell]] = []
    for row in rows:
        if "missing" in row:
            cells.append([row["name"], row["missing"], None, None])
        else:
            cells.append([row["name"], *(middle(row[key]) for key in ("import_s", "rest_s", "total_s"))])
    title = "Start of a process to its first batch, in seconds"
    return table(title, ["loader", "imports", "rest", "together"], cells)


def _augmentation(rows: list[Row]) -> str:
    cells: list[list[Cell]] = [
        [
            row["batch_size"],
            "kernels of our own" if row.get("fused") else "PyTorch's operators",
            middle(row["device_us"]),
            middle(row["host_us"]),
            middle(row["operators_us"]) if "operators_us" in row else None,
        ]
        for row in rows
    ]
    columns = ["batch", "with", "device", "CPU time of the host", "device, with PyTorch's operators"]
    return table("Augmentation of DeiT's recipe, microseconds of an image", columns, cells)


def _training(rows: list[Row]) -> str:
    keys = ("fed", "synthetic", "again")
    cells: list[list[Cell]] = [
        [
            row["name"],
            row["precision"],
            *(middle(row[key], 0) for key in keys),
            middle(row["fed_over_synthetic"], 3),
            middle(row["again_over_synthetic"], 3),
        ]
        for row in rows
    ]
    columns = ["recipe", "precision", "fed", "synthetic", "synthetic, again", "fed over", "again over"]
    return table(
        "Training steps fed by the loader and on one batch that stays there, images/s", columns, cells
    )


def targets_table(rows: list[Row]) -> str:
    """pass, miss or not measured, for each target."""
    cells: list[list[Cell]] = []
    for row in rows:
        want = f"{'>=' if row['at_least'] else '<='} {row['limit']:g} {row['unit']}".rstrip()
        if row["met"] is None:
            cells.append([row["name"], want, None, f"not measured ({row['missing']})"])
        else:
            cells.append([row["name"], want, f"{row['value']:.2f}", "pass" if row["met"] else "miss"])
    return table("Targets", ["target", "wanted", "measured", "result"], cells)
