"""Data sets cut out of the photographs in `tests/data/photographs`, in every coding that JPEGs of the field have."""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms

PHOTOGRAPHS = Path(__file__).parent.parent / "data" / "photographs"
COUNT, GREY = 200, (70, 110, 160)
SIZES = (
    (500, 375),
    (375, 500),
    (500, 333),
    (333, 500),
    (400, 300),
    (300, 225),
    (250, 333),
    (199, 301),
    (86, 117),
)
LARGE = {7: (1280, 850), 77: (1024, 1094)}
EXIF_ORIENTATION = 0x0112
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHARD_ROWS, GROUP_ROWS = 260, 100


@functools.cache
def originals() -> list[Path]:
    return sorted(PHOTOGRAPHS.glob("*.jpg"))


@functools.cache
def _pixels(path: Path, shrink: int) -> Image.Image:
    return Image.open(path).convert("RGB").reduce(shrink)


def cut(number: int, size: tuple[int, int]) -> Image.Image:
    """Cut a part out of one of the photographs: the same for the same number and size (width, height)."""
    rng = np.random.default_rng(number)
    image = _pixels(originals()[number % len(originals())], shrink=3 if max(size) < 80 else 1)
    scale = rng.uniform(0.4, 1) * min(image.width / size[0], image.height / size[1])
    width, height = max(1, int(scale * size[0])), max(1, int(scale * size[1]))
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    part = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return Image.merge("RGB", [part.getchannel("RGB"[i]) for i in rng.permutation(3)])


def as_jpeg(number: int, image: Image.Image) -> bytes:
    """Code it in one of the ways that cameras, editors and web sites have."""
    ways: list[dict[str, object]] = [
        {"subsampling": 0},
        {"subsampling": 2},
        {"subsampling": 1},
        {"subsampling": 0, "optimize": True},
        {"subsampling": 2, "restart_marker_blocks": 4},
        {"subsampling": 0, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
        {"subsampling": 2, "exif": _rotated(1 + number % 8), "restart_marker_rows": 1},
    ]
    quality = int(np.random.default_rng(number).integers(70, 97))
    if number % 8 == 7:  # 4:1:1 and 4:4:0, which Pillow does not write
        factor = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440)[number // 8 % 2]
        options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor, cv2.IMWRITE_JPEG_QUALITY, quality]
        return bytes(cv2.imencode(".jpg", np.asarray(image)[..., ::-1], options)[1])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, **ways[number % 8])
    return file.getvalue()


def _rotated(turn: int) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = turn
    return exif.tobytes()


def write_photographs(root: Path, count: int = COUNT) -> Path:
    """Write a class folder for each of `count` photographs; the originals are the first, some are grey."""
    for number in range(count):
        folder = root / f"n{number:08}"
        folder.mkdir(parents=True)
        if number < len(originals()):
            shutil.copy(originals()[number], folder / f"{number:08}.JPEG")
            continue
        image = cut(number, LARGE.get(number, SIZES[number % len(SIZES)]))
        (folder / f"{number:08}.JPEG").write_bytes(
            as_jpeg(0, image.convert("L")) if number in GREY else as_jpeg(number, image)
        )
    return root


def link_first(folders: Path, root: Path, count: int) -> Path:
    """Link the first of the class folders into `root`; returns it."""
    for folder in sorted(folders.iterdir())[:count]:
        (root / folder.name).symlink_to(folder)
    return root


def write_thumbnails(root: Path, shards: int = 4) -> Path:
    """Write photographs of 32 x 32 pixels to parquet shards, train and test, as the hub has CIFAR-10."""
    names = [f"train-{i:05}-of-{shards:05}" for i in range(shards)] + ["test-00000-of-00001"]
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    root.mkdir(parents=True, exist_ok=True)
    for shard, name in enumerate(names):
        numbers = range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        images = [{"bytes": _png(cut(number, (32, 32))), "path": None} for number in numbers]
        labels = np.random.default_rng(shard).permutation(np.arange(SHARD_ROWS) % len(CLASSES))
        table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
        pq.write_table(table, root / f"{name}.parquet", row_group_size=GROUP_ROWS)
    return root


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
