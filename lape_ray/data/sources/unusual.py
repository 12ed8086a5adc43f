"""Describe what is unusual about an image that can be read."""

from __future__ import annotations

from pathlib import PurePath

from PIL import Image

from lape_ray.data.sources.base import EXTENSIONS

ORIENTATION = 0x0112  # the EXIF tag

# Pillow's names of formats by extension; MPO is a JPEG with more pictures behind it.
FORMATS = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".ppm": ("PPM",),
    ".pgm": ("PPM",),
    ".bmp": ("BMP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".webp": ("WEBP",),
}
assert FORMATS.keys() == set(EXTENSIONS)

MODES = {
    "1": "one bit",
    "L": "grey",
    "P": "palette",
    "LA": "grey, transparency dropped",
    "La": "grey, transparency dropped",
    "PA": "palette, transparency dropped",
    "RGBA": "transparency dropped",
    "RGBa": "transparency dropped",
}


def unusual_format(image: Image.Image, name: str) -> str | None:
    """Say in a few words what is unusual about an image that `to_rgb` accepts; None: nothing is.

    The same words stand for the same thing, so that they can be counted; several are joined by commas. That a
    16-bit colour PNG was cut to 8 bits does not show in an opened image, and goes unsaid.

    Args:
        image: as `load_image` gives it.
        name: of the file; if it ends in no known extension (the row of a shard), the format is not compared.
    """
    found = [
        _format(image, name),
        "16-bit grey" if image.mode.startswith("I;16") else _mode(image),
        _frames(image),
        _orientation(image),
    ]
    return ", ".join(words for words in found if words) or None


def _format(image: Image.Image, name: str) -> str | None:
    extension = PurePath(name).suffix.lower()
    if extension not in FORMATS or image.format is None or image.format in FORMATS[extension]:
        return None
    return f"{image.format} named {extension}"


def _mode(image: Image.Image) -> str | None:
    if image.mode == "RGB":
        # A PNG may name one colour that stands for transparent.
        return "transparency dropped" if "transparency" in image.info else None
    words = MODES.get(image.mode, image.mode)
    if image.mode in ("1", "L", "P") and "transparency" in image.info:
        words += ", transparency dropped"
    return words


def _frames(image: Image.Image) -> str | None:
    return "first of several pictures" if getattr(image, "n_frames", 1) > 1 else None


def _orientation(image: Image.Image) -> str | None:
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's EXIF reader raises struct.error, SyntaxError, OSError, ...
        return "damaged EXIF"
    known = isinstance(turn, int) and 1 <= turn <= 8
    if not known:
        return "damaged EXIF"
    return f"EXIF rotation {turn} is not applied" if turn != 1 else None
