"""Tell folders of splits from class folders, from names alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lape_ray.data.sources.base import EXTENSIONS
from lape_ray.data.sources.listing import Listing, joined, shown
from lape_ray.data.sources.splits import choose_split, is_split_word, split_word


@dataclass(frozen=True)
class Layout:
    """The class folders of a source.

    Attributes:
        base: the folder that holds them, relative to the source's root; '' is the root
        classes: their names, sorted; of some there may be no images; none: `base` has no folders
        images: of each class, names of the images in its folders, by their paths relative to `base`
        inner: the folder in each class that holds its images of the split; None: all below the class are its images
    """

    base: str
    classes: tuple[str, ...]
    images: dict[str, dict[str, list[str]]]
    inner: str | None = None

    def images_of(self, name: str) -> list[str]:
        """List the images of a class by their paths relative to `base`, in torchvision's order."""
        folders = self.images.get(name, {})
        return [joined(folder, image) for folder in sorted(folders) for image in folders[folder]]


@dataclass(frozen=True)
class _Folder:
    """The images below a folder, by its folders and the paths below those.

    Attributes:
        direct: its folders that hold images themselves
        nested: its folders whose folders hold images, and the names of these
    """

    direct: set[str]
    nested: dict[str, set[str]]

    @property
    def names(self) -> set[str]:
        return self.direct | self.nested.keys()


def find_layout(root: Path, listing: Listing, split: str | None) -> Layout:
    """Find the class folders of `split`, of which the root may be several folders above (ILSVRC/Data/CLS-LOC/train).

    A split is a folder of folders of images with a split word in its name, or one beside such. Folders of images
    alone are classes, whatever they are called. Splits may lie in each class, too (bottle/train, bottle/test).

    Raises:
        ValueError: there are several splits and none is chosen, or a folder is no class; names it.
    """
    images = {
        folder: found
        for folder, names in listing.files.items()
        if (found := [name for name in names if name.lower().endswith(EXTENSIONS)])
    }
    base, folder = _down(images, "")
    inner = None
    if splits := _splits(folder):
        base = joined(base, _choose(splits, split, root / base))
    elif inner := _inner(_folder(images, ""), images, root, split):
        base = ""
    elif split:
        there = ", ".join(sorted(_folder(images, "").names)[:5]) or "no folders of images"
        raise ValueError(
            f"{shown(root)} holds no split {split!r}, but {there}; leave --split out, or give the folder that holds "
            "its class folders"
        )
    else:
        base = ""
    bottom, below = _down(images, base)
    if any(is_split_word(name) for name in _splits(below)) or (bottom != base and len(below.names) > 1):
        raise ValueError(
            f"{shown(root / base)} holds all images in one folder, {shown(root / bottom)}, with "
            f"{len(below.names)} folders; give that one as the source"
        )
    return _classes(root, listing, images, base, inner)


def _choose(splits: list[str], split: str | None, folder: Path) -> str:
    """Choose a folder of a split. One alone is taken if it is called by a split word and nothing else."""
    if split is None and len(splits) == 1 and not is_split_word(splits[0]):
        inside = shown(folder / splits[0])
        raise ValueError(f"{shown(folder)} holds one folder of images, {inside}; give that one as the source")
    return choose_split(splits, split, shown(folder))


def _inner(top: _Folder, images: dict[str, list[str]], root: Path, split: str | None) -> str | None:
    """Choose the folder of the split in each class folder, where they have such (cat/train, cat/test); else None.

    Raises:
        ValueError: some folders have them and others do not, as where they are data sets and no classes.
    """
    words = sorted({word for names in top.nested.values() for word in names if is_split_word(word)})
    if not words or (len(words) == 1 and split is None):
        return None
    all_have = not top.direct and all(
        f"{name}/{w}" in images for name, inside in top.nested.items() for w in inside
    )
    if not all_have or any(not is_split_word(word) for names in top.nested.values() for word in names):
        holder = next(name for name, inside in sorted(top.nested.items()) if not inside.isdisjoint(words))
        raise ValueError(
            f"{shown(root)} holds folders with splits, such as {shown(root / holder)}, and others; give one folder "
            "that holds class folders"
        )
    return choose_split(words, split, f"each class folder of {shown(root)}")


def _down(images: dict[str, list[str]], base: str) -> tuple[str, _Folder]:
    """Go down from `base` through folders that hold one folder of folders and nothing else."""
    while True:
        folder = _folder(images, base)
        if _splits(folder) or len(folder.names) != 1 or folder.direct or images.get(base):
            return base, folder
        base = joined(base, *folder.names)


def _folder(images: dict[str, list[str]], base: str) -> _Folder:
    found = _Folder(set(), {})
    start = f"{base}/" if base else ""
    for path in images:
        if path.startswith(start) and path != base:
            name, slash, rest = path[len(start) :].partition("/")
            if slash:
                found.nested.setdefault(name, set()).add(rest.partition("/")[0])
            elif name:
                found.direct.add(name)
    return found


def _splits(folder: _Folder) -> list[str]:
    """List the folders that are splits, or beside them; empty: they are classes.

    All have a split word, or one is called by nothing else and holds several folders of images, or one such.
    """
    names = folder.names
    exact = {name for name in names if is_split_word(name)}
    if names and all(split_word(name) for name in names):
        return sorted(names) if folder.nested or exact == names else []
    outer = exact & (folder.nested.keys() - folder.direct)
    return sorted(names) if any(len(exact) > 1 or len(folder.nested[name]) > 1 for name in outer) else []


def _classes(
    root: Path, listing: Listing, images: dict[str, list[str]], base: str, inner: str | None
) -> Layout:
    """List the class folders in `base`; see Layout for `inner`."""
    start = f"{base}/" if base else ""
    found: dict[str, dict[str, list[str]]] = {}
    for path in listing.files:
        if path.startswith(start) and path != base:
            relative = path[len(start) :]
            name, _, rest = relative.partition("/")
            folders = found.setdefault(name, {})
            if path in images and inner in (None, rest.partition("/")[0]):
                folders[relative] = images[path]
    layout = Layout(base, tuple(sorted(found)), found, inner)
    for name in layout.classes:
        if shown(name) != name:
            raise ValueError(
                f"the name of class folder {shown(root / base / name)} is not UTF-8; rename the folder"
            )
    _refuse_no_classes(root / base, listing, layout)
    return layout


def _refuse_no_classes(top: Path, listing: Listing, layout: Layout) -> None:
    """Refuse folders that are known to be no classes: those of img2dataset, and `images` alone."""
    if layout.classes == ("images",):
        raise ValueError(
            f"{shown(top)} has one folder, {shown(top / 'images')}, which is no class; images must lie in a folder for "
            "each class"
        )
    for name in layout.classes:
        folder = joined(layout.base, name)
        first = next(iter(layout.images[name].get(name, ())), None)
        if name.isdecimal() and first and f"{first.rpartition('.')[0]}.json" in listing.files[folder]:
            raise ValueError(
                f"{shown(top / name)} is a folder of img2dataset, no class: {first} has its values in a .json "
                "beside it; let it write tar files with labels: --output_format webdataset --save_additional_columns "
                "'[\"label\"]'"
            )
