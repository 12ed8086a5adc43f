"""The figures of a report, by matplotlib without a display. Each function takes numbers and returns a Figure.

Shapes: L layers, H heads, N tokens, P patches, C classes that are shown.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation
from torch import Tensor

from lape_ray.report.goodput import PARTS, Division
from lape_ray.report.position import PositionView
from lape_ray.training.metrics import duration
from lape_ray.training.times import STEPS

CELL_IN = 1.25  # side of a small map, in inches
MAP_DPI = 120  # of PNGs and of the maps inside SVGs
TITLE_PT = 11
NAME_PT = 8  # of rows, axes and the colour bar
LEFT_IN = 1.5  # for the row's name
PAD_IN = 0.08  # around all that is drawn
POINTS_PER_IN = 72
LINE = 1.2  # distance of lines of text, in font sizes
BAR = 0.9  # of the maps' height
LEGEND_SHARE = 0.25  # of a panel that its legend may hide
MAP = matplotlib.colormaps["RdBu_r"].with_extremes(bad="0.85")
CORRELATION = "cosine similarity (grey: a row of zeros)"


def svg(figure: Figure) -> bytes:
    """Write the figure as SVG, equal for equal figures: no date, no random names."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lape_ray"}):
        _write(figure, buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _write(figure: Figure, target: Path | io.BytesIO, **options: Any) -> None:
    """Write all that is drawn, also what does not fit into the figure's size, and a margin."""
    figure.savefig(target, dpi=MAP_DPI, bbox_inches="tight", pad_inches=PAD_IN, **options)


def save(figure: Figure, folder: Path, name: str) -> bytes:
    """Write `name.png` and `name.svg` into the folder; returns the SVG."""
    drawing = svg(figure)
    (folder / f"{name}.svg").write_bytes(drawing)
    _write(figure, folder / f"{name}.png")
    return drawing


def _wrap(text: str, inches: float, size: float) -> str:
    """Break each line of `text`, set in `size` points, into lines that are no longer than `inches`."""
    return "\n".join(part for line in text.split("\n") for part in _parts(line, inches, size))


def _parts(line: str, inches: float, size: float) -> list[str]:
    font = FontProperties(size=size)

    def fits(part: str) -> bool:
        width, _, _ = text_to_path.get_text_width_height_descent(part, font, ismath=False)
        return width <= inches * POINTS_PER_IN

    tries = (textwrap.wrap(line, characters) for characters in range(len(line), 1, -1))
    return next((parts for parts in tries if all(map(fits, parts))), [line])


def _extra(text: str, size: float) -> float:
    """Return the inches that the lines of `text` after its first one need."""
    return text.count("\n") * size * LINE / POINTS_PER_IN


def _grid(rows: int, columns: int, *, title: str, names: Sequence[str], colors: str) -> tuple[Figure, Any]:
    """Make the axes and the title of maps, with room for lines of the title, of the rows' names and of the bar."""
    width = LEFT_IN + columns * CELL_IN + 1.0 + _extra(colors, NAME_PT)
    width += max(_extra(name, NAME_PT) for name in names)
    title = _wrap(title, width, TITLE_PT)
    height = 0.75 + rows * (CELL_IN + 0.12) + _extra(title, TITLE_PT)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=TITLE_PT)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)  # until something is drawn on it
    return figure, axes


def _show(axis: Axes, image: Tensor, low: float, high: float) -> Any:
    axis.set_visible(True)
    axis.tick_params(labelsize=7, length=2)
    return axis.imshow(image.cpu().numpy(), cmap=MAP, vmin=low, vmax=high, interpolation="auto")


def _ticks(axis: Axes, rows: int, columns: int, *, left: bool, bottom: bool) -> None:
    """Set ticks at the first and last index, on the outer axes only."""
    axis.set_xticks([0, columns - 1] if bottom else [])
    axis.set_yticks([0, rows - 1] if left else [])


def maps_figure(
    named: Sequence[tuple[str, Tensor | Sequence[Tensor]]],
    *,
    title: str,
    x: str,
    y: str,
    colors: str,
    limit: float | None = 1.0,
    marks: Sequence[tuple[int, int] | None] = (),
    firsts: Sequence[int] = (),
) -> Figure:
    """Draw a row of maps (rows, columns) for each name, one a layer, all on one colour scale.

    The scale is symmetric: -limit to limit, or the largest absolute value of all maps where `limit` is None.
    `marks` are the (row, column) to frame in each name's maps, `firsts` how many layers lie before each name's; by
    default none.
    """
    depth = max(len(maps) for _, maps in named)
    firsts = firsts or [0] * len(named)
    if limit is None:
        limit = max(float(one.nan_to_num().abs().max()) for _, maps in named for one in maps) or 1.0
    names = [_wrap(name, CELL_IN, NAME_PT) for name, _ in named]
    colors = _wrap(colors, BAR * CELL_IN * len(named), NAME_PT)
    figure, axes = _grid(len(named), depth, title=title, names=names, colors=colors)
    image = None
    for index, (_, maps) in enumerate(named):
        for layer, map_YX in enumerate(maps):
            axis = axes[index, layer]
            image = _show(axis, map_YX, -limit, limit)
            last = index == len(named) - 1 or layer >= len(named[index + 1][1])
            _ticks(axis, *map_YX.shape, left=layer == 0, bottom=last)
            under = index > 0 and layer < len(named[index - 1][1]) and firsts[index - 1] == firsts[index]
            if not under:
                axis.set_title(f"layer {firsts[index] + layer + 1}", fontsize=9)
            if layer == 0:
                axis.set_ylabel(f"{names[index]}\n{y}", fontsize=NAME_PT)
            if last:
                axis.set_xlabel(x, fontsize=NAME_PT)
            if index < len(marks) and (mark := marks[index]) is not None:
                corner = (mark[1] - 0.5, mark[0] - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1))
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=BAR, aspect=12 * len(named), pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(colors, fontsize=NAME_PT)
    return figure


