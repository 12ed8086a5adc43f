"""The layout of figures: what is drawn is in the picture, and no text lies on another, however small the figure is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lape_ray.config import ModelConfig
from lape_ray.model import resolve
from lape_ray.report import figures, progress
from lape_ray.report.position import PositionView, Strength
from lape_ray.report.robustness import CROPS, RATIOS, SIZES_OF_224, Robustness, shifts_for
from lape_ray.report.robustness_page import robustness_figure

LONG = "relative2d-sincos2d-lape_shared-deit_tiny_distilled-seed-17"


def seen(
    label: str, depth: int, grid: tuple[int, int] = (4, 4), num_prefix: int = 1, heads: int = 1
) -> PositionView:
    patches = grid[0] * grid[1]
    tokens = patches + num_prefix
    return PositionView(
        label=label,
        description="",
        grid=grid,
        num_prefix=num_prefix,
        correlation_LNN=torch.linspace(-1, 1, tokens * tokens)
        .expand(depth, -1)
        .unflatten(1, (tokens, tokens)),
        bias_LHPP=torch.ones(depth, heads, patches, patches),
        rotation_LPP=torch.ones(depth, patches, patches),
        strength=Strength(norm_ratio_LN=torch.ones(depth, tokens), moved_LN=torch.rand(depth, tokens)),
    )


def training(rows: int, depth: int) -> Figure:
    maps = [(f"epoch {epoch}", torch.ones(depth, 3, 3)) for epoch in range(rows)]
    return figures.maps_figure(maps, title=LONG, x="column", y="row", colors=progress.CORRELATION)


def robust(*labels: str) -> Figure:
    return robustness_figure(
        [
            Robustness(
                label=label,
                trained_size=224,
                patch=16,
                images=9,
                sizes=dict.fromkeys(SIZES_OF_224, 50),
                crops=dict.fromkeys(CROPS, 50),
                shifts=dict.fromkeys(shifts_for(resolve(ModelConfig())), 90),
                ratios={1: 50},
                refused={("ratios", ratio): "squares only" for ratio in RATIOS if ratio != 1},
            )
            for label in labels
        ]
    )


def curves(points: int) -> Figure:
    xs = list(range(1, points + 1))
    lines = [(name, xs, [123456.0 * x for x in xs]) for name in ("training", "validation", "moving average")]
    return figures.curves_figure([(name, "epoch", "images/s", lines) for name in ("a", "b", "c")])


def confusion(classes: int) -> Figure:
    counts = np.eye(classes, dtype=int) + 1
    names = [f"{index} a class of a long name" for index in range(classes)]
    return figures.confusion_figure(counts, counts.sum(1), names)


KINDS: dict[str, Callable[[], Figure | None]] = {
    "token, one map of 3 x 3": lambda: figures.token_figure([seen("a", 1, (3, 3))], None),
    "token, 2 x 8": lambda: figures.token_figure([seen("a", 4, (2, 8))], None),
    "token, 8 x 2": lambda: figures.token_figure([seen("a", 3, (8, 2))], None),
    "token, long names": lambda: figures.token_figure([seen(LONG, 2), seen(LONG, 1)], None),
    "class, both prefix tokens": lambda: figures.class_figure([seen(LONG, 1, num_prefix=2)]),
    "matrix": lambda: figures.matrix_figure([seen("a", 1)]),
    "bias, many rows": lambda: figures.bias_figure(seen(LONG, 1, heads=5), None),
    "rotation": lambda: figures.rotation_figure([seen("a", 1)], None),
    "training, one row": lambda: training(1, 1),
    "training, rows": lambda: training(5, 2),
    "strength, one layer": lambda: figures.strength_figure([seen("a", 1)]),
    "strength, long names": lambda: figures.strength_figure([seen(f"{LONG}-{i}", 4) for i in range(5)]),
    "robustness": lambda: robust("basic", LONG),
    "robustness, many": lambda: robust(*(f"{LONG}-{LONG}-{index}" for index in range(9))),
    "curves, one epoch": lambda: curves(1),
    "curves": lambda: curves(5),
    "confusion of two": lambda: confusion(2),
    "confusion of five": lambda: confusion(5),
}


@pytest.fixture(params=KINDS, scope="module")
def figure(request: pytest.FixtureRequest) -> Figure:
    made = KINDS[request.param]()
    assert made is not None
    return made


def content(path: Path) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom margin of the picture: lines of pixels in which nothing is drawn."""
    with Image.open(path) as image:
        inked = np.asarray(image.convert("L")) < 255
    rows, columns = inked.any(1).nonzero()[0], inked.any(0).nonzero()[0]
    height, width = inked.shape
    return int(columns[0]), int(rows[0]), int(width - 1 - columns[-1]), int(height - 1 - rows[-1])


def test_all_that_is_drawn_is_in_the_picture(figure: Figure, tmp_path: Path) -> None:
    """A picture with an inch around it shows what there is to show."""
    figures.save(figure, tmp_path, "saved")
    figure.savefig(tmp_path / "whole.png", dpi=figures.MAP_DPI, bbox_inches="tight", pad_inches=1)
    extents = []
    for name in ("saved.png", "whole.png"):
        left, top, right, bottom = margins = content(tmp_path / name)
        assert min(margins) > 0, f"{name} is cut: {margins}"
        with Image.open(tmp_path / name) as image:
            extents.append((image.width - left - right, image.height - top - bottom))
    np.testing.assert_allclose(extents[0], extents[1], atol=2)  # pixels of antialiasing


def tick_labels(axis: Axis) -> Iterator[Text]:
    low, high = sorted(axis.get_view_interval())
    for tick in axis.get_major_ticks():
        if low <= tick.get_loc() <= high:
            yield tick.label1 if tick.label1.get_visible() else tick.label2


def texts_of(axes: Axes) -> list[Text]:
    legend = axes.get_legend()
    found = [axes.title, *axes.texts, *(legend.get_texts() if legend else [])]
    for axis in (axes.xaxis, axes.yaxis):
        found += [axis.label, *tick_labels(axis)]
    return found


def test_no_text_lies_on_another(figure: Figure) -> None:
    figure.draw_without_rendering()
    found = [text for axes in figure.axes if axes.get_visible() for text in texts_of(axes)]
    found += figure.texts
    shown = {id(text): text for text in found if text.get_text() and text.get_visible()}.values()
    assert len(shown) > 5
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    on_another = [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    assert on_another == []


def test_a_large_legend_stands_below_its_panel_and_a_small_one_inside() -> None:
    for names, inside in ((("a", "b"), True), ([f"{LONG}-{i}" for i in range(9)], False)):
        made = figures.curves_figure([("x", "y", "z", [(name, [1, 2], [3, 4]) for name in names])] * 2)
        made.draw_without_rendering()
        for panel in made.axes:
            legend = panel.get_legend()
            assert legend is not None
            assert legend.get_window_extent().overlaps(panel.get_window_extent()) == inside


def test_layers_and_epochs_are_whole_numbers() -> None:
    for made in (KINDS["strength, one layer"](), KINDS["curves, one epoch"]()):
        assert made is not None
        for panel in made.axes:
            low, high = panel.get_xlim()
            assert [x for x in panel.get_xticks() if low <= x <= high] == [1]
