"""The square that evaluation sees of an image, by Pillow alone: the one place of this crop outside of the extension.

Shape: S side of the square in pixels.
"""

from __future__ import annotations

import math

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
    kind = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    short = max(size, math.floor(size / share))
    width, height = (
        short if side == min(image.size) else int(short * side / min(image.size)) for side in image.size
    )
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) <= LONGEST * short:
        return image.resize((width, height), kind).crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return image.resize((size, size), kind, box=box)