def _given(part: Tensor | None) -> Tensor:
    assert part is not None
    return part


def token_figure(views: Sequence[PositionView], token: tuple[int, int] | None) -> Figure | None:
    """Draw the correlation of one patch's embedding with every patch's; None where no view has a token embedding."""
    shown = [one for one in views if one.correlation_LNN is not None]
    if not shown:
        return None
    patches = [one.patch(token) for one in shown]
    return maps_figure(
        [(one.label, _given(one.correlation_maps(patch))) for one, patch in zip(shown, patches, strict=True)],
        title="Position embedding of the framed patch against every patch, as attention sees it",
        x="column", y="row", colors=CORRELATION, firsts=[one.first_layer for one in shown],
        marks=[divmod(patch, one.grid[1]) for one, patch in zip(shown, patches, strict=True)],
    )  # fmt: skip


def class_figure(views: Sequence[PositionView]) -> Figure | None:
    """Draw the correlation of the class token's embedding with every patch's, if any.

    With a distillation token its correlation is drawn too.
    """
    named = [
        (one.label if one.num_prefix == 1 else f"{one.label}\n{name}", maps_LYX)
        for one in views
        for name, maps_LYX in one.prefix_maps().items()
    ]
    title = "Position embedding of the class token against every patch, as attention sees it"
    if not named:
        return None
    return maps_figure(named, title=title, x="column", y="row", colors=CORRELATION)


def matrix_figure(views: Sequence[PositionView]) -> Figure | None:
    """Draw the correlation of all tokens with all tokens; None where no view has a token embedding."""
    shown = [one for one in views if one.correlation_LNN is not None]
    if not shown:
        return None
    return maps_figure(
        [(one.label, _given(one.correlation_LNN)) for one in shown],
        title="Position embedding of every token against every token, as attention sees it (prefix tokens first)",
        x="token", y="token", colors=CORRELATION, firsts=[one.first_layer for one in shown],
    )  # fmt: skip


def bias_figure(one: PositionView, token: tuple[int, int] | None) -> Figure | None:
    """Draw what is added to one query patch's logits for every key patch; None where nothing is.

    It has a row for each head and a column for each layer.
    """
    if one.bias_LHPP is None:
        return None
    heads = [
        (f"head {head + 1}", one.window_maps(one.bias_LHPP[:, head], token))
        for head in range(one.bias_LHPP.shape[1])
    ]
    return maps_figure(
        heads,
        title=f"{one.label}: bias on the attention logits of the framed patch",
        x="column", y="row", colors="added to the logit", limit=None,
        marks=[one.place_in_window(token)] * len(heads), firsts=[one.first_layer] * len(heads),
    )  # fmt: skip


def rotation_figure(views: Sequence[PositionView], token: tuple[int, int] | None) -> Figure | None:
    """Draw how far a rotation turns every key against one query; None where no view rotates."""
    shown = [one for one in views if one.rotation_LPP is not None]
    if not shown:
        return None
    return maps_figure(
        [(one.label, one.window_maps(_given(one.rotation_LPP), token)) for one in shown],
        title="Rotation of every key against the framed query",
        x="column", y="row", colors="mean cosine of the angle",
        marks=[one.place_in_window(token) for one in shown], firsts=[one.first_layer for one in shown],
    )  # fmt: skip


