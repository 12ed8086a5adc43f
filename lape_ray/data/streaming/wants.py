"""Read what a machine's readers need next of one set, for the process that fetches."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lape_ray.data.streaming.arrivals import WANTS
from lape_ray.data.streaming.blocks import blocks_between, runs

BATCHES_AHEAD = 32
"""The batches ahead of a reader that come before everything else."""
WORD = 8  # bytes


class Wanted:
    """The order of one reader, from the file that it wrote (`Arrivals.wanted`)."""

    def __init__(self, path: Path) -> None:
        self.path, self.pid = path, int(path.name.removeprefix(WANTS).partition("-")[0])
        self._place = np.memmap(path, np.int64, "r", shape=(2,))
        self._spans = np.memmap(path, np.int64, "r", offset=2 * WORD).reshape(-1, 2)
        self._asked = 0
        self._runs: deque[tuple[int, int]] = deque()

    @property
    def ahead(self) -> int:
        """Count the batches that were asked for, ahead of the reader."""
        return self._asked - int(self._place[0])

    @property
    def alive(self) -> bool:
        return self.path.exists() and Path(f"/proc/{self.pid}").exists()

    def next_runs(self, are_free: Callable[[np.ndarray], np.ndarray], longest: int) -> deque[tuple[int, int]]:
        """Return runs of blocks to ask for now, in their order, for the caller to take from the left; empty: none.

        Args:
            are_free: tells of blocks whether they are still to be asked for.
            longest: blocks of a run.
        """
        position, size = int(self._place[0]), int(self._place[1])
        self._asked = max(self._asked, position)
        while not self._runs and self._asked < position + BATCHES_AHEAD:
            spans = self._spans[self._asked * size : (self._asked + 1) * size]
            if not len(spans):
                break
            self._asked += 1
            blocks = np.unique(blocks_between(spans[:, 0], spans[:, 1]))
            self._runs.extend(runs(blocks[are_free(blocks)], longest))
        return self._runs


def look_for(folder: Path, known: dict[str, Wanted]) -> None:
    """Bring `known` up to date with the orders in the folder, and delete those of readers that were killed."""
    for one in list(known.values()):
        if not one.alive:
            one.path.unlink(missing_ok=True)
            del known[one.path.name]
    for entry in os.scandir(folder):
        if entry.name.startswith(WANTS) and entry.name not in known:
            try:
                known[entry.name] = Wanted(Path(entry.path))
            except (OSError, ValueError):  # the reader has just ended
                continue
