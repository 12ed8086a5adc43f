"""Position embeddings of the logits port: a bias_LHNN added to every layer's attention logits.

Shapes: L layers, H heads, P patches in row-major order, N tokens = prefix tokens + patches, R relative
offsets = (2 * height - 1) * (2 * width - 1). Prefix tokens get no bias: their rows and columns are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.position import Layout


def relative_index(layout: Layout) -> Tensor:
    """(P, P) row of the relative table that query p reads for key q: offset by row, then by column."""
    height, width = layout.grid
    row_P, column_P = layout.patch_rows_columns()
    row_PP = row_P[:, None] - row_P[None, :] + height - 1
    column_PP = column_P[:, None] - column_P[None, :] + width - 1
    return row_PP * (2 * width - 1) + column_PP


class Relative2d(nn.Module):
    """A trained bias for every 2-D offset, head and layer, zero at first (Swin, arXiv 2103.14030, eq. 4)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        height, width = layout.grid
        offsets = (2 * height - 1) * (2 * width - 1)
        self.table_LRH = nn.Parameter(torch.zeros(layout.depth, offsets, layout.num_heads))
        self.register_buffer("index_PP", relative_index(layout), persistent=False)

    def forward(self) -> Tensor:
        return self.table_LRH[:, self.get_buffer("index_PP")].permute(0, 3, 1, 2)


class Alibi2d(nn.Module):
    """Minus the Euclidean distance of two patches, in patches, times a head's fixed slope (arXiv 2311.00566).

    Slopes are the geometric series 2^(-8/H), 2^(-16/H), ... of ALiBi (arXiv 2108.12409).
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        row_P, column_P = (index.double() for index in layout.patch_rows_columns())
        distance_PP = torch.hypot(row_P[:, None] - row_P[None, :], column_P[:, None] - column_P[None, :])
        heads = layout.num_heads
        slope_H = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        bias_HPP = (-slope_H[:, None, None] * distance_PP).float()
        self.depth = layout.depth
        self.register_buffer("bias_HPP", bias_HPP, persistent=False)

    def forward(self) -> Tensor:
        return self.get_buffer("bias_HPP").expand(self.depth, -1, -1, -1)


class LogitBias(nn.Module):
    """A bias table, optionally through a LayerNorm of each layer over the keys (the paper's LaPE for RPE).

    The norm's weight has one entry for each patch and is shared by heads and query rows; eps 1e-5.
    """

    def __init__(self, layout: Layout, table: nn.Module, *, normalise: bool) -> None:
        super().__init__()
        self.table = table
        self.num_prefix = layout.num_prefix
        norms = layout.depth if normalise else 0
        self.norms = nn.ModuleList(nn.LayerNorm(layout.num_patches, eps=1e-5) for _ in range(norms))

    def forward(self) -> list[Tensor]:
        """One (1, H, N, N) bias for each layer."""
        biases = self.table().split(1)
        if self.norms:
            biases = [norm(bias_1HPP) for norm, bias_1HPP in zip(self.norms, biases, strict=True)]
        prefix = (self.num_prefix, 0, self.num_prefix, 0)
        return [F.pad(bias_1HPP, prefix) for bias_1HPP in biases]


BIASES: dict[str, type[Relative2d] | type[Alibi2d] | None] = {
    "none": None,
    "relative2d": Relative2d,
    "alibi2d": Alibi2d,
}
BIAS_JOINS: dict[str, bool] = {"basic": False, "lape": True}
