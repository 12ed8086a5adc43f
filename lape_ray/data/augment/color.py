"""Colour operations on batches of images, with Pillow's arithmetic.

Every result is a uint8 image, truncated or rounded where Pillow truncates or rounds, so that a chain of operations
stays equal to Pillow's.

Point operations are tables of 256 levels. A table that does not look at the image is made on the host (the
`*_table` functions on numpy arrays); one that does is made from the images on their device.

Shapes: B images, C=3 channels (red, green, blue), H rows, W columns, V=256 levels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LEVELS_V = np.arange(256)


def identity_table() -> np.ndarray:
    """Return a table (V,) uint8 that changes nothing."""
    return _LEVELS_V.astype(np.uint8)


def invert_table() -> np.ndarray:
    """Return a table (V,) uint8: 255 - level."""
    return (255 - _LEVELS_V).astype(np.uint8)


def posterize_table(bits_B: np.ndarray) -> np.ndarray:
    """Make tables (B, V) uint8 that keep the `bits_B` highest bits: 8 or more keep all, 0 or fewer give black."""
    dropped_B = 8 - np.clip(bits_B, 0, 8).astype(np.int64)
    return (_LEVELS_V & (-1 << dropped_B)[:, None]).astype(np.uint8)


def solarize_table(threshold_B: np.ndarray) -> np.ndarray:
    """Make tables (B, V) uint8 that invert the levels from `threshold_B` up."""
    return np.where(threshold_B[:, None] > _LEVELS_V, _LEVELS_V, 255 - _LEVELS_V).astype(np.uint8)


def solarize_add_table(added_B: np.ndarray) -> np.ndarray:
    """Make tables (B, V) uint8 that add `added_B` to the levels below 128, up to 255."""
    brighter_BV = np.minimum(255, _LEVELS_V + added_B[:, None])
    return np.where(_LEVELS_V < 128, brighter_BV, _LEVELS_V).astype(np.uint8)


def brightness_table(factor_B: np.ndarray) -> np.ndarray:
    """Make tables (B, V) uint8 that blend black (factor 0) and the image (factor 1), beyond 1 included."""
    level_BV = factor_B.astype(np.float32)[:, None] * _LEVELS_V.astype(np.float32)
    return np.clip(level_BV, 0, 255).astype(np.uint8)


def apply_table(x_BCHW: Tensor, table_BKV: Tensor) -> Tensor:
    """Replace every level by its entry in the image's table (K=1: one for all channels; K=3: one for each)."""
    B, C = x_BCHW.shape[:2]
    first_BC1 = torch.arange(0, B * C * 256, 256, dtype=torch.int32, device=x_BCHW.device).view(B, C, 1)
    entry_BCP = x_BCHW.flatten(2) + first_BC1
    return table_BKV.expand(-1, C, -1).flatten().index_select(0, entry_BCP.flatten()).view_as(x_BCHW)


def to_levels(x: Tensor) -> Tensor:
    """Convert float levels to uint8, clipped (in place) and truncated."""
    x = x.clamp_(0, 255)
    if x.device.type == "cpu":  # int16 on the way is three times as fast there
        x = x.to(torch.int16)
    return x.to(torch.uint8)


def grey_levels(x_BCHW: Tensor) -> Tensor:
    """Compute the (B, 1, H, W) float luma of ITU-R 601-2, in whole levels.

    It is rounded as Pillow does in 16-bit fixed point. All intermediate values are whole numbers below 2^24 over 2^16,
    hence exact in float32.
    """
    red, green, blue = x_BCHW.float().split(1, dim=1)
    weighted = (red * (19595 / 2**16)).add_(green, alpha=38470 / 2**16).add_(blue, alpha=7471 / 2**16)
    return weighted.add_(0.5).floor_()


def blend(degenerate: Tensor, x: Tensor, factor_B: Tensor) -> Tensor:
    """Compute degenerate + factor * (x - degenerate) in uint8, clipped and truncated: PIL.ImageEnhance's rule.

    Args:
        degenerate: float levels that factor 0 gives, broadcastable to x.
        x: uint8, batch first; factor 1 gives it back.
        factor_B: float32, one for each image.
    """
    factor = factor_B.view(-1, *[1] * (x.dim() - 1))
    # Not addcmul, which may round once where Pillow rounds twice.
    return to_levels((x - degenerate).mul_(factor).add_(degenerate))


def adjust_contrast(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Blend of each image with its mean grey level."""
    mean_B = grey_levels(x_BCHW).mean((1, 2, 3), dtype=torch.float64).add_(0.5).floor_()
    levels_11V = torch.arange(256, dtype=torch.uint8, device=x_BCHW.device).view(1, 1, -1)
    return apply_table(x_BCHW, blend(mean_B.float().view(-1, 1, 1), levels_11V, factor_B))


def adjust_color(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Blend of each image with its grey version (saturation); factor 0 is the grey image itself."""
    return blend(grey_levels(x_BCHW), x_BCHW, factor_B)


def autocontrast(x_BCHW: Tensor) -> Tensor:
    """Stretch each channel of each image to the whole range; a channel of one level stays as it is."""
    levels_V = torch.arange(256, dtype=torch.float64, device=x_BCHW.device)
    low_BC1, high_BC1 = (end.double() for end in x_BCHW.flatten(2).aminmax(dim=2, keepdim=True))
    scale_BC1 = torch.full_like(low_BC1, 255) / (high_BC1 - low_BC1)  # 255 / tensor would round twice
    table_BCV = to_levels(levels_V * scale_BC1 - low_BC1 * scale_BC1)
    return apply_table(x_BCHW, torch.where(high_BC1 > low_BC1, table_BCV, levels_V.to(torch.uint8)))


def equalize(x_BCHW: Tensor) -> Tensor:
    """Flatten the histogram of each channel of each image, by PIL.ImageOps' integer rule."""
    levels_BCP = x_BCHW.flatten(2).long()
    one = torch.ones((), dtype=torch.int64, device=x_BCHW.device)
    counts_BCV = torch.zeros(*levels_BCP.shape[:2], 256, dtype=torch.int64, device=x_BCHW.device)
    counts_BCV.scatter_add_(2, levels_BCP, one.expand_as(levels_BCP))
    of_highest_BC1 = counts_BCV.gather(2, levels_BCP.amax(2, keepdim=True))
    step_BC1 = (levels_BCP.shape[2] - of_highest_BC1) // 255
    below_BCV = counts_BCV.cumsum(2) - counts_BCV
    table_BCV = ((below_BCV + step_BC1 // 2) // step_BC1.clamp(min=1)).clamp_(max=255)
    identity_V = torch.arange(256, device=x_BCHW.device)
    table_BCV = torch.where(step_BC1 > 0, table_BCV, identity_V).to(torch.uint8)
    return apply_table(x_BCHW, table_BCV)
