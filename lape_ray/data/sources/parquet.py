"""Rows of parquet files in the usual layout of dataset hubs.

Shape suffix: N samples.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lape_ray.data.sources.shards import Shards, find_shards, numbered_classes

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


def parquet_shards(where: str, split: str | None = None) -> ParquetShards:
    """Rows of the shards that `where` names (file, folder or glob), in the usual layout of dataset hubs.

    The image column is `image` or `img` (struct with `bytes`, or plain binary), the label column `label`, `labels`
    or `fine_label`; class names come from the schema's metadata, else they are the labels from 0 to the largest.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    files = find_shards(where, split, ".parquet")
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
        rows_N = np.empty(len(values_N), ROW)
        rows_N["shard"], rows_N["row"] = shard, np.arange(len(values_N))
        items.append(rows_N)
    labels_N = np.concatenate(labels)
    return ParquetShards(
        origin=origin,
        classes=classes or numbered_classes(labels_N, where),
        labels_N=labels_N,
        items_N=np.concatenate(items),
        files=files,
        column=image_column,
    )


def _column(names: Sequence[str], known: Sequence[str], role: str) -> str:
    for name in known:
        if name in names:
            return name
    raise ValueError(f"there is no {role} column ({' or '.join(known)}), only {', '.join(names)}")


def _class_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...] | None:
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    return tuple(names) if names else None
