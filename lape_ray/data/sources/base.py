"""The base of all sources of labelled images, and the conversion of an image file to RGB.

Shape suffixes: N samples, H and W pixels.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

# The extensions that torchvision.datasets.ImageFolder reads.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_image(encoded: bytes, name: str) -> Image.Image:
    """Decode the image in `encoded` to its last pixel, in its own mode; a ValueError names it if it is damaged."""
    if not encoded:
        raise ValueError(f"{name} cannot be read: it is empty; repair it, remove it or skip it")
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, EOFError, ...
        reason = (
            "not an image that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        raise ValueError(f"{name} cannot be read: {reason}; repair it, remove it or skip it") from error
    return image


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert to RGB as torchvision's ImageFolder does: alpha is dropped, EXIF rotation is not applied.

    16-bit grey is the one exception: its high byte is kept, where Pillow's `convert` would turn every value
    above 255 white.
    """
    if image.mode.startswith("I;16"):
        high_HW = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(high_HW).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} has pixels of mode {image.mode!r}, whose white is not defined; convert it to 8 bits"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True, eq=False)
class Source(ABC):
    """N labelled images; indexed from 0.

    Attributes:
        origin: where they come from, for the record
        classes: name of every label, by label
        labels_N: int64, each in [0, len(classes)); anything else is a ValueError
        items_N: what a subclass needs to find each image; the first axis is N
        left_out: what lies there and is not read, such as '.gif file, such as a/1.gif', and how many
    """

    origin: str
    classes: tuple[str, ...]
    labels_N: np.ndarray
    items_N: np.ndarray
    left_out: dict[str, int] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError(f"{self.origin} holds no images")
        bad = np.flatnonzero((self.labels_N < 0) | (self.labels_N >= len(self.classes)))
        if len(bad):
            raise ValueError(
                f"{self.name(bad[0])} has label {self.labels_N[bad[0]]}, outside 0..{len(self.classes) - 1} "
                f"({len(bad)} of {len(self)} labels are); is this a split without labels?"
            )

    def __len__(self) -> int:
        return len(self.labels_N)

    def label(self, index: int) -> int:
        return int(self.labels_N[index])

    @abstractmethod
    def name(self, index: int) -> str:
        """Name the image for an error: its file, or its shard and row."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """Return the image file's bytes."""

    def read(self, index: int) -> Image.Image:
        """Read the image in RGB (`to_rgb`); a ValueError names it if it cannot be read."""
        return to_rgb(load_image(self.encoded(index), self.name(index)), self.name(index))

    def take(self, indices: np.ndarray | slice, origin: str | None = None) -> Source:
        """Take the samples at `indices`, in that order, under the same classes."""
        return replace(
            self, origin=origin or self.origin, labels_N=self.labels_N[indices], items_N=self.items_N[indices]
        )
