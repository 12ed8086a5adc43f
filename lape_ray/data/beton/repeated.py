"""Find images that a .beton holds more than once.

Shape suffix: N samples.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lape_ray.data.beton.format import CHECKSUM_BYTES, read_contents


def repeated_images(path: str | Path, name: Callable[[int], str]) -> str | None:
    """Say how many images of the .beton or set at `path`, which this package wrote, are stored already; None: none is.

    Images are the same if their stored bytes are. Only those of one length and checksum are read and compared.

    Args:
        name: names an image by its index, for the first that is repeated.
    """
    contents = read_contents(path)
    lengths_N, labels_N = contents.lengths_N, contents.labels_N
    descriptors = [os.open(file, os.O_RDONLY) for file in contents.files]
    repeated, differ, example = 0, 0, None
    try:

        def read(index: int, skip: int, size: int) -> bytes:
            place = int(contents.images_N["data_ptr"][index]) + skip
            return os.pread(descriptors[contents.file_N[index]], size, place)

        candidates_N = np.flatnonzero(_occurrences(lengths_N) > 1)
        checksums = (
            int.from_bytes(read(index, lengths_N[index], CHECKSUM_BYTES), "little")
            for index in map(int, candidates_N)
        )
        keys_N = np.fromiter(checksums, np.int64, len(candidates_N)) | lengths_N[candidates_N] << 32
        first: dict[bytes, int] = {}
        for index in map(int, candidates_N[_occurrences(keys_N) > 1]):
            one = first.setdefault(hashlib.sha256(read(index, 0, lengths_N[index])).digest(), index)
            if one != index:
                repeated += 1
                differ += int(labels_N[one] != labels_N[index])
                example = example or (one, index)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if example is None:
        return None
    one, other = example
    return (
        f"{repeated:,} x an image that is stored already ({differ:,} with another label), such as {name(other)}, "
        f"which is {name(one)}"
    )


def _occurrences(values_N: np.ndarray) -> np.ndarray:
    """Count how often each value (N,) occurs; returns it for each (N,)."""
    _, group_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return counts[group_N]