def curve_axes(axis: Axes, title: str, x: str, y: str) -> None:
    """Name the axes of a panel of curves over layers, epochs or pixels."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    # Layers, epochs and pixels are whole, also where there is one of them only.
    axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _legends(figure: Figure, panels: Sequence[Axes], size: float) -> None:
    """Add a legend, its text in `size` points, to each panel: inside, or below where it would hide much of it."""
    figure.draw_without_rendering()  # before it nothing has a place
    below, room = [], 0.0
    for panel in panels:
        frame = panel.get_window_extent()
        handles, names = panel.get_legend_handles_labels()
        names = [_wrap(name, 0.8 * frame.width / figure.dpi, size) for name in names]
        legend = panel.legend(handles, names, fontsize=size)
        box = legend.get_window_extent()
        if box.width * box.height > LEGEND_SHARE * frame.width * frame.height:
            under_label = panel.xaxis.label.get_window_extent().y0 - frame.y0
            below.append((legend, panel, under_label / figure.dpi))
            room = max(room, box.height / figure.dpi)
    for legend, panel, drop in below:
        under = panel.transAxes + ScaledTranslation(0, drop, figure.dpi_scale_trans)
        legend.set_loc("upper center")
        legend.set_bbox_to_anchor((0.5, 0), under)
    figure.set_figheight(figure.get_figheight() + room)


def strength_figure(views: Sequence[PositionView]) -> Figure | None:
    """Draw two panels over layers: length of position over length of token, and the attention that position moves."""
    measured = [(one, one.strength) for one in views if one.strength is not None]
    if not measured:
        return None
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (one, strength) in enumerate(measured):
        for axis, values_LN in ((left, strength.norm_ratio_LN), (right, strength.moved_LN)):
            if values_LN is None:
                continue
            layers = range(one.first_layer + 1, one.first_layer + len(values_LN) + 1)
            patches_L = values_LN[:, one.num_prefix :].mean(1)
            axis.plot(layers, patches_L, "o-", color=f"C{index}", markersize=4, label=f"{one.label}, patches")
            for token, (name, style) in enumerate(zip(one.prefix, ("s--", "^:"), strict=False)):
                axis.plot(
                    layers, values_LN[:, token], style, color=f"C{index}", markersize=3, alpha=0.7,
                    label=f"{one.label}, {name}",
                )  # fmt: skip
    curve_axes(left, "Position part over token part", "layer", "ratio of lengths")
    # Logarithmic: an untrained class token is next to nothing, and would press all else to the floor. A decade to each
    # side at least: what is nearly 1 everywhere must look like it.
    left.set_yscale("log")
    low, high = left.get_ylim()
    left.set_ylim(min(low, 0.1), max(high, 10))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.axhline(1, color="0.5", linewidth=1)
    curve_axes(right, "Attention that position moves", "layer", "share of attention weight")
    right.set_ylim(bottom=0)
    _legends(figure, [right], 7)
    return figure


def curves_figure(
    panels: Sequence[tuple[str, str, str, Sequence[tuple[str, Sequence[float], Sequence[float]]]]],
) -> Figure:
    """Draw panels side by side, each (title, x, y, [(name, xs, ys), ...])."""
    figure = Figure(figsize=(5.5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, x, y, lines) in zip(axes, panels, strict=True):
        curve_axes(axis, title, x, y)
        for name, xs, ys in lines:
            axis.plot(xs, ys, "o-" if len(xs) < 60 else "-", markersize=3, linewidth=1.5, label=name)
    _legends(figure, [axis for axis in axes if len(axis.lines) > 1], 8)
    return figure


def time_figure(division: Division) -> Figure:
    """Draw a bar for each part of a run's wall time that it has, with its share and length."""
    parts = [(PARTS[part], seconds) for part, seconds in division.seconds.items() if seconds > 0]
    figure = Figure(figsize=(9, 0.9 + 0.3 * len(parts)), layout="constrained")
    axis = figure.subplots()
    shares = [100 * seconds / division.wall_s for _, seconds in parts]
    colors = ["#1a7f37" if name == PARTS[STEPS] else "#8c959f" for name, _ in parts]
    bars = axis.barh([name for name, _ in parts], shares, color=colors)
    texts = [f"{share:.1f} %  {_brief(seconds)}" for share, (_, seconds) in zip(shares, parts, strict=True)]
    axis.bar_label(bars, texts, fontsize=8, padding=4)
    axis.set_xlim(0, 118)  # with room for the text behind the longest bar
    axis.set_xticks(range(0, 101, 20))
    axis.invert_yaxis()
    axis.set_title(f"{duration(division.wall_s)} of wall time", fontsize=10)
    axis.set_xlabel("share of the wall time, %", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _brief(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def confusion_figure(counts_CC: np.ndarray, images_C: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw the share of each class's images (row) that is taken for each class (column), as colour and number.

    Shares are in percent. `images_C` counts all images of a class, also those that are taken for classes which are not
    shown.
    """
    share_CC = 100 * counts_CC / np.maximum(images_C, 1)[:, None]
    size = 2.2 + 0.42 * len(names)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share_CC, cmap="Blues", vmin=0, vmax=100)
    short = [name if len(name) <= 22 else f"{name[:21]}…" for name in names]
    axis.set_xticks(range(len(names)), short, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), short, fontsize=8)
    axis.set_xlabel("taken for", fontsize=9)
    axis.set_ylabel("is", fontsize=9)
    for row, column in zip(*np.nonzero(counts_CC), strict=True):
        color = "white" if share_CC[row, column] > 50 else "black"
        text = f"{share_CC[row, column]:.0f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    bar = figure.colorbar(image, ax=axis, shrink=0.8)
    bar.set_label("share of the class, %", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure
