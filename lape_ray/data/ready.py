"""Batches that are ready for the network: uint8 pixels made floats on the images' device.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Generator, Iterator

import numpy as np
import torch

from lape_ray.config import DataConfig
from lape_ray.data.augment import Augment
from lape_ray.data.batch import Batch, Batches, TrainBatches
from lape_ray.data.normalize import Normalize

_AUGMENTED_PIXELS = 2**21
"""Together on a GPU: 16 batches of 128 images of 32 x 32, but one of 256 of 224 x 224."""


class Augmented:
    """A loader of training batches whose images are augmented and normalised."""

    def __init__(self, loader: TrainBatches, augment: Augment) -> None:
        self.loader, self.augment = loader, augment

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch from the one numbered `start` on: images float32 (B, 3, H, W)."""
        with contextlib.closing(self.loader.epoch(epoch, start=start)) as batches:
            yield from augment_batches(batches, self.augment, epoch=epoch)


class Normalized:
    """A loader of evaluation batches whose images are normalised, on `device`."""

    def __init__(self, loader: Batches, data: DataConfig, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.normalize = Normalize(data).to(device)

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch: images float32 (B, 3, H, W)."""
        with contextlib.closing(self.loader.epoch(epoch)) as batches:
            for batch in batches:
                yield batch._replace(images=self.normalize(batch.images))


def augment_batches(
    batches: Iterator[Batch], augment: Augment, *, epoch: int, group_size: int | None = None
) -> Generator[Batch, None, None]:
    """Yield the same batches with images uint8 (B, 3, H, W) made normalised floats.

    What is drawn for an image depends on its epoch index alone. So `group_size` batches can be augmented together: by
    default as many as a GPU needs for small images, whose kernels would else take less time than their launches.
    """
    for first in batches:
        group = [first, *itertools.islice(batches, (group_size or _group_size(first)) - 1)]
        images, labels, epoch_index = zip(*group, strict=True)
        together = images[0] if len(group) == 1 else torch.cat(images)
        floats = augment(together, epoch=epoch, epoch_index=np.concatenate(epoch_index))
        yield from map(Batch, floats.split([len(part) for part in labels]), labels, epoch_index)


def _group_size(batch: Batch) -> int:
    if not batch.images.is_cuda:
        return 1
    size, _, height, width = batch.images.shape
    return max(1, _AUGMENTED_PIXELS // math.prod((size, height, width)))
