"""A few images as evaluation sees them, for measurements and examples.

Shapes: B images, S side of the model's input in pixels.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lape_ray.config import TrainConfig
from lape_ray.data.loader import Loader, build_loader
from lape_ray.inference.predict import center_crop, find_images, read_image, to_tensor
from lape_ray.model import resolve

log = logging.getLogger(__name__)


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """Choose at most `count` evenly spaced indices below `total`, so that each class of a sorted file has its share."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def folder_images(folder: Path, config: TrainConfig, count: int) -> Tensor:
    """Read at most `count` of a folder's images as evaluation sees them: uint8 (B, 3, S, S).

    One that cannot be read is left out, with a warning; a ValueError where that leaves none.
    """
    paths = find_images(folder)
    size = resolve(config.model).image_size
    squares: list[Image.Image] = []
    for index in evenly_spaced(len(paths), count):
        path = paths[index]
        try:
            image = read_image(path)
        except (ValueError, OSError) as error:
            log.warning("skipped: %s", error)
            continue
        squares.append(center_crop(image, size=size, data=config.data))
    if not squares:
        raise ValueError(
            f"none of the images of {folder} that were tried can be read; give a folder of images that can"
        )
    return to_tensor(squares)


def images_at(config: TrainConfig, index_B: np.ndarray) -> Tensor:
    """Read the images of `data.val` at these places of the file, as evaluation sees them: uint8 (B, 3, S, S).

    Raises:
        FileNotFoundError, ValueError: the file does not exist, or is damaged.
    """
    side = resolve(config.model).image_size
    if len(index_B) == 0:
        return torch.empty(0, 3, side, side, dtype=torch.uint8)
    return _read(build_loader(config.data, "val", image_size=side, batch_size=len(index_B)), index_B)


def validation_images(config: TrainConfig, count: int) -> Tensor:
    """Read at most `count` images of `data.val`, spread over the file; see `images_at`."""
    loader = build_loader(config.data, "val", image_size=resolve(config.model).image_size, batch_size=count)
    return _read(loader, evenly_spaced(loader.num_samples, count))


def _read(loader: Loader, index_B: np.ndarray) -> Tensor:
    with contextlib.closing(batches_at(loader, index_B)) as batches:
        return next(batches)


def batches_at(loader: Loader, index_N: np.ndarray) -> Generator[Tensor, None, None]:
    """Yield the images of a validation loader at these places of the file, to keep.

    They are uint8 (B, 3, S, S) of its batch size.
    """
    with contextlib.closing(loader.reader.batches(index_N, np.arange(len(index_N)), 0)) as batches:
        for images_BHWC in batches:
            yield torch.as_tensor(images_BHWC).clone().permute(0, 3, 1, 2)
