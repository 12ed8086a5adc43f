"""Rotation of the hue with Pillow's 8-bit HSV.

Shapes: B images, H rows, W columns; 3 channels (red, green, blue).
"""

from __future__ import annotations

import torch
from torch import Tensor


def adjust_hue(x_B3HW: Tensor, steps_B: Tensor) -> Tensor:
    """Turn the hue of uint8 images by `steps_B` whole steps, of which 256 make a circle.

    Hue and saturation pass through 8 bits, as in Pillow's HSV mode. Float32 and float64 stand where Pillow has
    them, since both are truncated.
    """
    levels_B3HW = x_B3HW.float()
    red, green, blue = levels_B3HW.unbind(1)
    value = levels_B3HW.amax(1)
    span = value - levels_B3HW.amin(1)
    divisor = span.clamp(min=1)
    from_red, from_green, from_blue = (((value - band) / divisor).double() for band in (red, green, blue))
    sector = torch.where(
        red == value,
        from_blue - from_green,
        torch.where(green == value, 2 + from_red - from_blue, 4 + from_green - from_red),
    )
    hue = ((sector.float().double() / 6 + 1).remainder(1).float().double() * 255).floor()
    saturation = ((span / value.clamp(min=1)).double() * 255).floor()

    sector = (hue + steps_B.view(-1, 1, 1)).remainder(256) * 6 / 255
    fraction = (sector - sector.floor()).float().double()
    share = (saturation / 255).float().double()
    low, falling, rising = (
        (value * (1 - part) + 0.5).floor() for part in (share, share * fraction, share * (1 - fraction))
    )
    value = value.double()
    # Rows: red, green and blue in each of the six sectors of the circle.
    bands = (
        (value, falling, low, low, rising, value),
        (rising, value, value, falling, low, low),
        (low, low, rising, value, value, falling),
    )
    index_B1HW = sector.floor().remainder(6).long().unsqueeze(1)
    return torch.cat([torch.stack(band, 1).gather(1, index_B1HW) for band in bands], 1).to(torch.uint8)
