"""Random erasing (Zhong et al., arXiv 1708.04896) as timm does it, on normalised images.

The boxes are drawn on the host. Their noise is made on the device, from a hash of the image's key and of the place
in the image, so that it does not depend on the other images of the batch.

Shapes: B images, E erased images, P pixels of all boxes, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lape_ray.data.augment.draws import Stream, to_uniform, words

EraseMode = Literal["pixel", "const"]

_AREA = (0.02, 1 / 3)  # share of the image
_ASPECT = (0.3, 1 / 0.3)  # height over width
_ATTEMPTS = 10


@dataclass(frozen=True)
class Boxes:
    """The boxes of a batch, on the host.

    Attributes:
        image_E: int64, which image of the batch.
        top_E, left_E, height_E, width_E: int64 pixels.
        key_E2: uint32 words, the key of the box's noise.
        mode: what is put into the boxes.
    """

    image_E: np.ndarray
    top_E: np.ndarray
    left_E: np.ndarray
    height_E: np.ndarray
    width_E: np.ndarray
    key_E2: np.ndarray
    mode: EraseMode

    @property
    def area_E(self) -> np.ndarray:
        """Pixels of each box."""
        return self.height_E * self.width_E

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What `erase` needs on the device."""
        box_E5 = np.stack((self.image_E, self.top_E, self.left_E, self.width_E, self.area_E), axis=1)
        return {"erase_box_E5": box_E5, "erase_key_E2": self.key_E2}


class RandomErasing:
    """Draws and fills the boxes.

    Args:
        probability: that an image gets a box.
        mode: pixel: standard normal noise for each pixel and channel; const: 0, the mean colour.
        image_size: (height, width) in pixels.
        seed: of the draws.
    """

    def __init__(
        self, probability: float, mode: EraseMode, *, image_size: tuple[int, int], seed: int
    ) -> None:
        self.probability = probability
        self.mode: EraseMode = mode
        self.image_size = image_size
        self.seed = seed

    def draw(self, epoch: int, positions: np.ndarray) -> Boxes:
        """At most one box for each image at `positions`, (B,): the first of ten that is smaller than the image."""
        height, width = self.image_size
        B, T = len(positions), _ATTEMPTS
        words_BN = words(self.seed, epoch, positions, Stream.ERASING, 5 + 2 * T)
        key_B2, u = words_BN[:, :2], to_uniform(words_BN[:, 2:])
        erased_u, top_u, left_u = u[:, :3].T
        area_BT = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * u[:, 3 : 3 + T])
        low, high = (math.log(aspect) for aspect in _ASPECT)
        aspect_BT = np.exp(low + (high - low) * u[:, 3 + T :])
        height_BT = np.rint(np.sqrt(area_BT * aspect_BT)).astype(np.int64)
        width_BT = np.rint(np.sqrt(area_BT / aspect_BT)).astype(np.int64)

        fits_BT = (height_BT < height) & (width_BT < width)
        chosen_B = fits_BT.argmax(axis=1)
        image_E = np.flatnonzero((erased_u < self.probability) & fits_BT[np.arange(B), chosen_B])
        height_E, width_E = height_BT[image_E, chosen_B[image_E]], width_BT[image_E, chosen_B[image_E]]
        top_E = (top_u[image_E] * (height - height_E + 1)).astype(np.int64)
        left_E = (left_u[image_E] * (width - width_E + 1)).astype(np.int64)
        return Boxes(image_E, top_E, left_E, height_E, width_E, key_B2[image_E], self.mode)


def erase(x_BCHW: Tensor, images: slice, boxes: Boxes, arrays: Mapping[str, Tensor]) -> None:
    """Fill the boxes of some images of a batch, in place.

    Args:
        x_BCHW: floating point, normalised.
        images: which of the batch, from start to stop.
        boxes: on the host, so that the device need not be asked how many pixels there are.
        arrays: `boxes.arrays` on the device of x.
    """
    part = slice(*np.searchsorted(boxes.image_E, (images.start, images.stop)).tolist())
    pixels = int(boxes.area_E[part].sum())
    if pixels == 0:
        return
    C, _, W = x_BCHW.shape[1:]
    box_E5, device = arrays["erase_box_E5"][part], x_BCHW.device
    area_E = box_E5[:, 4]
    box_of_P = torch.arange(len(box_E5), device=device).repeat_interleave(area_E, output_size=pixels)
    image_P, top_P, left_P, width_P, end_P = (
        box_E5.index_copy(1, ..., area_E.cumsum(0)).index_select(0, box_of_P).unbind(1)
    )
def hashed_normal(counter: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
    """Standard normal float32 numbers that are a function of (counter, key0, key1), all int32 and broadcastable.

    Two rounds of the 32-bit mixer "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018), one for each
    word of the key; its upper 24 bits go through the inverse of the normal distribution. |number| < 5.4.
    """
    bits = _mix32(_mix32(counter ^ key0) ^ key1)
    symmetric = ((bits >> 8).float() + 0.5) * 2.0**-23  # in (-1, 1), exact
    return torch.erfinv(symmetric) * math.sqrt(2)


def _mix32(bits: Tensor) -> Tensor:
    """A bijection of int32 whose output bits each depend on all input bits; products wrap around."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return bits ^ ((bits >> 16) & 0xFFFF)
