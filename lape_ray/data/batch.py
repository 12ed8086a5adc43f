"""A batch, and the loaders of them that training and evaluation read.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Batch(NamedTuple):
    """Images with their labels and their places in the epoch's order; see `lape_ray.data.sampler`."""

    images: Tensor
    """(B, C, H, W): uint8 as they are read, float32 once they are ready for the network."""
    labels: Tensor
    """(B,) int64, on the images' device."""
    epoch_index: np.ndarray
    """(B,) int64: the index of each image in the epoch's order over all ranks."""


class Batches(Protocol):
    """A loader for evaluation."""

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch; close it if it is left early."""


class TrainBatches(Protocol):
    """A loader for training, whose epochs may begin in their middle."""

    def __len__(self) -> int:
        """Return the batches of an epoch."""

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch from the one numbered `start` on; close it if it is left early."""
