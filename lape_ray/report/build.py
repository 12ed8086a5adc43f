"""Build a position report: the steps behind jobs/position_report.py."""

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
from lape_ray.inference.checkpoints import ResolvedCheckpoint, resolve_checkpoints
from lape_ray.inference.evaluate import choose_device, val_places
from lape_ray.inference.predict import load_network
from lape_ray.inference.samples import folder_images, validation_images
from lape_ray.report.position import PositionView, views
from lape_ray.report.position_page import HTML, write_position_report
from lape_ray.report.robustness import Robustness, measure_robustness
from lape_ray.storage import is_remote, join, written_folder
from lape_ray.training.checkpoint import read_weights

FIGURES = re.compile(
    r"(token|class_token|matrix|bias_\d+|rotation|strength|robustness)\.(png|svg)|robustness\.csv"
)


def build_position_report(
    specs: Sequence[str],
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
    """Write the report of `specs` (see `resolve_checkpoints`) into `out`, and log it to the MLflow runs among them.

    Args:
        token: "ROW,COLUMN" of the patch whose maps are drawn; None: the centre.
        images: a folder of images for the strength of position; None: `data.val` of each checkpoint.
        count: images of that measurement.
        robustness: measure accuracy at other sizes, parts, shifts and aspect ratios, too, which needs `data.val`.
        robustness_images: on so many of its images; None: on all.

    Returns the page and notes on what was left out or logged. Raises ValueError and OSError for bad input.
    """
    patch = parse_token(token) if token else None
    notes: list[str] = []
    seen: list[PositionView] = []
    measured: list[Robustness] = []
    with tempfile.TemporaryDirectory(prefix="lape-report-") as downloads:
        checkpoints = resolve_checkpoints(specs, overrides, downloads=Path(downloads))
        if robustness:
            _require_validation_images(checkpoints)
        for checkpoint in checkpoints:
            progress(f"{checkpoint.label}: {checkpoint.description}")
            seen += _views(checkpoint, _images(checkpoint, images, count, notes), ema=ema)
        if robustness:
            measured = [_robustness(one, robustness_images, progress, ema=ema) for one in checkpoints]
    with tempfile.TemporaryDirectory(prefix="lape-report-") as fresh:  # only this report's files are logged
        write_position_report(seen, Path(fresh), token=patch, robustness=measured, notes=notes)
        notes += _log_to_runs(checkpoints, Path(fresh))
        with written_folder(out) as folder:
            _replace_report(Path(fresh), folder)
    return join(out, HTML) if isinstance(out, str) and is_remote(out) else Path(out) / HTML, notes


def _require_validation_images(checkpoints: Sequence[ResolvedCheckpoint]) -> None:
    for checkpoint in checkpoints:
        if not checkpoint.config.data.val:
            raise ValueError(
                f"{checkpoint.label}: --robustness needs validation images: give --data.val FILE.beton"
            )


def _robustness(
    checkpoint: ResolvedCheckpoint, images: int | None, progress: Callable[[str], None], *, ema: bool
) -> Robustness:
    weights, _ = read_weights(checkpoint.path, ema=ema)
    config, device = checkpoint.config, choose_device(checkpoint.config)
    return measure_robustness(
        checkpoint.label,
        config,
        weights,
        device=device,
        images=images,
        places_K=val_places(checkpoint.path, config),
        progress=progress,
    )


def _log_to_runs(checkpoints: Sequence[ResolvedCheckpoint], report: Path) -> list[str]:
    """Log the report's files to the MLflow run of each checkpoint that has one; returns a note for each."""
    notes = []
    folder = _artifact_folder([checkpoint.label for checkpoint in checkpoints])
    for checkpoint in checkpoints:
        if checkpoint.run_id is not None:
            uri = tracking.tracking_uri(checkpoint.config)
            tracking.log_files(uri, checkpoint.run_id, report, folder)
            notes.append(f"logged to MLflow run {checkpoint.run_id} as {folder}/")
    return notes


def _artifact_folder(labels: Sequence[str]) -> str:
    """Name the folder in which a run keeps a report.

    A report of one network has a fixed name; a comparison is named after the compared networks.
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
) -> list[PositionView]:
    """Write the report of one checkpoint folder of ours into `out`, strength measured on `count` images.

    Returns what was seen; nothing, and no report, where the network has no position.
    """
    notes: list[str] = []
    resolved = ResolvedCheckpoint(label=label, path=str(checkpoint), config=config)
    seen = _views(resolved, _images(resolved, None, count, notes), ema=False)
    if not any(one.shown for one in seen):
        return []
    write_position_report(seen, out, notes=notes)
    return seen


def parse_token(text: str) -> tuple[int, int]:
    """Parse `ROW,COLUMN` as two numbers."""
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--token {text!r} must be a row and a column with a comma between, such as 7,7"
        ) from None
    return row, column


def _images(
    checkpoint: ResolvedCheckpoint, folder: Path | None, count: int, notes: list[str]
) -> Tensor | None:
    """Read images (B, 3, S, S) to measure with; None, and a note that says why, where none can be read."""
    if folder is not None:
        return folder_images(folder, checkpoint.config, count)
    try:
        return validation_images(checkpoint.config, count)
    except (OSError, ValueError) as error:
        notes.append(
            f"{checkpoint.label}: how strongly position is used is left out, as no images can be read ({error})"
            + ("" if "--images" in str(error) else "; --images FOLDER gives it others")
        )
        return None


def _views(checkpoint: ResolvedCheckpoint, images_BCHW: Tensor | None, *, ema: bool) -> list[PositionView]:
    network = load_network(checkpoint.path, checkpoint.config, ema=ema)
    normalised = None if images_BCHW is None else Normalize(checkpoint.config.data)(images_BCHW)
    return views(network, label=checkpoint.label, description=checkpoint.description, images_BCHW=normalised)
