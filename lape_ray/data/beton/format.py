"""The layout of a .beton, FFCV's file format (version 2), and how one or several of them are read.

A .beton holds, in order: a header; a description of each field; a record for each sample (`RECORD`); the
images' bytes, none across the boundary of a page; a table (`ALLOCATION`) of where each image's bytes are.
Behind each image that this package writes lie 4 bytes more, the CRC-32C of its bytes, little endian, and behind
the last image the checksums of `blocks`; FFCV does not look there.

Shape suffix: N samples.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lape_ray.values.program import program

FORMAT_VERSION = 2
PAGE_BYTES = 8 << 20
CHECKSUM_BYTES = 4

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = np.array([(2, b"image", 0), (1, b"label", 0)], FIELD)  # RGBImageField, IntField
IMAGE_TYPE, INT_TYPE = 2, 1
PLACE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# What a record holds of each type of field: float, int, image, bytes, array, JSON, tensor.
STORED = {0: "<f8", INT_TYPE: "<i8", IMAGE_TYPE: IMAGE, 3: PLACE, 4: "<u8", 5: PLACE, 6: "<u8"}
LABELS = (
    "label",
    "labels",
    "target",
    "fine_label",
    "cls",
    "class",
    "y",
)  # of several whole numbers in a record
NO_LABELS = ("index", "idx", "id")
JPEG, RAW = 0, 1  # IMAGE["mode"]
RECORDS_START = HEADER.itemsize + FIELDS.nbytes


@dataclass(frozen=True, eq=False)
class Contents:
    """The tables of the files of one set, in their order.

    Attributes:
        files: one .beton, or all shards of a set
        file_N: int32, which of the files holds each sample
        images_N: dtype IMAGE
        labels_N: int64
        lengths_N: int64, bytes of each image
    """

    files: tuple[Path, ...]
    file_N: np.ndarray
    images_N: np.ndarray
    labels_N: np.ndarray
    lengths_N: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_N)

    def name(self, index: int) -> str:
        """Name a sample for an error: its file, and its number in it."""
        file = int(self.file_N[index])
        first = int(np.searchsorted(self.file_N, file))
        return f"{self.files[file]} image {index - first}"


def read_contents(path: str | Path) -> Contents:
    """Read the tables of the .beton, or of the set of shards, that `path` names (see `set_files`).

    Raises:
        FileNotFoundError: neither exists, or shards are missing.
        ValueError: a file is truncated, damaged or not an FFCV file of images and labels.
    """
    files = set_files(path)
    tables = [read_tables(file) for file in files]
    records_N = np.concatenate([records for records, _ in tables])
    return Contents(
        files=files,
        file_N=np.repeat(np.arange(len(files), dtype=np.int32), [len(records) for records, _ in tables]),
        images_N=np.ascontiguousarray(records_N["image"]),
        labels_N=np.ascontiguousarray(records_N["label"]),
        lengths_N=np.concatenate([lengths(file, *table) for file, table in zip(files, tables, strict=True)]),
    )


def read_tables(file: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one file's records (N,), as RECORD whatever its fields are, and its allocations; ValueError if damaged."""
    size = Path(file).stat().st_size
    header = np.fromfile(file, HEADER, 1)
    foreign = ValueError(
        f"{file} is not an FFCV file of images and labels; write it with {program('write-data')}"
    )
    if size < RECORDS_START - FIELD.itemsize or header["version"][0] != FORMAT_VERSION:
        raise foreign
    number, count, table = (int(header[name][0]) for name in ("num_fields", "num_samples", "alloc_table_ptr"))
    start = HEADER.itemsize + number * FIELD.itemsize
    if start > size:
        raise foreign
    fields = np.fromfile(file, FIELD, number, offset=HEADER.itemsize)
    image, label = _image_and_label(file, fields)
    layout = np.dtype(
        [(f"f{place}", STORED[int(field["type_id"])]) for place, field in enumerate(fields)], align=True
    )
    own = layout == np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True) and not image
    rest = size - table
    exact = rest == count * ALLOCATION.itemsize
    more = rest > count * ALLOCATION.itemsize and rest % ALLOCATION.itemsize == 0 and not own
    if not count or start + count * layout.itemsize > table or not (exact or more):
        raise ValueError(
            f"{file} is truncated: {size:,} bytes do not hold its {count} samples; copy it again"
        )
    allocations_N = np.fromfile(file, ALLOCATION, rest // ALLOCATION.itemsize, offset=table)
    if own:
        return np.fromfile(file, RECORD, count, offset=start), allocations_N
    stored_N, records_N = np.fromfile(file, layout, count, offset=start), np.zeros(count, RECORD)
    records_N["image"], records_N["label"] = stored_N[f"f{image}"], stored_N[f"f{label}"]
    return records_N, allocations_N


def _image_and_label(file: str | Path, fields: np.ndarray) -> tuple[int, int]:
    """Find the places of the image and the label among the fields of an FFCV file."""
    names = [bytes(field["name"]).decode(errors="replace").lower() for field in fields]
    types = [int(field["type_id"]) for field in fields]
    images = [place for place, kind in enumerate(types) if kind == IMAGE_TYPE]
    labels = [place for place, kind in enumerate(types) if kind == INT_TYPE and names[place] not in NO_LABELS]
    labels = [place for place in labels if names[place] in LABELS] or labels
    if len(images) != 1 or len(labels) != 1 or not set(types) <= STORED.keys():
        listed = ", ".join(f"{name} (type {kind})" for name, kind in zip(names[:9], types, strict=False))
        raise ValueError(
            f"{file} is not an FFCV file of images and labels: it has fields {listed or 'none'}, and needs one "
            "RGBImageField (type 2) and one IntField (type 1), called label if there are more; write it again so"
        )
    return images[0], labels[0]


def lengths(file: Path, records_N: np.ndarray, allocations_N: np.ndarray) -> np.ndarray:
    """Look up the bytes (N,) of each image. The allocation table may be in any order.

    Raises:
        ValueError: an image lies outside the table or the file, or has no pixels.
    """
    pointers_N = records_N["image"]["data_ptr"]
    if not np.array_equal(allocations_N["ptr"], pointers_N):  # in the order of the records, as we write it
        order = np.argsort(allocations_N["ptr"])
        found = np.searchsorted(allocations_N["ptr"], pointers_N, sorter=order).clip(max=len(order) - 1)
        allocations_N = allocations_N[order[found]]
        if not np.array_equal(allocations_N["ptr"], pointers_N):
            raise ValueError(f"{file} is damaged: images lie outside its allocation table; write it again")
    sizes_N = allocations_N["size"]
    images_N, size = records_N["image"], file.stat().st_size
    bad_N = (pointers_N > size) | (sizes_N > size) | (np.minimum(images_N["width"], images_N["height"]) == 0)
    if bad_N.any():
        raise ValueError(
            f"{file} is damaged: image {np.flatnonzero(bad_N)[0]} lies outside the file or has no pixels; "
            "write it again"
        )
    return sizes_N.astype(np.int64)


def tables_sha256(records_N: np.ndarray, allocations_N: np.ndarray) -> str:
    """Hash labels, sizes and places; with this and the images' checksums nothing in a file goes unchecked."""
    digest = hashlib.sha256(records_N.tobytes())
    digest.update(allocations_N.tobytes())
    return digest.hexdigest()


def shard_path(path: str | Path, shard: int, shards: int) -> Path:
    """Name a shard: train.beton, 3 and 16 -> train-00003-of-00016.beton."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{shard:05}-of-{shards:05}{path.suffix}")


def set_files(path: str | Path) -> tuple[Path, ...]:
    """Find the file `path`, or the shards (`shard_path`) of the set of that name, in order.

    Raises:
        FileNotFoundError: neither exists, or shards are missing.
        ValueError: both exist, or shards of two sets.
    """
    path = Path(path)
    entries = path.parent.iterdir() if path.parent.is_dir() else ()
    names = set_names(path.name, {entry.name for entry in entries if entry.is_file()}, path.parent)
    return tuple(path.with_name(name) for name in names)


def set_names(name: str, names: Collection[str], place: str | Path) -> tuple[str, ...]:
    """Find by names alone which files the .beton `name` consists of.

    It does what `set_files` does, for the files `names`, which lie at `place`.
    """
    path = Path(name)
    shape = re.compile(re.escape(path.stem) + r"-(\d{5})-of-(\d{5})" + re.escape(path.suffix))
    found = {(int(match[1]), int(match[2])) for entry in names if (match := shape.fullmatch(entry))}
    if name in names:
        if found:
            raise ValueError(
                f"{place}/{name} exists, and shards of that name do too; remove or rename one of them"
            )
        return (name,)
    if not found:
        raise FileNotFoundError(f"{place}/{name} is missing; write it with {program('write-data')}")
    if len(sizes := sorted({shards for _, shards in found})) > 1:
        raise ValueError(
            f"there are shards of several sets {path.stem}-*{path.suffix} in {place}, of {sizes} files; "
            "remove all but one set"
        )
    wanted = tuple(shard_path(name, shard, sizes[0]).name for shard in range(sizes[0]))
    if missing := [one for one in wanted if one not in names]:
        raise FileNotFoundError(
            f"{place}/{missing[0]} is missing ({len(missing)} of {sizes[0]} shards are); copy it, "
            "or write the set again"
        )
    return wanted
