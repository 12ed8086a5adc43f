"""The interface that the readers share, and the options that each of them takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from lape_ray.config import DataConfig, Interpolation


class Reader(Protocol):
    """The interface of a backend: passes over one file's or set's images, in orders that the caller gives.

    Attributes:
        labels_N: int64, of every image
        batch_size: images of a batch
        image_size: side of the square that is delivered, in pixels; may be set between passes
        reuses_buffers: whether a batch is overwritten once later ones are asked for
        on_device: whether batches are tensors that already lie on the loader's device, and not arrays
    """

    labels_N: np.ndarray
    batch_size: int
    image_size: int
    reuses_buffers: bool
    on_device: bool

    def batches(self, keys_N: np.ndarray, epoch_index_N: np.ndarray, epoch: int) -> Pass:
        """Yield the batches of one pass over the samples of `keys_N`, the last batch short: uint8 (B, S, S, 3).

        Args:
            keys_N: int64; the low 32 bits are the sample's index, the high bits a seed for readers that draw by it.
            epoch_index_N: each sample's index in the epoch's order over all ranks, which keys its draws.

        Raises:
            ValueError: images cannot be read, or a file was changed; names them.
        """


class Pass(Protocol):
    """An iterator of uint8 (B, H, W, 3); its threads end with `close`."""

    def __iter__(self) -> Iterator[np.ndarray | torch.Tensor]: ...

    def __next__(self) -> np.ndarray | torch.Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A random resized crop and a horizontal flip.

    Attributes:
        scale: smallest and largest share of the image's area
        ratio: smallest and largest width over height
        flip: probability of the flip
        interpolation: filter; random: one of the two for each image
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: Interpolation


@dataclass(frozen=True, kw_only=True)
class SimpleCrop:
    """A random square of the resized image and its reflected borders (`simple`), and a horizontal flip.

    Attributes:
        flip: probability of the flip
        interpolation: filter; random: one of the two for each image
    """

    flip: float
    interpolation: Interpolation


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The centre square that keeps `share` of the shorter side; `random` interpolates bicubically."""

    share: float
    interpolation: Interpolation


TrainCrop = RandomCrop | SimpleCrop
Crop = TrainCrop | CenterCrop


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """The options of every reader.

    Attributes:
        crop: what is cut out of an image
        image_size: side of the square that is delivered, in pixels
        batch_size: images of a batch
        threads: that decode
        seed: of the random crops
        device: where the loader delivers
    """

    crop: Crop
    image_size: int
    batch_size: int
    threads: int
    seed: int
    device: torch.device


def build_crop(data: DataConfig, split: Literal["train", "val"]) -> Crop:
    """Build the split's crop: random for training, the centre for validation."""
    if split == "val":
        return CenterCrop(share=data.eval_crop, interpolation=data.interpolation)
    if data.crop == "simple":
        return SimpleCrop(flip=data.flip, interpolation=data.interpolation)
    return RandomCrop(
        scale=data.crop_scale, ratio=data.crop_ratio, flip=data.flip, interpolation=data.interpolation
    )
