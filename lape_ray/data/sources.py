"""Labelled images as they come: a folder of class folders, parquet shards, or scikit-learn's digits.

A source knows every label at once but opens an image only when asked. Shape suffixes: N samples, H and W
pixels. A source pickles as plain arrays of names, and `take` cuts it into parts, so that a worker process
is sent the few names it works on.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The extensions that torchvision.datasets.ImageFolder reads.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
DIGITS_VAL_SHARE = 0.2
SPLIT_SEED = 0


def load_image(encoded: bytes, name: str) -> Image.Image:
    """The image in `encoded`, decoded to its last pixel, in its own mode; ValueError naming it if it is damaged."""
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
    """`image` in RGB as torchvision's ImageFolder converts it: alpha is dropped, EXIF rotation is not applied.

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
    """

    origin: str
    classes: tuple[str, ...]
    labels_N: np.ndarray
    items_N: np.ndarray

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
        """What to call the image in an error: its file, or its shard and row."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The image file's bytes."""

    def read(self, index: int) -> Image.Image:
        """The image in RGB (`to_rgb`); ValueError naming it if it cannot be read."""
        return to_rgb(load_image(self.encoded(index), self.name(index)), self.name(index))

    def take(self, indices: np.ndarray | slice, origin: str | None = None) -> Source:
        """The samples at `indices`, in that order, under the same classes."""
        return replace(
            self, origin=origin or self.origin, labels_N=self.labels_N[indices], items_N=self.items_N[indices]
        )


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


@dataclass(frozen=True, eq=False)
class ParquetShards(Source):
    """Rows of parquet files; items are (shard, row). Read in order: a row group is decoded as a whole."""

    files: tuple[str, ...]
    column: str

    def name(self, index: int) -> str:
        shard, row = self.items_N[index]
        return f"{self.files[shard]} row {row}"

    def encoded(self, index: int) -> bytes:
        shard, row = self.items_N[index]
        starts = _row_group_starts(self.files[shard])
        group = int(np.searchsorted(starts, row, side="right")) - 1
        value = _row_group(self.files[shard], self.column, group)[int(row - starts[group])].as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if not encoded:
            raise ValueError(f"{self.name(index)} holds no image bytes in column {self.column!r}")
        return encoded


@functools.lru_cache(maxsize=64)
def _row_group_starts(file: str) -> np.ndarray:
    import pyarrow.parquet as pq

    footer = pq.read_metadata(file)
    return np.cumsum([0] + [footer.row_group(g).num_rows for g in range(footer.num_row_groups)])


@functools.lru_cache(maxsize=2)  # neighbours in order; more would hold whole shards in memory
def _row_group(file: str, column: str, group: int) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as shard:
        return shard.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()


@dataclass(frozen=True, eq=False)
class Digits(Source):
    """scikit-learn's handwritten digits; items are the 8x8 grey images, shown as 32x32 RGB."""

    def name(self, index: int) -> str:
        return f"{self.origin} image {index}"

    def encoded(self, index: int) -> bytes:
        image = Image.fromarray(self.items_N[index]).resize((32, 32), Image.Resampling.NEAREST)
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        return file.getvalue()


def open_source(where: str, split: str | None = None) -> Source:
    """The source at `where`: `digits`, a parquet file, folder or glob, or a folder of class folders.

    Args:
        where: as above; a folder with parquet files below it is taken for shards
        split: `train` or `val` of the digits; the shards named after it (train-00000-of-00004.parquet, or a
            folder train/); or the folder of that name below `where`. None: all there is.

    Raises:
        ValueError: nothing is there, no class has images, labels are missing or out of range; says which.
    """
    if where == "digits":
        return digits(split)
    path = Path(where)
    if path.suffix == ".parquet" or (path.is_dir() and next(path.rglob("*.parquet"), None)):
        return parquet_shards(where, split)
    return image_folder(path / split if split else path)


def image_folder(root: str | Path) -> ImageFolder:
    """Images below root/<class>/, classes and files sorted by name: the samples of torchvision's ImageFolder."""
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


