"""A folder of class folders, as torchvision's ImageFolder reads it.

Shape suffix: N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lape_ray.data.sources.base import EXTENSIONS, Source
from lape_ray.data.sources.kaggle import TABLE, kaggle_labels
from lape_ray.data.sources.layout import Layout, find_layout
from lape_ray.data.sources.listing import LeftOut, Listing, joined, list_below, shown


@dataclass(frozen=True, eq=False)
class ImageFolder(Source):
    """Files below root/<class>/; items are paths relative to the root."""

    root: str

    def name(self, index: int) -> str:
        return shown(self._path(index))

    def encoded(self, index: int) -> bytes:
        try:
            return self._path(index).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.name(index)} cannot be read: {error.strerror}") from error

    def _path(self, index: int) -> Path:
        return Path(self.root, self.items_N[index])


def image_folder(root: str | Path, split: str | None = None) -> ImageFolder:
    """List the images below root/<class>/, classes and files sorted by name: those of torchvision's ImageFolder.

    Hidden files and folders are left out, and links to a folder above them. Folders of splits, or around them
    (`find_layout`), are no classes.

    Raises:
        ValueError: there are no class folders, one has no images, or several splits; names it.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"{shown(root)} is not a folder; give a folder of class folders, parquet or tar shards, a .beton, "
            "or 'digits'"
        )
    if split and (root / split).is_dir():
        root, split = root / split, None
    listing = list_below(root)
    layout = find_layout(root, listing, split)
    top = root / layout.base
    if not layout.classes:
        return _flat(top, listing, layout.base)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(layout.classes):
        found = layout.images_of(name)
        if not (found or layout.inner):
            raise _empty(top, name, listing, layout)
        paths += found
        labels += [label] * len(found)
    return ImageFolder(
        origin=shown(top),
        classes=layout.classes,
        labels_N=np.array(labels, np.int64),
        items_N=np.array(paths, object),
        left_out=_left_out(listing, layout).words(),
        root=str(top),
    )


def _empty(top: Path, name: str, listing: Listing, layout: Layout) -> ValueError:
    below = joined(layout.base, name)
    others = [path for path in listing.paths() if path.startswith(f"{below}/")]
    has = f" (but {shown(others[0])})" if others else ""
    return ValueError(
        f"class folder {shown(top / name)} holds no images{has}; add {', '.join(EXTENSIONS)}, or "
        "remove it, and where other splits have that class, give one's .beton as --classes-of"
    )


def _left_out(listing: Listing, layout: Layout) -> LeftOut:
    """Count what lies below the folder of the classes and is no image of a class."""
    counts = listing.left_out(layout.base)
    for folder, names in listing.files.items():
        inside = not layout.base or folder == layout.base or folder.startswith(f"{layout.base}/")
        for name in names if inside else ():
            if not name.lower().endswith(EXTENSIONS):
                counts.add_file(joined(folder, name))
            elif folder == layout.base:
                counts.add("image outside of class folders", joined(folder, name))
    return counts


def _flat(top: Path, listing: Listing, base: str) -> ImageFolder:
    """Open images that lie in one folder, if the labels of Kaggle's ImageNet are there."""
    names = [name for name in listing.files[base] if name.lower().endswith(EXTENSIONS)]
    known = kaggle_labels(top, names) if names else None
    if known is None:
        betons = [name for name in listing.files[base] if name.endswith(".beton")]
        more = f"; {shown(top / betons[0])} is given by its own name" if betons else ""
        if names:
            more = f", and {shown(top / names[0])} lies in none (Kaggle's ImageNet needs {TABLE} in a folder above)"
        raise ValueError(f"{shown(top)} has no class folders; images must lie in {shown(top)}/<class>/{more}")
    classes, labels = known
    counts = listing.left_out(base)
    for name in set(listing.files[base]) - set(names):
        counts.add_file(joined(base, name))
    return ImageFolder(
        origin=shown(top),
        classes=classes,
        labels_N=np.array(labels, np.int64),
        items_N=np.array(names, object),
        left_out=counts.words(),
        root=str(top),
    )
