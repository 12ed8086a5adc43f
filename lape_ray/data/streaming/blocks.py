"""The blocks of a set of .beton files, numbered through all files, and the map of those that are here.

Shape suffixes: F files, B images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lape_ray.data.beton.blocks import Blocks
from lape_ray.data.beton.format import set_files
from lape_ray.data.beton.manifest import Manifest

MAP = "have"
FETCHING, READY, WHOLE = 0, 1, 2
"""The states of a copy: before and after its tables are here, and when nothing is missing."""


class Layout:
    """The numbers of all blocks of a set.

    Attributes:
        first_F: the number of each file's first block, and one more: their total
    """

    def __init__(self, files: Sequence[Blocks]) -> None:
        self.files = tuple(files)
        self.first_F = np.array([0, *itertools.accumulate(blocks.count for blocks in files)])
        self.bytes_F = np.array([blocks.bytes for blocks in files])

    @classmethod
    def read(cls, path: Path) -> Layout | None:
        """Read it from the manifests next to the files of the set `path`; None: some have no blocks."""
        found = [Manifest.load(file).blocks for file in set_files(path)]
        files = [blocks for blocks in found if blocks is not None]
        return cls(files) if len(files) == len(found) else None

    def __len__(self) -> int:
        return int(self.first_F[-1])

    def span(
        self, file_B: np.ndarray, start_B: np.ndarray, stop_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last block (B,) of bytes `start_B` to `stop_B` of files."""
        first_B, size_B = self.first_F[file_B], self.bytes_F[file_B]
        return first_B + start_B // size_B, first_B + (stop_B - 1) // size_B

    def file_of(self, block: int) -> int:
        """Return the number of the file that a block is of."""
        return int(np.searchsorted(self.first_F, block, side="right")) - 1

    def place(self, first: int, count: int) -> tuple[int, int, int]:
        """Return the file of `count` blocks from `first` on, and where its bytes of them start and end."""
        file = self.file_of(first)
        blocks, within = self.files[file], first - int(self.first_F[file])
        return file, within * blocks.bytes, min((within + count) * blocks.bytes, blocks.end)


def blocks_between(first_B: np.ndarray, last_B: np.ndarray) -> np.ndarray:
    """Return all blocks from `first_B` to `last_B` of each image, those of an image next to each other; some twice."""
    steps = np.arange(int((last_B - first_B).max(initial=0)) + 1)
    return np.minimum(first_B[:, None] + steps, last_B[:, None]).ravel()


def runs(blocks: np.ndarray, longest: int) -> list[tuple[int, int]]:
    """Join sorted blocks that follow each other; returns (first, count) of each run."""
    if not len(blocks):
        return []
    parts = np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1)
    return [
        (int(part[start]), len(part[start : start + longest]))
        for part in parts
        for start in range(0, len(part), longest)
    ]