def parquet_shards(where: str, split: str | None = None) -> ParquetShards:
    """Rows of the shards that `where` names (file, folder or glob), in the usual layout of dataset hubs.

    The image column is `image` or `img` (struct with `bytes`, or plain binary), the label column `label`, `labels`
    or `fine_label`; class names come from the schema's metadata, else they are the labels from 0 to the largest.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    files = _shards(where, split)
    origin = f"{where} ({split})" if split else where
    labels, items = [], []
    classes: tuple[str, ...] | None = None
    for shard, file in enumerate(files):
        try:
            schema = pq.read_schema(file)
            image_column = _column(schema.names, IMAGE_COLUMNS, "image")
            label_column = _column(schema.names, LABEL_COLUMNS, "label")
            column = pq.read_table(file, columns=[label_column]).column(0)
            classes = classes or _class_names(schema.metadata or {}, label_column)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{file} cannot be read as a shard of images: {error}") from error
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise ValueError(f"{file} row {row} has no label in column {label_column!r}")
        values_N = column.to_numpy()
        if values_N.dtype.kind not in "iu":
            raise ValueError(
                f"{file} column {label_column!r} is of type {column.type}; labels must be integers"
            )
        labels.append(values_N.astype(np.int64))
        items.append(np.stack([np.full(len(values_N), shard), np.arange(len(values_N))], axis=1))
    labels_N = np.concatenate(labels)
    count = int(labels_N.max(initial=-1)) + 1
    return ParquetShards(
        origin=origin,
        classes=classes or tuple(str(label) for label in range(count)),
        labels_N=labels_N,
        items_N=np.concatenate(items),
        files=files,
        column=image_column,
    )


def _shards(where: str, split: str | None) -> tuple[str, ...]:
    path = Path(where)
    if path.is_dir():
        found = sorted(path.rglob("*.parquet"))
    elif any(c in where for c in "*?["):
        found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    else:
        found = [path]
    missing = [file for file in found if not file.is_file()]
    if missing or not found:
        raise ValueError(f"{missing[0] if missing else where} is not there; no parquet shards to read")
    by_split: dict[str, list[str]] = {}
    for file in found:
        numbered = re.match(r"(.+?)[-_]\d", file.stem)
        names_split = numbered[1] if numbered else file.stem
        nested = path.is_dir() and file.parent != path
        by_split.setdefault(file.parent.name if nested else names_split, []).append(str(file))
    if split is None and len(by_split) == 1:
        return tuple(next(iter(by_split.values())))
    if split in by_split:
        return tuple(by_split[split])
    wanted = f"no split {split!r}" if split else "several splits"
    raise ValueError(f"{where} holds {wanted}; choose one of {', '.join(sorted(by_split))}")


def _column(names: Sequence[str], known: Sequence[str], role: str) -> str:
    for name in known:
        if name in names:
            return name
    raise ValueError(f"there is no {role} column ({' or '.join(known)}), only {', '.join(names)}")


def _class_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...] | None:
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    return tuple(names) if names else None


def digits(split: str | None = None) -> Source:
    """1,797 handwritten digits that scikit-learn ships (no download): train 1,438 and val 359, by a fixed draw."""
    from sklearn.datasets import load_digits

    data = load_digits()
    every = Digits(
        origin="digits",
        classes=tuple(str(name) for name in data.target_names),
        labels_N=data.target.astype(np.int64),
        items_N=np.rint(data.images * (255 / 16)).astype(np.uint8),  # ink is counted from 0 to 16
    )
    held = int(DIGITS_VAL_SHARE * len(every))
    subsets = {None: None, "train": f"rest:{held}", "val": f"holdout:{held}"}
    if split not in subsets:
        raise ValueError(f"digits have no split {split!r}; choose train or val")
    return select(every, subsets[split])


def select(source: Source, subset: str | None) -> Source:
    """A part of a source, in the source's order; the same part each time.

    Args:
        subset: `per-class:N` the first N of every class; `holdout:N` a random draw of N that has the classes'
            proportions; `rest:N` what `holdout:N` leaves; None all.
    """
    if subset is None:
        return source
    kind, _, digits_of_count = subset.partition(":")
    kinds = ("per-class", "holdout", "rest")
    if kind not in kinds or not digits_of_count.isdecimal() or int(digits_of_count) < 1:
        raise ValueError(
            f"subset {subset!r} is not known; write one of {', '.join(f'{k}:N' for k in kinds)} with N >= 1"
        )
    count = int(digits_of_count)
    if kind == "per-class":
        chosen_N = _rank_in_class(source.labels_N) < count
    elif count >= len(source):
        raise ValueError(
            f"subset {subset!r} asks for {count} or more of the {len(source)} samples of {source.origin}"
        )
    else:
        chosen_N = np.zeros(len(source), bool)
        chosen_N[_stratified_order(source.labels_N)[:count]] = True
        chosen_N ^= kind == "rest"
    return source.take(np.flatnonzero(chosen_N), origin=f"{source.origin} [{subset}]")


def _rank_in_class(labels_N: np.ndarray) -> np.ndarray:
    """For each sample, how many of its class come before it."""
    order_N = np.argsort(labels_N, kind="stable")
    counts = np.bincount(labels_N)
    rank_N = np.empty(len(labels_N), np.int64)
    rank_N[order_N] = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank_N


def _stratified_order(labels_N: np.ndarray) -> np.ndarray:
    """A random order whose every prefix holds the classes in nearly their proportions."""
    rng = np.random.default_rng(SPLIT_SEED)
    shuffled_N = rng.permutation(len(labels_N))
    mixed_N = labels_N[shuffled_N]
    counts = np.bincount(labels_N)
    # A class of c samples is spread evenly over [0, 1) at steps of 1/c, from a random start of its own.
    spread_N = (_rank_in_class(mixed_N) + rng.random(len(counts))[mixed_N]) / counts[mixed_N]
    return shuffled_N[np.argsort(spread_N, kind="stable")]


def oddity(image: Image.Image, name: str) -> str | None:
    return None
