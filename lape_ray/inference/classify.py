"""Classify a folder of images with a checkpoint: the steps behind jobs/predict.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lape_ray.inference.checkpoints import open_predictor
from lape_ray.inference.predict import find_images, predict_files, with_csv
from lape_ray.storage import local


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The counts of classified and of unreadable images, and the CSV file if there is one."""

    images: int
    skipped: int
    csv: str | None

    def summary(self) -> str:
        """Describe the outcome in one line."""
        file = f"; {self.csv}" if self.csv else ""
        return f"{self.images} images classified, {self.skipped} skipped{file}"


def classify_folder(
    spec: str,
    folder: str,
    *,
    overrides: Mapping[str, Any],
    csv: str | None = None,
    top: int = 5,
    batch: int = 32,
    ema: bool = False,
) -> Classified:
    """Classify all images below `folder` with the checkpoint or run `spec` (see `resolve_checkpoints`).

    Predictions are written to the file `csv`, or printed. An image that cannot be read is named on stderr. Raises
    ValueError and OSError for bad input.

    Args:
        top: classes of an image.
        batch: images at a time.
    """
    paths = find_images(local(folder))
    predictor, _ = open_predictor(spec, overrides, ema=ema)
    predictions = predict_files(predictor, paths, top=top, batch_size=batch)
    if csv is not None:
        predictions = with_csv(predictions, csv, top=min(top, len(predictor.classes)))
    skipped = 0
    for prediction in tqdm(predictions, total=len(paths), disable=None):
        if prediction.error is not None:
            skipped += 1
            tqdm.write(f"skipped: {prediction.error}", file=sys.stderr)
        elif csv is None:
            best = "  ".join(f"{name} {p:.3f}" for name, p in prediction.top)
            tqdm.write(f"{prediction.path}  {best}")
    return Classified(images=len(paths) - skipped, skipped=skipped, csv=csv)
