"""Squares of a resized image by Pillow alone, evaluation's first: the one place of these outside of the extension.

Shape: S side of the square in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

LONGEST = 32
"""The longest resized image that is made whole, in shorter sides; of a longer one only the square is."""


def center_crop(image: Image.Image, *, size: int, share: float, interpolation: str) -> Image.Image:
    """Return what torchvision's Resize of the shorter side to S / `share` and CenterCrop of S pixels give.

    They are its pixels, too. Only of a strip, such as 1 x 60,000 pixels, whose resized whole would take gigabytes, the
    square alone is resized, which may differ by a rounding.

    Args:
        size: S.
        share: of the shorter side that is kept.
        interpolation: `bilinear`; all others are bicubic.
    """
    short = max(size, math.floor(size / share))
    sizes = [short if side == min(image.size) else int(short * side / min(image.size)) for side in image.size]
    corner = [round((side - size) / 2) for side in sizes]
    return resized_square(image, sizes, corner, size, bilinear=interpolation == "bilinear")


def resized_square(
    image: Image.Image, sizes: Sequence[int], corner: Sequence[int], size: int, *, bilinear: bool
) -> Image.Image:
    """Return the square of `size` pixels that begins at `corner` of the image when it is resized to `sizes`."""
    kind = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    (width, height), (left, top) = sizes, corner
    if max(width, height) <= LONGEST * min(width, height):
        return image.resize((width, height), kind).crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return image.resize((size, size), kind, box=box)
