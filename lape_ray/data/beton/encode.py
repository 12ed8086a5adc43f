"""Encode one image of a source as it is stored."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from PIL import Image

from lape_ray.data.beton.format import CHECKSUM_BYTES, PAGE_BYTES
from lape_ray.data.native import add_restart_markers
from lape_ray.data.sources import Source, load_image, to_rgb, unusual_format

Mode = Literal["auto", "jpg", "raw", "proportion"]
SMALL_SIDE = 64  # up to this side, pixels are smaller than the time it takes to decode them
MAX_SIDE = 0xFFFF  # of the format's 16-bit sizes


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The way in which images are stored; see `write_beton`."""

    max_size: int | None = None
    quality: int = 90
    mode: Mode = "auto"
    raw_share: float = 0.5
    markers: int = 4

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is not known; choose one of {', '.join(get_args(Mode))}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} is out of range; it must be from 1 to 100")
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"max_size={self.max_size} must be a number of pixels, or none")
        if not 0 <= self.raw_share <= 1:
            raise ValueError(f"raw_share={self.raw_share} is out of range; it must be from 0 to 1")
        if not 0 <= self.markers <= 0xFFFF:
            raise ValueError(f"markers={self.markers} is out of range; it must be from 0 (none) to {0xFFFF}")


class Encoded(NamedTuple):
    """One image as it goes into the file; `kind` is a key of Manifest.stored, `unusual` of Manifest.odd."""

    kind: str
    width: int
    height: int
    data: bytes
    unusual: str | None


def encode(source: Source, index: int, encoding: Encoding, position: int) -> Encoded:
    """Sample `index` of `source` as it is stored at `position` of the file; ValueError if it cannot be."""
    encoded, name = source.encoded(index), source.name(index)
    original = load_image(encoded, name)
    image = to_rgb(original, name)
    shrink = (encoding.max_size or max(image.size)) / max(image.size)
    if shrink < 1:
        width, height = (max(1, round(side * shrink)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Decoders of FFCV give the pixels of any three-channel JPEG, and apply no EXIF rotation, as `to_rgb`.
    # MPO is a JPEG with more pictures behind it.
    reusable = shrink >= 1 and original.mode == "RGB" and original.format in ("JPEG", "MPO")
    # Evenly spread along the file, and exact: a raw image wherever position * share passes a whole number.
    turn = int((position + 1) * encoding.raw_share) > int(position * encoding.raw_share)
    raw = encoding.mode == "raw" or (encoding.mode == "proportion" and turn)
    if encoding.mode == "auto":
        raw = not reusable and max(image.size) <= SMALL_SIDE
    if raw:
        kind, data = "raw", image.tobytes()
    elif reusable and encoding.mode != "jpg" and (kept := _with_markers(encoded, encoding.markers)):
        kind, data = "original_jpeg", kept
    else:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=encoding.quality, optimize=True)
        kind, data = "jpeg", _with_markers(file.getvalue(), encoding.markers) or file.getvalue()
    if len(data) > PAGE_BYTES - CHECKSUM_BYTES or max(image.size) > MAX_SIDE:
        raise ValueError(
            f"{name} is {image.width}x{image.height} pixels and {len(data):,} bytes; a .beton takes "
            f"{MAX_SIDE} pixels a side and {PAGE_BYTES - CHECKSUM_BYTES:,} bytes; set max_size"
        )
    return Encoded(kind, image.width, image.height, data, unusual_format(original, name))


def _with_markers(jpeg: bytes, interval: int) -> bytes | None:
    """Add restart markers to the same coefficients; None for the rare JPEG that Pillow reads and we would not."""
    if not interval:
        return jpeg
    try:
        return add_restart_markers(jpeg, interval)
    except ValueError:
        return None
