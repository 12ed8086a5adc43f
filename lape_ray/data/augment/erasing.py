"""Random erasing (Zhong et al., arXiv 1708.04896) as timm does it, on normalised images.

The boxes are drawn on the host. Their noise is made on the device, from a hash of the box's key and of the place in
the box, so that it does not depend on the other images of the batch.

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
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that `erase` needs on the device, by name."""
        box_5E = np.stack((self.image_E, self.top_E, self.left_E, self.height_E, self.width_E))
        return {"erase_box_5E": box_5E, "erase_key_2E": self.key_E2.T}


class RandomErasing:
    """Draw and fill the boxes.

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

    def draw(self, epoch: int, epoch_index: np.ndarray) -> Boxes:
        """Draw at most one box for each image of `epoch_index` (B,): the first of ten that is smaller than it."""
        height, width = self.image_size
        B, T = len(epoch_index), _ATTEMPTS
        words_BN = words(self.seed, epoch, epoch_index, Stream.ERASING, 5 + 2 * T)
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
        x_BCHW: floating point, normalised, in channels_last memory.
        images: which of the batch, from start to stop.
        boxes: on the host, so that the device need not be asked for the number of pixels.
        arrays: `boxes.arrays` on the device of x.
    """
    part = slice(*np.searchsorted(boxes.image_E, (images.start, images.stop)).tolist())
    pixels = int((boxes.height_E[part] * boxes.width_E[part]).sum())
    if pixels == 0:
        return
    device, (C, H, W) = x_BCHW.device, x_BCHW.shape[1:]
    image_E, top_E, left_E, height_E, width_E = arrays["erase_box_5E"][:, part]
    area_E = height_E * width_E
    corner_E = (image_E * H + top_E) * W + left_E
    before_E = area_E.cumsum(0) - area_E

    box_P = torch.arange(len(area_E), device=device).repeat_interleave(area_E, output_size=pixels)
    place_P = torch.arange(pixels, device=device) - before_E.index_select(0, box_P)
    width_P = width_E.index_select(0, box_P)
    row_P = ((place_P + 0.5) / width_P).long()  # as place // width, which is slow
    pixel_P = corner_E.index_select(0, box_P) + place_P + row_P * (W - width_P)
    x_NC = x_BCHW.permute(0, 2, 3, 1).view(-1, C)
    if boxes.mode == "const":
        fill_PC = x_NC.new_zeros(pixels, C)
    else:
        key0_E, key1_E = arrays["erase_key_2E"][:, part]
        channel_C1 = torch.arange(C, dtype=torch.int32, device=device)[:, None]
        counter_CP = (place_P * C).to(torch.int32) + channel_C1
        fill_PC = hashed_normal(counter_CP, key0_E.index_select(0, box_P), key1_E.index_select(0, box_P)).T
    x_NC.index_copy_(0, pixel_P, fill_PC.to(x_NC.dtype))


def hashed_normal(counter: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
    """Hash (counter, key0, key1), all int32 and broadcastable, to standard normal float32 numbers.

    Two rounds of the 32-bit mixer "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018), one for each
    word of the key; its upper 24 bits go through the inverse of the normal distribution. |number| < 5.4.
    """
    bits = _mix32_(_mix32_(counter ^ key0).bitwise_xor_(key1))
    symmetric = (bits >> 8).float().add_(0.5).mul_(2.0**-23)  # in (-1, 1), exact
    return symmetric.erfinv_().mul_(math.sqrt(2))


def _mix32_(bits: Tensor) -> Tensor:
    """Apply a bijection of int32 in place; each output bit depends on all input bits; products wrap around."""
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))
