"""Position embeddings of the tokens port: a table w_TND that a join carries into the blocks.

Shapes: T tables (1, or one a layer), N tokens = prefix tokens + patches in row-major order, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


class Layout(NamedTuple):
    """The sizes of a network that its position embeddings are made for."""

    grid: Grid
    """Rows and columns of patches."""
    num_prefix: int
    """Tokens before the patches: class and distillation tokens."""
    depth: int
    num_heads: int
    embed_dim: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_patches

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def patch_rows_columns(self) -> tuple[Tensor, Tensor]:
        """The row and the column of every patch, each (P,)."""
        height, width = self.grid
        return torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)


def sincos1d_table(num_tokens: int, dim: int) -> Tensor:
    """(N, D) sines and cosines of the token's index (arXiv 1706.03762, section 3.5).

    Prefix tokens count: a class token is index 0 and the patches follow.
    """
    index_N1 = torch.arange(num_tokens, dtype=torch.float64).unsqueeze(1)
    frequency_F = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle_NF = index_N1 * frequency_F
    return torch.stack((angle_NF.sin(), angle_NF.cos()), dim=-1).flatten(1)[:, :dim].float()


def sincos2d_table(layout: Layout) -> Tensor:
    """(N, D) table whose first half encodes the column and second half the row; prefix rows are zero.

    D must divide by 4. Sines and cosines alternate within each half, as in the paper's code.
    """
    dim = layout.embed_dim
    if dim % 4:
        raise ValueError(f"embed_dim={dim} does not divide by 4, which position=sincos2d needs")
    row_P, column_P = layout.patch_rows_columns()
    axis_ID = sincos1d_table(max(layout.grid), dim // 2)
    return torch.cat(
        (torch.zeros(layout.num_prefix, dim), torch.cat((axis_ID[column_P], axis_ID[row_P]), dim=1))
    )


@dataclass(frozen=True)
class TokenTable:
    """One kind of token embedding: is it trained, has it rows of zeros, and how is it made."""

    trained: bool
    zero_prefix: bool
    make: Callable[[Layout, int, float], Tensor]
    """(layout, T, std) -> (T, N, D); std is that of a trained table's truncated normal initialisation."""


def _learnable(layout: Layout, tables: int, std: float) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(tables, layout.num_tokens, layout.embed_dim), std=std)


def _sincos1d(layout: Layout, tables: int, std: float) -> Tensor:
    return sincos1d_table(layout.num_tokens, layout.embed_dim).repeat(tables, 1, 1)


def _sincos2d(layout: Layout, tables: int, std: float) -> Tensor:
    return sincos2d_table(layout).repeat(tables, 1, 1)


POSITIONS: dict[str, TokenTable | None] = {
    "none": None,
    "learnable": TokenTable(trained=True, zero_prefix=False, make=_learnable),
    "sincos1d": TokenTable(trained=False, zero_prefix=False, make=_sincos1d),
    "sincos2d": TokenTable(trained=False, zero_prefix=True, make=_sincos2d),
}
