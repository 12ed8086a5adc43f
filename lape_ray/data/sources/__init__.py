"""Labelled images as they come: class folders, parquet or tar shards, or scikit-learn's digits.

A source knows all labels from the start but opens an image only when asked. It pickles as plain arrays of names, and
`take` cuts it into parts, so that a worker process is sent the few names it works on.

    base         `Source`, and how an image file becomes RGB
    folder       class folders, as torchvision's ImageFolder
    shards       the common part of parquet and tar
    parquet      rows of parquet files, as dataset hubs have them
    tar          WebDataset shards
    handwritten  the digits
    unusual      `unusual_format`: what is unusual about an image that can be read
    subset       `select`: parts that are the same each time
    names        `named`: readable names of the classes
    beton        a .beton as a source, to write it again
"""

from __future__ import annotations

from pathlib import Path

from lape_ray.data.sources.base import EXTENSIONS, Source, load_image, to_rgb
from lape_ray.data.sources.folder import ImageFolder, image_folder
from lape_ray.data.sources.handwritten import Digits, digits
from lape_ray.data.sources.names import named
from lape_ray.data.sources.parquet import ParquetShards, parquet_shards
from lape_ray.data.sources.shards import kind_of_shards
from lape_ray.data.sources.subset import select
from lape_ray.data.sources.tar import TarShards, tar_shards
from lape_ray.data.sources.unusual import unusual_format
from lape_ray.storage import is_remote

__all__ = [
    "EXTENSIONS", "Digits", "ImageFolder", "ParquetShards", "Source", "TarShards", "digits", "image_folder",
    "load_image", "named", "open_source", "parquet_shards", "select", "tar_shards", "to_rgb",
    "unusual_format",
]  # fmt: skip


def open_source(where: str, split: str | None = None) -> Source:
    """Open the source at `where`.

    Args:
        where: `digits`; a folder of class folders; or parquet or tar shards: a file, a folder of them, a glob, or
            ranges such as `train-{0000..0146}.tar`; or a .beton, also on S3. A folder with .parquet or else
            .tar files anywhere below it is taken for shards.
        split: `train` or `val` of the digits; the shards named after it (train-00000-of-00004.parquet, or a
            folder train/); or the folder of that name below `where`. None: everything.

    Raises:
        ValueError: nothing exists at `where`, no class has images, labels are missing or out of range; says which.
    """
    if where == "digits":
        return digits(split)
    path = Path(where)
    if path.suffix == ".beton" or is_remote(where):
        from lape_ray.data.remote import local_split
        from lape_ray.data.sources.beton import beton_images  # which is made of sources

        if split:
            raise ValueError(f"{where} is one .beton, and has no split {split!r}; leave the split out")
        return beton_images(local_split(where))
    holds = kind_of_shards(where)
    if holds == "parquet":
        return parquet_shards(where, split)
    if holds == "tar":
        return tar_shards(where, split)
    return image_folder(path / split if split else path)
