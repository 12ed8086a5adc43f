"""The crop `simple`, "simple random crop" of DeiT III (arXiv 2204.07118, section 3), as its code makes it with --src.

An image's shorter side is resized to that of the result, 4 pixels around are filled by reflection, and a square is cut
out at random. A square that reaches beyond the resized image is one within it that is then moved over its reflection:
readers make the one by their decoders, and the other here.

Shape suffixes: N samples, B samples of a batch, S the side of a square in pixels.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lape_ray.data.augment.draws import Stream, uniform
from lape_ray.data.native import boxes_of_resized, resized_sides

PADDING = 4  # pixels


def draw_squares(
    seed: int,
    epoch: int,
    epoch_index_N: np.ndarray,
    widths_N: np.ndarray,
    heights_N: np.ndarray,
    side: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw boxes (N, 4) for `decode_batch(..., crop_first=False)`, and pixels (N, 2) that their squares are moved by.

    The squares of `side` pixels lie within the resized images; they are moved to the right and down, from -PADDING to
    PADDING, by `shift_reflected`.
    """
    sides_N2 = np.stack([widths_N, heights_N], axis=1).astype(np.int64)
    resized_N2 = resized_sides(sides_N2, side)
    places_N2 = uniform(seed, epoch, epoch_index_N, Stream.CROP, 2)
    corners_N2 = (places_N2 * (resized_N2 + 2 * PADDING - side + 1)).astype(np.int64) - PADDING
    inside_N2 = np.clip(corners_N2, 0, resized_N2 - side)
    return boxes_of_resized(sides_N2, resized_N2, inside_N2, side), corners_N2 - inside_N2


def reflected(places: Tensor, side: int) -> Tensor:
    """Return the places from 0 to `side` - 1 that those less than a side away are reflections of."""
    last = side - 1
    return last - (last - places.abs()).abs()


def shift_reflected(images_BSS3: np.ndarray, shifts_B2: np.ndarray) -> None:
    """Move the window on each image and its reflection by `shifts_B2`, to the right and down; changes the images."""
    for image_SS3, (across, down) in zip(images_BSS3, shifts_B2.tolist(), strict=True):
        _shift(image_SS3, down)
        _shift(image_SS3.swapaxes(0, 1), across)


def _shift(lines: np.ndarray, by: int) -> None:
    """Move the window by that many of its lines; as slices, which are ten times as fast as the index `reflected`."""
    if by > 0:
        edge = lines[-1 - by : -1][::-1].copy()
        lines[:-by] = lines[by:]
        lines[-by:] = edge
    elif by < 0:
        edge = lines[1 : 1 - by][::-1].copy()
        lines[-by:] = lines[:by]
        lines[:-by] = edge
