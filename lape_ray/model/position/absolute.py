"""Absolute position embeddings: a table w_TND that a join adds to the tokens.

Shapes: T tables (1, or one a layer), N tokens = prefix tokens + patches in row-major order, D width, F frequencies,
I rows or columns of the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lape_ray.model.position.layout import Layout


def sincos1d_table(num_tokens: int, dim: int) -> Tensor:
    """Compute the (N, D) sines and cosines of the token's index (arXiv 1706.03762, section 3.5).

    Prefix tokens count: a class token is index 0 and the patches follow.
    """
    index_N1 = torch.arange(num_tokens, dtype=torch.float64).unsqueeze(1)
    frequency_F = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle_NF = index_N1 * frequency_F
    return torch.stack((angle_NF.sin(), angle_NF.cos()), dim=-1).flatten(1)[:, :dim].float()


def sincos2d_table(layout: Layout) -> Tensor:
    """Compute the (N, D) table whose first half encodes the column and second half the row; prefix rows are zero.

    Sines and cosines alternate within each half, as in the paper's code.

    Raises:
        ValueError: D does not divide by 4.
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
class AbsoluteKind:
    """One kind of table: whether it is trained, whether prefix tokens have rows of zeros, and how it is made."""

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


ABSOLUTES: dict[str, AbsoluteKind | None] = {
    "none": None,
    "learnable": AbsoluteKind(trained=True, zero_prefix=False, make=_learnable),
    "sincos1d": AbsoluteKind(trained=False, zero_prefix=False, make=_sincos1d),
    "sincos2d": AbsoluteKind(trained=False, zero_prefix=True, make=_sincos2d),
}


def check_fixed_table(found_TND: Tensor, expected_TND: Tensor) -> None:
    """Refuse a checkpoint whose table stands where this network computes a fixed one, and holds something else.

    A table of another shape is let pass: it is of another resolution, and nothing of it is loaded.

    Raises:
        ValueError: the tables differ.
    """
    if found_TND.shape == expected_TND.shape and not torch.allclose(
        found_TND.float(), expected_TND.cpu(), atol=1e-4
    ):
        trained = "/".join(name for name, kind in ABSOLUTES.items() if kind is not None and kind.trained)
        fixed = "/".join(name for name, kind in ABSOLUTES.items() if kind is not None and not kind.trained)
        raise ValueError(
            "the checkpoint's pos_embed is not the fixed table of this model; "
            f"choose model.position={trained} instead of {fixed}"
        )
