"""Make a position report from what a person types: the steps behind jobs/position_report.py."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lape_ray import tracking
from lape_ray.config import TrainConfig
from lape_ray.data.normalize import Normalize
from lape_ray.inference.checkpoints import Subject, find_subjects
from lape_ray.inference.evaluate import choose_device
from lape_ray.inference.predict import load_network
from lape_ray.inference.samples import folder_images, validation_images
from lape_ray.report.position import PositionView, view
from lape_ray.report.position_page import HTML, write_position_report
from lape_ray.report.robustness import Robustness, measure_robustness
from lape_ray.storage import is_remote, join, written_folder
from lape_ray.training.checkpoint import read_weights

FIGURES = re.compile(r"(token|class_token|matrix|bias_\d+|rotation|strength|robustness)\.(png|svg)")


def build_position_report(
    subjects: Sequence[str],
    out: str | Path,
    *,
    overrides: Mapping[str, Any],
    token: str | None = None,
    images: Path | None = None,
    count: int = 64,
    robustness: bool = False,
    robustness_images: int | None = None,
    ema: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[str | Path, list[str]]:
    """Write the report of `subjects` (see `find_subjects`) into `out`, and log it to the MLflow runs among them.

    Args:
        token: "ROW,COLUMN" of the patch whose maps are drawn; None: the centre.
        images: a folder of images for the strength of position; None: `data.val` of each subject.
        count: images of that measurement.
        robustness: measure accuracy at other sizes and under shifts, too, which needs `data.val`.
        robustness_images: on so many of its images; None: on all.

    Returns the page and notes on what was left out or logged. Raises ValueError and OSError for bad input.
    """
    chosen = parse_token(token) if token else None
    notes: list[str] = []
    views: list[PositionView] = []
    measured: list[Robustness] = []
    with tempfile.TemporaryDirectory(prefix="lape-report-") as downloads:
        found = find_subjects(subjects, overrides, downloads=Path(downloads), ema=ema)
        for one in found if robustness else []:
            if not one.config.data.val:
                raise ValueError(
                    f"{one.label}: --robustness needs validation images: give --data.val FILE.beton"
                )
        for one in found:
            progress(f"{one.label}: {one.description}")
            views.append(_view(one, _images(one, images, count, notes), ema=ema))
        for one in found if robustness else []:
            weights, _ = read_weights(one.checkpoint, ema=ema)
            device = choose_device(one.config)
            measured.append(
                measure_robustness(
                    one.label, one.config, weights, device=device, images=robustness_images, progress=progress
                )
            )
    with tempfile.TemporaryDirectory(prefix="lape-report-") as fresh:  # only this report's files are logged
        write_position_report(views, Path(fresh), token=chosen, robustness=measured, notes=notes)
        place = _artifact_folder([one.label for one in found])
        for one in found:
            if one.run_id is not None:
                tracking.log_files(tracking.tracking_uri(one.config), one.run_id, Path(fresh), place)
                notes.append(f"logged to MLflow run {one.run_id} as {place}/")
        with written_folder(out) as folder:
            _replace_report(Path(fresh), folder)
    return join(out, HTML) if isinstance(out, str) and is_remote(out) else Path(out) / HTML, notes


def _artifact_folder(labels: Sequence[str]) -> str:
    """Name the folder in which a run keeps a report.

    It is that of its own report, or that of a comparison, which has the names of the compared.
    """
    if len(labels) == 1:
        return "position_report"
    return "position_report/" + re.sub(r"[^\w.+-]+", "_", "_and_".join(labels))[:100]


def _replace_report(fresh: Path, out: Path) -> None:
    """Copy a report's files, and remove the figures of an earlier one, which would look like this one's."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / HTML).exists():
        for path in out.iterdir():
            if FIGURES.fullmatch(path.name):
                path.unlink()
    for path in fresh.iterdir():
        shutil.copyfile(path, out / path.name)  # the folder keeps its mode: the temporary one's is private


def checkpoint_report(
    checkpoint: Path, config: TrainConfig, label: str, out: Path, *, count: int = 16
) -> PositionView | None:
    """Write the report of one checkpoint folder of ours into `out`, strength measured on `count` images.

    Returns what was seen; None, and no report, where the network has no position.
    """
    notes: list[str] = []
    one = Subject(label=label, checkpoint=str(checkpoint), config=config)
    found = _view(one, _images(one, None, count, notes), ema=False)
    if not found.depth:
        return None
    write_position_report([found], out, notes=notes)
    return found


def parse_token(text: str) -> tuple[int, int]:
    """Parse `ROW,COLUMN` as two numbers."""
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--token {text!r} must be a row and a column with a comma between, such as 7,7"
        ) from None
    return row, column


def _images(one: Subject, folder: Path | None, count: int, notes: list[str]) -> Tensor | None:
    """Read images (B, 3, S, S) to measure with; None, and a note that says why, where none can be read."""
    if folder is not None:
        return folder_images(folder, one.config, count)
    try:
        return validation_images(one.config, count)
    except (OSError, ValueError) as error:
        notes.append(
            f"{one.label}: how strongly position is used is left out, for want of images ({error})"
            + ("" if "--images" in str(error) else "; --images FOLDER gives it others")
        )
        return None


def _view(one: Subject, images_BCHW: Tensor | None, *, ema: bool) -> PositionView:
    network = load_network(one.checkpoint, one.config, ema=ema)
    normalised = None if images_BCHW is None else Normalize(one.config.data)(images_BCHW)
    return view(network, label=one.label, description=one.description, images_BCHW=normalised)
