"""Pixels as the network reads them. Shapes: B images, C channels, H x W pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lape_ray.config import DataConfig


class Normalize(nn.Module):
    """uint8 images (B, 3, H, W) to floats with the data's mean and standard deviation, on their device."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        self.register_buffer("scale_C11", 1 / (255 * std))
        self.register_buffer("shift_C11", mean / std)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW * self.get_buffer("scale_C11") - self.get_buffer("shift_C11")
