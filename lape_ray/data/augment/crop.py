"""Crops of small images that all have one size, resized and flipped on their device, as Pillow does it.

Resizing is separable, so a batch of crops is two batched matrix products: each image has a matrix (S, W) for its rows
and one (S, H) for its columns, in which the crop, the filter, the antialiasing and the flip are all contained. Pillow
computes with weights of 22 bits behind the point, in whole numbers, and rounds to levels after either pass. The same
sums come out here, exactly: in float32, which holds whole numbers up to 2^24, each weight is two numbers of 11 bits.
That needs full float32 products (no TF32) and at most 64 pixels below a filter.

Shapes: B images, C channels, H rows, W columns, S side of the result, P pixels that a filter reads from.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CUBIC_SUPPORT, _LINEAR_SUPPORT = 2.0, 1.0  # pixels on either side that a filter reads, where nothing shrinks
_KEYS = -0.5  # the parameter of Pillow's bicubic filter
_BITS = 22  # of Pillow's weights, behind the point


def crop_and_resize(
    images_BCHW: Tensor, boxes_B4: Tensor, flips_B: Tensor, cubic_B: Tensor, side: int
) -> Tensor:
    """Take a box out of each image, resize it with antialiasing, and mirror it: uint8 (B, C, S, S).

    Args:
        images_BCHW: uint8.
        boxes_B4: x, y, width and height in whole pixels; nothing outside of a box counts.
        flips_B: bool; whether the result is mirrored horizontally.
        cubic_B: bool; bicubic where true, bilinear elsewhere.
        side: of the result, in pixels.
    """
    height, width = images_BCHW.shape[2:]
    x_B, y_B, width_B, height_B = boxes_B4.double().unbind(1)
    across_BSW = _weights(x_B, width_B, width, side, cubic_B)
    across_BSW = torch.where(flips_B[:, None, None], across_BSW.flip(1), across_BSW)
    down_BSH = _weights(y_B, height_B, height, side, cubic_B)
    with torch.autocast(images_BCHW.device.type, enabled=False):
        images_BCHW = images_BCHW.float()
        high_B1WS, low_B1WS = _halves(across_BSW.transpose(1, 2)[:, None])
        rows_BCHS = _levels(images_BCHW @ high_B1WS, images_BCHW @ low_B1WS).float()
        high_B1SH, low_B1SH = _halves(down_BSH[:, None])
        return _levels(high_B1SH @ rows_BCHS, low_B1SH @ rows_BCHS).to(torch.uint8)


def _halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Split the weights times 2^22 into whole numbers a and b in float32: a 2^11 + b."""
    whole = (weights * 2**_BITS).round_()
    high = (whole / 2 ** (_BITS // 2)).round_()
    return high.float(), (whole - high * 2 ** (_BITS // 2)).float()


def _levels(high: Tensor, low: Tensor) -> Tensor:
    total = high.int() * 2 ** (_BITS // 2) + low.int()
    return ((total + 2 ** (_BITS - 1)) >> _BITS).clamp_(0, 255)


def _weights(start_B: Tensor, length_B: Tensor, pixels: int, side: int, cubic_B: Tensor) -> Tensor:
    """Compute the share of each of `pixels` in each of `side` results, (B, S, P) float64; the rows add up to 1."""
    device = start_B.device
    scale_B11 = (length_B / side)[:, None, None]
    centre_S1 = torch.arange(0.5, side, dtype=torch.float64, device=device)[:, None]
    pixel_P = torch.arange(0.5, pixels, dtype=torch.float64, device=device)
    within_BP = pixel_P - start_B[:, None]  # of the crop
    # A filter that shrinks is made as much wider, which is the antialiasing.
    distance_BSP = (within_BP[:, None] - scale_B11 * centre_S1).div_(scale_B11.clamp(min=1)).abs_()
    weights_BSP = torch.where(cubic_B[:, None, None], _cubic(distance_BSP), _linear(distance_BSP))
    weights_BSP *= ((within_BP > 0) & (within_BP < length_B[:, None]))[:, None]
    return weights_BSP / weights_BSP.sum(2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Evaluate Keys' cubic convolution kernel at the distance `x` from 0 up."""
    near = ((_KEYS + 2) * x - (_KEYS + 3)) * x * x + 1
    far = _KEYS * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < _CUBIC_SUPPORT, far, torch.zeros_like(x)))


def _linear(x: Tensor) -> Tensor:
    return (_LINEAR_SUPPORT - x).clamp_(min=0)
