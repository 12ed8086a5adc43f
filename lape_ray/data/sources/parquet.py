"""Rows of parquet files in the usual layout of dataset hubs.

Shape suffix: N samples.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lape_ray.data.sources.shards import Shards, find_shards, numbered_classes
from lape_ray.values.typed import from_json, typed

HUB = b"huggingface"  # the entry of a schema's metadata by which the hub's library describes columns
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
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

    The image column is `image` or `img` (struct with `bytes`, or plain binary), the label column `label`, `labels`
    or `fine_label`; class names come from the schema's metadata, else they are the labels from 0 to the largest.

    Raises:
        ValueError: a file is damaged or has no such columns; names it. Damage among its images is found as they are
            read, and costs the rest of their row group.
    """
    files = find_shards(where, split, ".parquet")
    labels, items = [], []
    classes: tuple[str, ...] | None = None
    for shard, file in enumerate(files):
        shard_labels_N, image_column, classes = _read_labels(file, classes)
        labels.append(shard_labels_N)
        rows_N = np.empty(len(shard_labels_N), ROW)
        rows_N["shard"], rows_N["row"] = shard, np.arange(len(shard_labels_N))
        items.append(rows_N)
    labels_N = np.concatenate(labels)
    return ParquetShards(
        origin=f"{where} ({split})" if split else where,
        classes=classes or numbered_classes(labels_N, where),
        labels_N=labels_N,
        items_N=np.concatenate(items),
        files=files,
        column=image_column,
    )


def _read_labels(
    file: str, classes: tuple[str, ...] | None
) -> tuple[np.ndarray, str, tuple[str, ...] | None]:
    """Read a shard's labels int64 (N,) and the name of its image column; and its class names unless they are known."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        image_column = _column(schema.names, IMAGE_COLUMNS, "image")
        label_column = _column(schema.names, LABEL_COLUMNS, "label")
        column = pq.read_table(file, columns=[label_column]).column(0)
        labels_N = column.to_numpy()
        classes = classes or _class_names(schema.metadata or {}, label_column)
    except _failures() as error:
        raise ValueError(f"{file} cannot be read as a shard of images: {_first_line(error)}") from error
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise ValueError(f"{file} row {row} has no label in column {label_column!r}")
    if labels_N.dtype.kind not in "iu":
        raise ValueError(f"{file} column {label_column!r} is of type {column.type}; labels must be integers")
    return labels_N.astype(np.int64), image_column, classes


def _column(names: Sequence[str], known: Sequence[str], role: str) -> str:
    for name in known:
        if name in names:
            return name
    raise ValueError(f"there is no {role} column ({' or '.join(known)}), only {', '.join(names)}")


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
