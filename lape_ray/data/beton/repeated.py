"""Find images that a .beton holds more than once.

Shape suffix: N samples.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
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
    _, group_N, counts = np.unique(contents.lengths_N, return_inverse=True, return_counts=True)
    descriptors = [os.open(file, os.O_RDONLY) for file in contents.files]
    try:

        def read(index: int, skip: int, size: int) -> bytes:
            place = int(contents.images_N["data_ptr"][index]) + skip
            return os.pread(descriptors[contents.file_N[index]], size, place)

        alike: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
        for index in np.flatnonzero(counts[group_N] > 1).tolist():
            length = int(contents.lengths_N[index])
            alike[length, read(index, length, CHECKSUM_BYTES)].append(index)
        pairs = []
        for (length, _), indices in alike.items():
            first: dict[bytes, int] = {}
            for index in indices if len(indices) > 1 else ():
                one = first.setdefault(hashlib.sha256(read(index, 0, length)).digest(), index)
                if one != index:
                    pairs.append((one, index))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if not pairs:
        return None
    one, other = min(pairs, key=lambda pair: pair[1])
    labels_N = contents.labels_N
    differ = sum(labels_N[one] != labels_N[other] for one, other in pairs)
    return (
        f"{len(pairs):,} x an image that is stored already ({differ:,} with another label), such as {name(other)}, "
        f"which is {name(one)}"
    )
