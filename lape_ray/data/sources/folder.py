"""A folder of class folders, as torchvision's ImageFolder reads it.

Shape suffix: N samples.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lape_ray.data.sources.base import EXTENSIONS, Source


@dataclass(frozen=True, eq=False)
class ImageFolder(Source):
    """Files below root/<class>/; items are paths relative to the root."""

    root: str

    def name(self, index: int) -> str:
        return str(Path(self.root, self.items_N[index]))

    def encoded(self, index: int) -> bytes:
        try:
            return Path(self.name(index)).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.name(index)} cannot be read: {error.strerror}") from error


def image_folder(root: str | Path) -> ImageFolder:
    """List the images below root/<class>/, classes and files sorted by name: those of torchvision's ImageFolder."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder; give a folder of class folders, parquet shards, or 'digits'"
        )
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise ValueError(f"{root} has no class folders; images must lie in {root}/<class>/")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [
            str(Path(folder, file).relative_to(root))
            for folder, _, files in sorted(os.walk(root / name, followlinks=True))
            for file in sorted(files)
            if file.lower().endswith(EXTENSIONS)
        ]
        if not found:
            raise ValueError(
                f"class folder {root / name} holds no images; remove it, or add {', '.join(EXTENSIONS)}"
            )
        paths += found
        labels += [label] * len(found)
    return ImageFolder(
        origin=str(root),
        classes=tuple(classes),
        labels_N=np.array(labels, np.int64),
        items_N=np.array(paths, object),
        root=str(root),
    )
