"""Affine transforms of batches of uint8 images, with the conventions of PIL.Image.transform(AFFINE).

An output pixel with its centre at (x + 1/2, y + 1/2) reads the input at (a (x+1/2) + b (y+1/2) + c,
d (x+1/2) + e (y+1/2) + f). Outside the input it takes the fill colour; inside, neighbours beyond the edge repeat the
edge. Bicubic is Keys' cubic convolution with parameter -1 (not the -1/2 of PIL's resize, nor the -3/4 of
torch.nn.functional.grid_sample). Results are truncated to uint8, as in Pillow.

Shears and shifts move whole lines, each by one distance: they gather once and filter along the line. Only rotation
samples in two dimensions.

Shapes: B images, C channels, H rows, W columns, N=W+3 pixels that a row is filtered from.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_ray.data.augment.color import to_levels

# Pillow truncates float64 sums. In float32, the weighted sum of equal levels may fall just short of that level.
NUDGE = 2.0**-11


def _finish(sum_BCHW: Tensor, inside_B1HW: Tensor, fill_C: Tensor) -> Tensor:
    levels_BCHW = sum_BCHW.add_(NUDGE)
    # A weight of 0 or 1 makes lerp a choice, which is several times as fast as `where` on a CPU.
    return to_levels(torch.lerp(fill_C.float().view(1, -1, 1, 1), levels_BCHW, inside_B1HW.float()))


def shift_rows(x_BCHW: Tensor, slope_B: Tensor, offset_B: Tensor, cubic_B: Tensor, fill_C: Tensor) -> Tensor:
    """Shear and shift horizontally: output (x, y) reads the input's row y at x + slope * (y + 1/2) + offset.

    Args:
        slope_B, offset_B: float64; the offset is in pixels.
        cubic_B: bool; bicubic where true, bilinear elsewhere.
        fill_C: uint8 colour of what comes from outside.
    """
    height, width = x_BCHW.shape[2:]
    device = x_BCHW.device
    centre_H = torch.arange(0.5, height, dtype=torch.float64, device=device)
    shift_BH = torch.addcmul(offset_B[:, None], slope_B[:, None], centre_H)
    whole_BH = shift_BH.floor()

    # Each row needs the pixels from 1 before its first place to 2 after its last. A shift of more than the width
    # reads nothing but fill, so a limit keeps the index small.
    pixel_N = torch.arange(-1, width + 2, device=device)
    first_B1H1 = whole_BH.clamp(-width - 2, width + 2).long()[:, None, :, None]
    source_B1HN = (pixel_N + first_B1H1).clamp_(0, width - 1)
    line_BCHN = x_BCHW.gather(3, source_B1HN.expand(-1, x_BCHW.shape[1], -1, -1)).float()

    # Bilinear weights are 1 - t and t. Keys' at the parameter -1 are those, plus what the outer two are below 0.
    t_B1H1 = (shift_BH - whole_BH).float()[:, None, :, None]
    rest_B1H1 = 1 - t_B1H1
    bend_B1H1 = cubic_B.float().view(-1, 1, 1, 1) * t_B1H1 * rest_B1H1
    before_B1H1, after_B1H1 = bend_B1H1 * rest_B1H1, bend_B1H1 * t_B1H1
    total_BCHW = line_BCHN[..., 1:-2] * (rest_B1H1 + before_B1H1)
    total_BCHW.addcmul_(line_BCHN[..., 2:-1], t_B1H1 + after_B1H1)
    total_BCHW.addcmul_(line_BCHN[..., :-3], before_B1H1, value=-1)
    total_BCHW.addcmul_(line_BCHN[..., 3:], after_B1H1, value=-1)

    # x + 1/2 + shift lies in [0, width) for the whole numbers x from `first` to before `end`.
    first_BH, end_BH = (-0.5 - shift_BH).ceil(), (width - 0.5 - shift_BH).ceil()
    column_W = torch.arange(width, dtype=torch.float32, device=device)
    inside_BHW = (column_W >= first_BH.float()[..., None]) & (column_W < end_BH.float()[..., None])
    return _finish(total_BCHW, inside_BHW[:, None], fill_C)


def shift_columns(
    x_BCHW: Tensor, slope_B: Tensor, offset_B: Tensor, cubic_B: Tensor, fill_C: Tensor
) -> Tensor:
    """Shear and shift vertically: `shift_rows` along the other axis."""
    turned = x_BCHW.transpose(2, 3).contiguous()
    return shift_rows(turned, slope_B, offset_B, cubic_B, fill_C).transpose(2, 3)


def affine(
    image_BCHW: Tensor, matrix_B6: Tensor, mode: Literal["bilinear", "bicubic"], fill_C: Tensor
) -> Tensor:
    """Apply any affine transform; `matrix_B6` holds (a, b, c, d, e, f) of the module's docstring, in float64 pixels.

    torch.nn.functional.grid_sample does it in one kernel, but its cubic convolution has the parameter -3/4. The
    weights are linear in the parameter, and with 0 they are those of bilinear sampling at a smoothed fraction
    t^2 (3 - 2t). So 4/3 of the one minus 1/3 of the other has the parameter -1 along each axis; only the product
    of both axes' slopes is short by 1/4 of itself, at most 1/64 of the mixed difference of the levels.
    """
    B, _, H, W = image_BCHW.shape
    device = image_BCHW.device
    centre_W = torch.arange(0.5, W, dtype=torch.float32, device=device)
    centre_H1 = torch.arange(0.5, H, dtype=torch.float32, device=device)[:, None]
    by_x_2B11, by_y_2B11, offset_2B11 = matrix_B6.T.float().reshape(2, 3, B, 1, 1).unbind(1)
    place_2BHW = by_x_2B11 * centre_W + (by_y_2B11 * centre_H1 + offset_2B11)
    x_BHW, y_BHW = place_2BHW
    inside_BHW = (x_BHW >= 0) & (x_BHW < W) & (y_BHW >= 0) & (y_BHW < H)

    image_BCHW = image_BCHW.float()
    sampled_BCHW = _sample(image_BCHW, place_2BHW, mode)
    if mode == "bicubic":
        whole_2BHW = (place_2BHW - 0.5).floor_()
        t_2BHW = place_2BHW - whole_2BHW - 0.5
        smooth_2BHW = (3 - 2 * t_2BHW).mul_(t_2BHW).mul_(t_2BHW).add_(whole_2BHW).add_(0.5)
        sampled_BCHW.mul_(4 / 3).sub_(_sample(image_BCHW, smooth_2BHW, "bilinear"), alpha=1 / 3)
    return _finish(sampled_BCHW, inside_BHW[:, None], fill_C)


def _sample(image_BCHW: Tensor, place_2BHW: Tensor, mode: str) -> Tensor:
    height, width = image_BCHW.shape[2:]
    x_BHW, y_BHW = place_2BHW
    grid_2BHW = torch.stack((x_BHW * (2 / width) - 1, y_BHW * (2 / height) - 1))
    grid_BHW2 = grid_2BHW.permute(1, 2, 3, 0)
    return F.grid_sample(image_BCHW, grid_BHW2, mode=mode, padding_mode="border", align_corners=False)
