"""The change of a network's position maps while it trains: a row for each epoch, a column for each layer.

An epoch has a row where it was looked at. The maps of earlier epochs lie next to the run's checkpoints, so that a run
that was continued still has them.

Shapes: L layers, Y rows and X columns of the patch grid.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lape_ray import storage
from lape_ray.config import TrainConfig
from lape_ray.inference.samples import evenly_spaced
from lape_ray.report import figures
from lape_ray.report.build import checkpoint_report
from lape_ray.report.page import Page
from lape_ray.report.position import PositionView
from lape_ray.values.typed import from_json

HTML = "training.html"
MAPS = "position_maps"
CORRELATION = "cosine similarity of the embeddings, as attention sees them"
BIAS = "bias on the attention logits, mean of the heads"
ROTATION = "mean cosine of the angle between query and key"
ROWS = 12  # of a figure; of more epochs those that are spread evenly over them


def report_epoch(
    checkpoint: Path,
    config: TrainConfig,
    epochs: range,
    *,
    folder: str,
    keep: Callable[[Path, str], None],
) -> None:
    """Draw a position report of a checkpoint, and one page that follows its run so far.

    Args:
        checkpoint: after the last of `epochs`, at which reports are made.
        folder: address of the run's folder, where the maps of earlier epochs lie.
        keep: is called with each folder of pages, and its place among the run's artifacts.
    """
    epoch = epochs[-1]
    with tempfile.TemporaryDirectory(prefix="lape-report-") as temporary:
        drawn = Path(temporary)
        seen = checkpoint_report(checkpoint, config, f"epoch {epoch}", drawn / "report")
        if not seen:
            return
        keep(drawn / "report", f"position_report/epoch-{epoch:06}")
        if not all(one.mapped for one in seen):
            return
        what, maps = training_maps(seen)
        remember(folder, epoch, maps)
        write_training_page(config.run.name or "", what, recall(folder, epochs), drawn / "training")
        keep(drawn / "training", "position_report")


def training_maps(seen: Sequence[PositionView]) -> tuple[str, list[Tensor]]:
    """Return what is followed, in words, and the map (Y, X) of the centre patch for each layer of all stages.

    They are its correlation, or without one its bias or rotation. One of these the network must have.
    """
    maps: list[Tensor] = []
    what = ROTATION
    for one in seen:
        if (maps_LYX := one.correlation_maps(one.patch(None))) is not None:
            what = CORRELATION
        elif one.bias_LHPP is not None:
            what, maps_LYX = BIAS, one.window_maps(one.bias_LHPP.nanmean(1), None)
        else:
            assert one.rotation_LPP is not None
            maps_LYX = one.window_maps(one.rotation_LPP, None)
        maps += maps_LYX.unbind()
    return what, maps


def remember(run: str, epoch: int, maps: Sequence[Tensor]) -> None:
    """Keep the maps after `epoch` in the run's folder, to four digits."""
    rounded = [
        [[round(value, 4) for value in row] for row in map_YX.nan_to_num().tolist()] for map_YX in maps
    ]
    storage.write_text(_place(run, epoch), json.dumps(rounded))


def recall(run: str, epochs: Iterable[int]) -> dict[int, list[Tensor]]:
    """Read the maps of those of `epochs` that are kept; a ValueError names a file that holds none."""
    places = {epoch: _place(run, epoch) for epoch in epochs}
    return {epoch: _maps_in(place) for epoch, place in places.items() if storage.exists(place)}


def _maps_in(place: str) -> list[Tensor]:
    fix = "delete that file, and pages leave its epoch out"
    values = from_json(tuple[tuple[tuple[float, ...], ...], ...], storage.read_text(place), place, fix)
    try:
        return [torch.tensor(map_YX, dtype=torch.float32) for map_YX in values]
    except ValueError as error:  # rows of several lengths
        raise ValueError(f"{place} is damaged: {error}; {fix}") from None


def _place(run: str, epoch: int) -> str:
    return storage.join(run, MAPS, f"epoch-{epoch:06}.json")


def write_training_page(name: str, what: str, maps: Mapping[int, Sequence[Tensor]], folder: Path) -> Path:
    """Write the figure and page of a run's maps (Y, X), one a layer, by epoch; returns the page."""
    epochs = sorted(maps)
    chosen = [epochs[index] for index in evenly_spaced(len(epochs), ROWS)]
    figure = figures.maps_figure(
        [(f"epoch {epoch}", maps[epoch]) for epoch in chosen],
        title="The centre patch against every patch, while the network trains",
        x="column", y="row", colors=what, limit=None if what == BIAS else 1.0,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(f"{name}: position while it trains", f"After {epochs[-1]} epochs. Shown is the {what}.")
    page.figure(
        figures.save(figure, folder, "training"), "One row an epoch, one column a layer, one colour scale."
    )
    target = folder / HTML
    target.write_text(page.html())
    return target
