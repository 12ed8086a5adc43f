"""The common part of sources in numbered files: that a part carries only its own files, and that classes have names.

Shape suffix: N samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lape_ray.data.sources.base import Source

MOST_CLASSES = 10**6


@dataclass(frozen=True, eq=False)
class Shards(Source):
    """Samples in several files; items are a structured array whose field `shard` is an index into `files`."""

    files: tuple[str, ...]

    def take(self, indices: np.ndarray | slice, origin: str | None = None) -> Source:
        """Take samples as from any source; files that the part does not use are dropped, so that it pickles small."""
        items_N = self.items_N[indices]
        used, shard_N = np.unique(items_N["shard"], return_inverse=True)
        if len(items_N):  # an empty part is refused below, with the source's own words
            items_N = items_N.copy()
            items_N["shard"] = shard_N
        return replace(
            self,
            origin=origin or self.origin,
            labels_N=self.labels_N[indices],
            items_N=items_N,
            files=tuple(self.files[shard] for shard in used),
        )


def numbered_classes(labels_N: np.ndarray, where: str) -> tuple[str, ...]:
    """Name classes that have no names: the labels from 0 to the largest; ValueError if that is no class."""
    largest = int(labels_N.max(initial=-1))
    if largest >= MOST_CLASSES:
        raise ValueError(
            f"{where} has a label of {largest}, and no class names; labels number the classes from 0, up to "
            f"{MOST_CLASSES:,}"
        )
    return tuple(str(label) for label in range(largest + 1))
