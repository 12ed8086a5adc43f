"""Neighbourhood operations on batches of uint8 images: sharpness and Gaussian blur, after Pillow.

Shapes: B images, C channels, H rows, W columns, K taps.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from lape_ray.data.augment.color import blend, to_levels

MAX_BLUR_RADIUS = 2.0
_PASSES = 3
_REACH = 2  # pixels that a box reaches on each side, up to MAX_BLUR_RADIUS
BLUR_TAPS = 2 * _PASSES * _REACH + 1


def adjust_sharpness(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Blend of each image with its 3x3 smoothed version (weights 1, centre 5, over 13); the border stays as it is."""
    x = x_BCHW.float()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = box.add_(x[:, :, 1:-1, 1:-1], alpha=4).mul_(1 / 13).add_(0.5).floor_()
    out = x_BCHW.clone()
    out[:, :, 1:-1, 1:-1] = blend(smooth, x_BCHW[:, :, 1:-1, 1:-1], factor_B)
    return out


def blur_taps(radius_B: np.ndarray) -> np.ndarray:
    """Compute (B, K) float32 weights of a Gaussian.

    Its standard deviation is `radius_B`, in pixels, up to MAX_BLUR_RADIUS.

    Pillow approximates the Gaussian by three box filters, and this is the three as one filter. The box has `inner`
    whole pixels on each side and a part of one more, so that three of them have the variance radius^2 (Gwosdek et
    al., "Theoretical foundations of Gaussian convolution by extended box filtering", 2011).
    """
    variance_B = radius_B.astype(np.float64) ** 2 / _PASSES
    inner_B = np.floor((np.sqrt(12 * variance_B + 1) - 1) / 2)
    part_B = (2 * inner_B + 1) * (inner_B * (inner_B + 1) - 3 * variance_B)
    part_B = part_B / (6 * (variance_B - (inner_B + 1) ** 2))
    distance_K = np.abs(np.arange(-_REACH, _REACH + 1))
    box_BK = np.clip((1 + inner_B + part_B)[:, None] - distance_K, 0, 1)
    box_BK /= box_BK.sum(axis=1, keepdims=True)
    taps_BK = box_BK
    for _ in range(_PASSES - 1):
        wider_BK = np.zeros((len(taps_BK), taps_BK.shape[1] + 2 * _REACH))
        for k, weight_B in enumerate(box_BK.T):
            wider_BK[:, k : k + taps_BK.shape[1]] += weight_B[:, None] * taps_BK
        taps_BK = wider_BK
    return taps_BK.astype(np.float32)


def gaussian_blur(x_BCHW: Tensor, taps_BK: Tensor) -> Tensor:
    """Filter rows and columns with the same odd number of taps; the edge is repeated."""
    B, C, H, W = x_BCHW.shape
    reach = taps_BK.shape[1] // 2
    weight = taps_BK.repeat_interleave(C, 0).view(B * C, 1, 1, -1)
    x = F.pad(x_BCHW.float(), (reach, reach, reach, reach), mode="replicate").view(
        1, B * C, H + 2 * reach, -1
    )
    x = F.conv2d(x, weight, groups=B * C)
    x = F.conv2d(x, weight.transpose(2, 3), groups=B * C)
    return to_levels(x.view(B, C, H, W).add_(0.5))
