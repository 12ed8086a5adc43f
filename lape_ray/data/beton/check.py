"""Check that a .beton agrees with its manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from lape_ray.data.beton.blocks import hash_blocks
from lape_ray.data.beton.format import CHECKSUM_BYTES, RAW, lengths, read_tables, set_files, tables_sha256
from lape_ray.data.beton.manifest import Manifest
from lape_ray.data.native import crc32c
from lape_ray.data.processes import processes
from lape_ray.data.sources import load_image

PART_SAMPLES = 32  # samples that a process decodes at a time


def check_beton(path: str | Path, *, deep: bool = False, workers: int | None = None) -> Manifest:
    """Check the .beton, or set of shards, at `path`; returns its manifest if the files agree with it.

    Without `deep` that is cheap (well under a second for ImageNet) and covers every file's size and every label,
    image size and place; the images' own bytes are checked when they are read.

    Args:
        deep: also compare the sha256 and decode every image, with `workers` processes.

    Raises:
        FileNotFoundError: a file or its manifest is missing.
        ValueError: a file is truncated, damaged or of another format; says the fix.
    """
    return Manifest.of_set([_check_file(file, deep, workers) for file in set_files(path)], path)


def _check_file(path: Path, deep: bool, workers: int | None) -> Manifest:
    manifest = Manifest.load(path)
    if path.stat().st_size != manifest.bytes:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes but its manifest says {manifest.bytes:,}; copy or write it again"
        )
    records_N, lengths_N = _check_tables(path, manifest)
    if deep:
        _check_images(path, manifest, records_N, lengths_N, workers)
    return manifest


def _check_tables(path: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Check labels, sizes and places of all images; returns the records (N,) and the images' lengths in bytes (N,)."""
    records_N, allocations_N = read_tables(path)
    if len(records_N) != manifest.num_samples:
        raise ValueError(
            f"{path} holds {len(records_N)} samples but its manifest says {manifest.num_samples}; write it again"
        )
    low, high = int(records_N["label"].min()), int(records_N["label"].max())
    if low < 0 or high >= len(manifest.classes):
        raise ValueError(
            f"{path} has labels from {low} to {high}, outside 0..{len(manifest.classes) - 1}; write it again"
        )
    if tables_sha256(records_N, allocations_N) != manifest.tables_sha256:
        raise ValueError(
            f"{path} is damaged: its tables of labels and places are not those of its manifest; "
            "copy or write it again"
        )
    return records_N, lengths(path, records_N, allocations_N)


def _check_images(
    path: Path, manifest: Manifest, records_N: np.ndarray, lengths_N: np.ndarray, workers: int | None
) -> None:
    """Compare the file's sha256 and decode every image."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest.sha256:
            raise ValueError(f"{path} is damaged: its sha256 is not its manifest's; copy or write it again")
        if blocks := manifest.blocks:
            digests, _ = hash_blocks(file, blocks.end, blocks.bytes)
            stored = file.read(len(digests))
            if digests != stored or hashlib.sha256(digests).hexdigest() != blocks.sha256:
                raise ValueError(
                    f"{path} is damaged: its blocks do not agree with their checksums; write it again"
                )
    parts = [slice(start, start + PART_SAMPLES) for start in range(0, len(records_N), PART_SAMPLES)]
    tasks = ((path, part.start, records_N["image"][part], lengths_N[part]) for part in parts)
    with processes(workers) as mapper:
        for reason in mapper(_decode_part, tasks):
            if reason:
                raise ValueError(f"{path} {reason}; write it again")


def _decode_part(task: tuple[Path, int, np.ndarray, np.ndarray]) -> str | None:
    """Decode a part; returns what is wrong with its first bad image, None if all decode to their recorded size."""
    path, first, images, sizes = task
    with path.open("rb") as file:
        for index, (image, size) in enumerate(zip(images, sizes, strict=True), first):
            file.seek(int(image["data_ptr"]))
            data, checksum = file.read(int(size)), file.read(CHECKSUM_BYTES)
            if crc32c(data) != int.from_bytes(checksum, "little"):
                return f"image {index} does not agree with its checksum"
            if image["mode"] == RAW:
                sound = len(data) == 3 * int(image["width"]) * int(image["height"])
            else:
                try:
                    decoded = load_image(data, f"image {index}")
                except ValueError as error:
                    return str(error)
                sound = decoded.mode == "RGB" and decoded.size == (image["width"], image["height"])
            if not sound:
                return f"image {index} is not as its record says"
    return None
