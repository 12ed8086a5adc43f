"""A .beton as a source: to write it again, or to read it as any other source is read."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lape_ray.data.beton.format import RAW, read_contents
from lape_ray.data.beton.manifest import Manifest, manifest_path
from lape_ray.data.sources.base import Source
from lape_ray.data.sources.shards import numbered_classes


@dataclass(frozen=True, eq=False)
class BetonImages(Source):
    """Images of FFCV files; items are (file, number in it, mode, width, height, place, bytes)."""

    files: tuple[str, ...]

    def name(self, index: int) -> str:
        file, number = self.items_N[index][:2]
        return f"{self.files[file]} image {number}"

    def encoded(self, index: int) -> bytes:
        """Return the JPEG; of raw pixels a PNG."""
        file, _, mode, width, height, start, size = (int(value) for value in self.items_N[index])
        try:
            with Path(self.files[file]).open("rb") as opened:
                opened.seek(start)
                data = opened.read(size)
        except OSError as error:
            raise ValueError(f"{self.name(index)} cannot be read: {error.strerror}") from error
        if len(data) != size or (mode == RAW and size != 3 * width * height):
            raise ValueError(f"{self.name(index)} cannot be read: {self.files[file]} is truncated")
        if mode != RAW:
            return data
        png = io.BytesIO()
        Image.frombytes("RGB", (width, height), data).save(png, "PNG", compress_level=0)
        return png.getvalue()


def beton_images(path: str | Path) -> BetonImages:
    """Open the images of the .beton, or set of shards, at `path`, also of a file that FFCV's own writer made.

    Class names come from the manifest; without one they are the labels from 0 to the largest.
    """
    contents = read_contents(path)
    first_N = np.searchsorted(contents.file_N, np.arange(len(contents.files)))
    images_N = contents.images_N
    columns = (
        contents.file_N,
        np.arange(len(contents)) - first_N[contents.file_N],
        images_N["mode"],
        images_N["width"],
        images_N["height"],
        images_N["data_ptr"],
        contents.lengths_N,
    )
    if all(manifest_path(file).is_file() for file in contents.files):
        classes = Manifest.of_set([Manifest.load(file) for file in contents.files], path).classes
    else:
        classes = numbered_classes(contents.labels_N, str(path))
    return BetonImages(
        origin=str(path),
        classes=classes,
        labels_N=contents.labels_N,
        items_N=np.stack([column.astype(np.int64) for column in columns], axis=1),
        files=tuple(str(file) for file in contents.files),
    )
