"""Rows of parquet files in the usual layout of dataset hubs.

Shape suffix: N samples.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lape_ray.data.sources.find import find_shards
from lape_ray.data.sources.listing import LeftOut
from lape_ray.data.sources.shards import Shards, numbered_classes
from lape_ray.values.typed import from_json, typed

HUB = b"huggingface"  # the entry of a schema's metadata by which the hub's library describes columns
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
ROW = np.dtype([("shard", "<i4"), ("row", "<i8")])


@dataclass(frozen=True, eq=False)
class ParquetShards(Shards):
    """Rows of parquet files; items are (shard, row). Read in order: a row group is decoded as a whole."""

    column: str

    def name(self, index: int) -> str:
        shard, row = self.items_N[index]
        return f"{self.files[shard]} row {row}"

    def encoded(self, index: int) -> bytes:
        shard, row = self.items_N[index]
        file = self.files[shard]
        try:
            starts = _row_group_starts(file)
            group = int(np.searchsorted(starts, row, side="right")) - 1
            inside = group + 1 < len(starts)
            rows, reason = _row_group(file, self.column, group) if inside else ((), "its footer counts fewer")
        except _failures() as error:
            raise ValueError(f"{self.name(index)} cannot be read: {_first_line(error)}") from error
        place = int(row - starts[group])
        if not 0 <= place < len(rows):
            raise ValueError(
                f"{self.name(index)} cannot be read: row group {group} is damaged from row "
                f"{starts[group] + len(rows)} on ({reason}); repair the file, remove it or skip these rows"
            )
        value = rows[place].as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if not (encoded and isinstance(encoded, bytes)):
            raise ValueError(f"{self.name(index)} holds no image bytes in column {self.column!r}")
        return encoded


def _failures() -> tuple[type[Exception], ...]:
    """List the errors that arrow raises where a file is damaged."""
    import pyarrow as pa

    return OSError, ValueError, pa.ArrowException


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.lru_cache(maxsize=64)
def _row_group_starts(file: str) -> np.ndarray:
    import pyarrow.parquet as pq

    footer = pq.read_metadata(file)
    return np.cumsum([0] + [footer.row_group(g).num_rows for g in range(footer.num_row_groups)])


@functools.lru_cache(maxsize=2)  # neighbours in order; more would hold whole shards in memory
def _row_group(file: str, column: str, group: int) -> tuple[Sequence[Any], str]:
    """Read the rows of a group from its first on; returns them and why no more were read; empty: these are all.

    Arrow decodes a group as a whole or not at all. Row by row it gets as far as the first damaged page; what lies
    behind is lost, for it does not count rows across a page that it cannot read.
    """
    import pyarrow.parquet as pq

    open_shard = functools.partial(pq.ParquetFile, file, page_checksum_verification=True)
    with open_shard() as shard:
        try:
            table = shard.read_row_group(group, columns=[column], use_threads=False)
            return table.column(0).combine_chunks(), ""
        except _failures() as error:
            reason = _first_line(error)
    rows: list[Any] = []
    with contextlib.suppress(*_failures()), open_shard() as shard:
        for batch in shard.iter_batches(1, row_groups=[group], columns=[column], use_threads=False):
            rows.extend(batch.column(0))
    return rows, reason


def parquet_shards(where: str, split: str | None = None) -> ParquetShards:
    """Open the rows of the shards that `where` names (file, folder or glob), in the usual layout of dataset hubs.

    The image column (struct with `bytes`, or plain binary) and the label column have one of the names in
    IMAGE_COLUMNS and LABEL_COLUMNS; class names come from the schema's metadata, else they are the labels from 0 to the
    largest.

    Raises:
        ValueError: a file is damaged, has no such columns, or others than the first file or other class names; names
            it. Damage among its images is found as they are read, and costs the rest of their row group.
    """
    files, left_out = find_shards(where, split, "parquet")
    shards = [_read_shard(file) for file in files]
    classes = _agreed_classes(files, shards, left_out)
    labels_N = np.concatenate([shard.labels_N for shard in shards])
    items_N = np.empty(len(labels_N), ROW)
    items_N["shard"] = np.repeat(np.arange(len(shards)), [len(shard.labels_N) for shard in shards])
    items_N["row"] = np.concatenate([np.arange(len(shard.labels_N)) for shard in shards])
    return ParquetShards(
        origin=f"{where} ({split})" if split else where,
        classes=classes or numbered_classes(labels_N, where),
        labels_N=labels_N,
        items_N=items_N,
        left_out=left_out.words(),
        files=files,
        column=shards[0].image,
    )


class _Shard(NamedTuple):
    """One file: its labels int64 (N,), names of its columns, and class names if it has them."""

    labels_N: np.ndarray
    image: str
    label: str
    classes: tuple[str, ...]


def _agreed_classes(files: Sequence[str], shards: Sequence[_Shard], left_out: LeftOut) -> tuple[str, ...]:
    """Return the class names of all files; a ValueError names two files whose columns or names differ."""
    image, label = shards[0].image, shards[0].label
    named = [(file, shard.classes) for file, shard in zip(files, shards, strict=True) if shard.classes]
    for file, shard in zip(files, shards, strict=True):
        if (shard.image, shard.label) != (image, label):
            raise ValueError(
                f"{file} has its images and labels in columns {shard.image!r} and {shard.label!r}, but {files[0]} in "
                f"{image!r} and {label!r}; rename them, or write the two to a .beton each"
            )
        if named and not shard.classes:
            left_out.add(f"file without class names, which were taken from {named[0][0]}", file)
        elif shard.classes and shard.classes != named[0][1]:
            raise ValueError(_different(named[0], (file, shard.classes)))
    return named[0][1] if named else ()


def _different(one: tuple[str, tuple[str, ...]], other: tuple[str, tuple[str, ...]]) -> str:
    """Say where the class names of two files differ."""
    (first, names), (file, others) = one, other
    if len(names) != len(others):
        how = f"{len(names)} and {len(others)} of them"
    else:
        label = next(
            label for label, pair in enumerate(zip(names, others, strict=True)) if len(set(pair)) > 1
        )
        how = f"label {label} is {names[label]!r} and {others[label]!r}"
    return (
        f"{first} and {file} have different class names ({how}); write one of them again with the labels and "
        "names of the other, or take it out"
    )


def _read_shard(file: str) -> _Shard:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        image = _column(schema.names, IMAGE_COLUMNS, "image")
        label = _column(schema.names, LABEL_COLUMNS, "label")
        with pq.ParquetFile(file) as shard:  # `read_table` would add columns from folders called name=value
            column = shard.read(columns=[label]).column(0)
        labels_N = column.to_numpy()
        classes = _class_names(schema.metadata or {}, label)
    except _failures() as error:
        raise ValueError(f"{file} cannot be read as a shard of images: {_first_line(error)}") from error
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise ValueError(f"{file} row {row} has no label in column {label!r}")
    if labels_N.dtype.kind not in "iu":
        raise ValueError(
            f"{file} column {label!r} is of type {column.type}; labels must be integers: number the classes "
            "from 0, and write the file again"
        )
    return _Shard(labels_N.astype(np.int64), image, label, classes or ())


def _column(names: Sequence[str], known: Sequence[str], role: str) -> str:
    for name in known:
        if name in names:
            return name
    raise ValueError(
        f"there is no {role} column ({', '.join(known)}), only {', '.join(names)}; give it one of these names"
    )


def _class_names(metadata: Mapping[bytes, bytes], column: str) -> tuple[str, ...] | None:
    if HUB not in metadata:
        return None
    what = "its metadata 'huggingface'"
    fix = "write the file again, or leave that out: then labels are numbers"
    value, place = from_json(dict[str, Any], metadata[HUB], what, fix), ""
    try:
        for name in ("info", "features", column):
            place = f"{place}.{name}" if place else name
            value = typed(dict[str, Any], value.get(name, {}), place)
        names: tuple[str, ...] | None = typed(tuple[str, ...] | None, value.get("names"), f"{place}.names")
    except ValueError as error:
        raise ValueError(f"{what} is damaged: {error}; {fix}") from None
    return names or None
