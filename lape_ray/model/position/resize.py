"""Position tables of another resolution, resized as images are (bicubic).

Shapes: T tables, N tokens = prefix tokens + P patches, D width, L layers, R relative offsets, H heads, Y x X offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_ray.model.position.layout import Grid


def resize_absolute(table_TND: Tensor, grid: Grid, num_prefix: int) -> Tensor:
    """Resize the patch rows of a token table to another grid; prefix rows are kept.

    Raises:
        ValueError: the table's own grid is not square, as it is taken to be.
    """
    prefix_TPD, patches_TND = table_TND[:, :num_prefix], table_TND[:, num_prefix:]
    image_TDHW = _square(patches_TND, "pos_embed").permute(0, 3, 1, 2)
    resized = _bicubic(image_TDHW, grid).flatten(2).transpose(1, 2)
    return torch.cat((prefix_TPD, resized), dim=1)


def resize_relative(table_LRH: Tensor, grid: Grid) -> Tensor:
    """Resize a relative bias table's map of offsets to another grid; a ValueError where its own is not square."""
    image_LHYX = _square(table_LRH, "bias.table.table_LRH").permute(0, 3, 1, 2)
    return _bicubic(image_LHYX, (2 * grid[0] - 1, 2 * grid[1] - 1)).flatten(2).transpose(1, 2)


def _resize_key_norm(vector_P: Tensor, grid: Grid) -> Tensor:
    image = _square(vector_P[None, :, None], "bias.norms").permute(0, 3, 1, 2)
    return _bicubic(image, grid).flatten()


def resizers(grid: Grid, num_prefix: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Tell how each weight whose size depends on the grid is resized, by the beginning of its name in a network."""
    return {"pos_embed": lambda table: resize_absolute(table, grid, num_prefix), **bias_resizers(grid)}


def bias_resizers(grid: Grid) -> dict[str, Callable[[Tensor], Tensor]]:
    """Tell the same of the weights of a bias alone, whose `grid` may be a window's."""
    return {
        "bias.table.table_LRH": lambda table: resize_relative(table, grid),
        "bias.norms.": lambda vector: _resize_key_norm(vector, grid),
    }


def _bicubic(image: Tensor, size: Grid) -> Tensor:
    if image.is_meta:  # there torch takes tenths of a second, step by step in Python
        return image.new_empty((*image.shape[:2], *size))
    return F.interpolate(image.float(), size=size, mode="bicubic", align_corners=False).to(image.dtype)


def _square(rows: Tensor, name: str) -> Tensor:
    side = math.isqrt(rows.shape[1])
    if side * side != rows.shape[1]:
        raise ValueError(
            f"{name} holds {rows.shape[1]} patch rows, which is no square grid and cannot be resized"
        )
    return rows.unflatten(1, (side, side))
