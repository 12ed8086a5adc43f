"""The images of a benchmark: any source's, or photograph-like ones that are drawn here, as files and .betons.

Every form holds the same images in the same order, and an image's label is its number, so that a batch says which
images it is made of.

Shape suffixes: N images, H and W pixels, F columns of a half spectrum.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lape_ray.data import native
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import ImageFolder, Source, open_source

SMALL = 500  # longest side of the usual ImageNet file of FFCV, in pixels
QUALITY = 90
RAW_SIDE = 256
ORIGINAL, SMALL_JPEG, RAW = "original", f"{SMALL}px q{QUALITY}", f"raw {RAW_SIDE}px"
MARKERS = ", markers"  # ends the name of an input with restart markers

# ImageNet's train split: most photographs were scaled to 500 pixels by where they came from, few are large.
SIZES = ((500, 375), (375, 500), (500, 333), (333, 500), (500, 400), (256, 256), (240, 180), (800, 600))
SIZE_SHARES = (0.38, 0.14, 0.16, 0.06, 0.08, 0.05, 0.08, 0.05)
QUALITIES = (80, 90, 94, 96, 98)
QUALITY_SHARES = (0.15, 0.2, 0.25, 0.3, 0.1)
FULL_CHROMA_SHARE = 0.76  # of ImageNet's files are 4:4:4


@dataclass(frozen=True)
class Images:
    """JPEG files of three channels, and where they come from, for the record."""

    files: tuple[bytes, ...]
    origin: str


def read_images(where: str | None, *, count: int, split: str | None = None, shrink: float = 1.0) -> Images:
    """`count` images of the source at `where`, evenly spread over it, or drawn ones if it is None.

    An image that is no JPEG of three channels becomes one of quality 95, and `origin` says how many did.

    Args:
        shrink: scales the sides of drawn images.
    """
    if where is None:
        files = tuple(draw_photograph(index, shrink) for index in range(count))
        return Images(files, f"{count} drawn textures with a 1/f spectrum; no photographs were given")
    source = open_source(where, split)
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    read = [_as_jpeg(source, int(index)) for index in chosen]
    changed = sum(converted for _, converted in read)
    note = f", {changed} of them encoded anew as RGB JPEG" if changed else ""
    return Images(tuple(data for data, _ in read), f"{len(read)} images of {source.origin}{note}")


def _as_jpeg(source: Source, index: int) -> tuple[bytes, bool]:
    data = source.encoded(index)
    with Image.open(io.BytesIO(data)) as image:
        if image.format in ("JPEG", "MPO") and image.mode == "RGB":
            return data, False
    return _jpeg(source.read(index), quality=95), True


def _jpeg(image: Image.Image, *, quality: int, subsampling: str = "4:2:0") -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


def draw_photograph(index: int, shrink: float = 1.0) -> bytes:
    """A JPEG that costs a decoder what a photograph does; the same for the same number.

    Photographs have amplitudes that fall as 1/f (Field, "Relations between the statistics of natural images", 1987)
    and more contrast in luma than in colour; sizes, qualities and chroma sampling are drawn as ImageNet's are.
    """
    rng = np.random.default_rng((0x1F, index))
    width, height = (max(48, round(side * shrink)) for side in rng.choice(SIZES, p=SIZE_SHARES))
    frequency_HF = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency_HF[0, 0] = 1.0
    steepness = rng.uniform(1.15, 1.75)
    planes = []
    for contrast in (52.0, 10.0, 10.0):
        noise_HF = rng.normal(size=(2, *frequency_HF.shape)) / frequency_HF**steepness
        noise_HF[:, 0, 0] = 0
        plane_HW = np.fft.irfft2(noise_HF[0] + 1j * noise_HF[1], s=(height, width))
        planes.append(128 + contrast * plane_HW / plane_HW.std())
    image = Image.fromarray(np.stack(planes, axis=2).clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB")
    quality = int(rng.choice(QUALITIES, p=QUALITY_SHARES))
    return _jpeg(image, quality=quality, subsampling="4:4:4" if rng.random() < FULL_CHROMA_SHARE else "4:2:0")


def make_inputs(files: Sequence[bytes]) -> dict[str, list[bytes]]:
    """The sets of JPEGs that are decoded, by name: originals and copies of at most 500 pixels, each with markers."""
    small = []
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((SMALL, SMALL), Image.Resampling.BICUBIC)
        small.append(_jpeg(image, quality=QUALITY))
    return {
        ORIGINAL: list(files),
        f"{ORIGINAL}{MARKERS}": [native.add_restart_markers(data) for data in files],
        SMALL_JPEG: small,
        f"{SMALL_JPEG}{MARKERS}": [native.add_restart_markers(data) for data in small],
    }


@dataclass(frozen=True)
class Stored:
    """One input on disk.

    Attributes:
        name: of the input
        paths: its files, one for each image
        beton: the file of `samples` images, each image again and again
    """

    name: str
    paths: tuple[str, ...]
    beton: str
    samples: int


def store(name: str, files: Sequence[bytes], folder: Path, *, samples: int, raw: bool = False) -> Stored:
    """Write `files` below `folder`, and a .beton that repeats them up to `samples` images.

    A .beton holds the files' own bytes, or pixels of at most 256 a side (`raw`).
    """
    root = folder / "".join(c if c.isalnum() else "-" for c in name)
    root.mkdir()
    paths = [root / f"{number:05}.jpg" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    source = ImageFolder(
        origin=name,
        classes=tuple(str(number) for number in range(len(files))),
        labels_N=np.arange(len(files)),
        items_N=np.array([path.name for path in paths], object),
        root=str(root),
    ).take(np.resize(np.arange(len(files)), samples))
    beton = folder / f"{root.name}.beton"
    if raw:
        write_beton(source, beton, max_size=RAW_SIDE, mode="raw")
    else:
        write_beton(source, beton, markers=0)  # kept as they are, with markers where they have them
    return Stored(name, tuple(map(str, paths)), str(beton), samples)
