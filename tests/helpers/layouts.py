"""Small data sets as people have them: images that all differ, in folders, parquet files and tars."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

_numbers = itertools.count()


def png() -> bytes:
    """A PNG of 4 x 3 pixels, unlike any before it."""
    pixels = np.full((3, 4, 3), 7, np.uint8)
    pixels.reshape(-1)[:4] = np.frombuffer(next(_numbers).to_bytes(4, "big"), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(encoded: bytes) -> bytes:
    return Image.open(io.BytesIO(encoded)).convert("RGB").tobytes()


def write_files(root: Path, *names: str | bytes) -> Path:
    """Write files below `root`; those of image extensions are images."""
    for name in names:
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    return root


def write_parquet(path: Path, labels: Sequence[Any], names: Sequence[str] = (), *, image: str = "image",
                  label: str = "label", images: Sequence[Any] | None = None) -> Path:  # fmt: skip
    """Write a shard as hubs have them; `names` go into its ClassLabel feature."""
    images = [{"bytes": png(), "path": None} for _ in labels] if images is None else images
    table = pa.table({image: list(images), label: list(labels)})
    if names:
        features = {label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, label: int = 0) -> list[tuple[str, bytes]]:
    """The members of a WebDataset sample."""
    return [(f"{key}.png", png()), (f"{key}.cls", str(label).encode())]
