"""The robustness of networks on a page: one figure, one table, and a CSV file of every number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lape_ray.report import figures
from lape_ray.report.page import Page
from lape_ray.report.robustness import KINDS, RATIOS, Robustness, grid_of, input_name, relative_area
from lape_ray.storage.csv_rows import write_rows

CSV = "robustness.csv"
REFUSED = "×"
UNMEASURED = "–"
CSV_HEADER = ("network", "input", "height", "width", "top-1, %", "of own, %", "left out because")
TEXT = (
    "Top-1 on validation images whose input is not that of training, with the same weights. Every input is made from "
    "the file in one step, by evaluation's own resampling. Sizes show the same field of view. Parts fill the network's "
    "own size, so that what they show is larger, and lie at nine places of the images in turn. Shifts are cyclic, down "
    "and to the right by the same number of pixels. An aspect ratio shows the largest part of that ratio about the "
    "centre, undistorted, in about as many tokens as the network's own."
)
AREA = (
    "An area is that under top-1 over the logarithm of the size, divided by its width and by top-1 at the network's "
    f"own size: 100 where top-1 stays as it is, {UNMEASURED} where an end was not measured. {REFUSED}: the network "
    "cannot take this input; the lines below say why."
)


def write_robustness(page: Page, results: Sequence[Robustness], folder: Path) -> None:
    """Add the figure and the table to `page`, and write the figure and the CSV file into `folder`."""
    page.heading("Robustness to resolution, parts, shifts and aspect ratio")
    page.text(TEXT)
    for one in results:
        page.note(f"{one.label}: {one.images:,} images; {rule(one)}")
    page.figure(
        figures.save(robustness_figure(results), folder, "robustness"),
        f"Dotted: the input of training. {REFUSED} on the axis: a network cannot take this input.",
    )
    page.table(*robustness_table(results))
    page.text(AREA)
    for line in refusals(results):
        page.note(line)
    with (folder / CSV).open("w", newline="") as stream:
        write_rows(stream, csv_rows(results))


def rule(one: Robustness) -> str:
    """Say how position was fitted to other sizes."""
    names = dict.fromkeys(re.sub(r"\d+", "*", note.partition(" ")[0]) for note in one.resized)
    if len(one.sizes) < 2:
        return "no other size could be measured"
    return f"resized for other sizes: {', '.join(names) or 'nothing'}; all other position is computed for the grid"


def robustness_figure(results: Sequence[Robustness]) -> Figure:
    """Draw four panels of top-1: over size, over parts, over shift, and over aspect ratio."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    (sizes, crops), (shifts, ratios) = figure.subplots(2, 2)
    for axis, name, title, x in (
        (sizes, "sizes", "Size of the image", "side, px"),
        (crops, "crops", "Part of the image", "side of the part, % of the image's"),
        (shifts, "shifts", "Cyclic shift of the image", "shift, tokens"),
        (ratios, "ratios", "Aspect ratio", "width : height"),
    ):
        figures.curve_axes(axis, title, x, "top-1, %")
        for index, one in enumerate(results):
            _line(axis, one, name, index)
        axis.set_ylim(bottom=0)
    for axis in (sizes, ratios):
        axis.set_xscale("log", base=2)
    for size in {one.trained_size for one in results}:
        sizes.axvline(size, color="0.5", linestyle=":", linewidth=1)
    sizes.xaxis.set_major_locator(LogLocator(base=2, subs=[1, 1.5]))
    sizes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    crops.invert_xaxis()
    shifts.set_xscale("symlog", base=2, linthresh=1)
    shifts.set_xlim(left=0)
    shifts.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1, 1.5, *(2**k for k in range(1, 12))]))
    shifts.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ratios.xaxis.set_major_locator(FixedLocator(list(RATIOS)))
    ratios.xaxis.set_major_formatter(FuncFormatter(lambda value, _: RATIOS.get(value, "")))
    ratios.axvline(1, color="0.5", linestyle=":", linewidth=1)
    for axis in (sizes, shifts, ratios):
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
    figures.common_legend(figure, sizes, 8)
    return figure


def _line(axis: Axes, one: Robustness, name: str, index: int) -> None:
    unit = {"shifts": one.patch, "crops": 0.01}.get(name, 1)
    found = getattr(one, name)
    color, style = f"C{index % 10}", ("-", "--", ":")[index // 10 % 3]
    axis.plot(
        [value / unit for value in found], list(found.values()), style, marker="o", color=color, markersize=3,
        linewidth=1.5, label=one.label,
    )  # fmt: skip
    refused = [value / unit for kind, value in one.refused if kind == name]
    if refused:  # a line of no points that is not clipped has no place
        axis.plot(refused, [0] * len(refused), "x", color=color, markersize=6, clip_on=False, zorder=5)


def robustness_table(results: Sequence[Robustness]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Make header and rows: a row for each input, a column for each network, and the areas under the sizes' rows."""
    rows = []
    for name in KINDS:
        for value in _values(results, name):
            rows.append((input_name(name, value), *(_cell(one, name, value) for one in results)))
        if name == "sizes":
            for upwards, what in ((False, "smallest to own"), (True, "own to largest")):
                areas = [relative_area(one, upwards=upwards) for one in results]
                rows.append(
                    (f"area, {what} size", *(UNMEASURED if area is None else f"{area:.1f}" for area in areas))
                )
    return ("top-1, %", *(one.label for one in results)), rows


def _values(results: Iterable[Robustness], name: str) -> list[float]:
    """List the inputs of a kind that any network was tried at; parts from the whole image down."""
    found = {value for one in results for value in getattr(one, name)}
    found |= {value for one in results for kind, value in one.refused if kind == name}
    return sorted(found, reverse=name == "crops")


def _cell(one: Robustness, name: str, value: float) -> str:
    if (name, value) in one.refused:
        return REFUSED
    found = getattr(one, name)
    return f"{found[value]:.2f}" if value in found else UNMEASURED


def refusals(results: Iterable[Robustness]) -> list[str]:
    """Say why inputs were left out, in one line for those of a network that differ in numbers only."""
    lines = []
    for one in results:
        alike: dict[tuple[str, str], dict[float, str]] = {}
        for (name, value), why in one.refused.items():
            alike.setdefault((name, re.sub(r"[\d.]+", "#", why)), {})[value] = why
        for (name, _), found in alike.items():
            first, *more = found.values()
            lines.append(f"{one.label}, {input_name(name, *found)}: {'such as ' if more else ''}{first}")
    return lines


def csv_rows(results: Iterable[Robustness]) -> Iterator[tuple[object, ...]]:
    """Yield the header, and a row for every network and input."""
    yield CSV_HEADER
    for one in results:
        own = one.sizes[one.trained_size]
        for name in KINDS:
            for value in _values([one], name):
                top1, why = getattr(one, name).get(value), one.refused.get((name, value))
                share = None if top1 is None or not own else round(100 * top1 / own, 3)
                exact = None if top1 is None else round(top1, 4)
                yield (one.label, input_name(name, value), *_pixels(one, name, value), exact, share, why)


def _pixels(one: Robustness, name: str, value: float) -> tuple[float, float]:
    """Return the height and width of what the network reads."""
    if name == "sizes":
        return value, value
    if name == "ratios" and value != 1:
        rows, columns = grid_of(one.trained_size, one.patch, value)
        return rows * one.patch, columns * one.patch
    return one.trained_size, one.trained_size
