"""The input and output of position embeddings: a `Layout` in, a `LayerPosition` for each block out.

Shapes: B images, N tokens = prefix tokens + P patches in row-major order, D width, H heads, E = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of patches."""


class Layout(NamedTuple):
    """The sizes of blocks that see one grid of patches; a network of several stages has one for each stage."""

    grid: Grid
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
        """Give the row and the column of every patch, each (P,)."""
        height, width = self.grid
        return torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)


class Channels(Protocol):
    """Append channels to queries and keys."""

    def rows(self) -> Tensor:
        """Give the weight (H C, D) by which C numbers for each head are made of what attention reads."""

    def extend(self, q_NE: Tensor, k_NE: Tensor, made_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Append channels, from these numbers (..., H, N, C)."""


class LayerPosition(NamedTuple):
    """The position inputs of one block. Every part is optional; tensors do not depend on the image."""

    residual_1ND: Tensor | None = None
    """Added to the residual stream before the block."""
    attention_1ND: Tensor | None = None
    """Added to the normalised tokens that attention reads; never enters the residual stream."""
    logits_1HNN: Tensor | None = None
    """Added to the attention logits."""
    rotation: tuple[Tensor, Tensor] | None = None
    """Cosines and sines, each (H or 1, N, E/2), by which queries and keys are rotated."""
    conditional: Callable[[Tensor], Tensor] | None = None
    """Makes of the residual stream before the block, (B, N, D), what is added to it."""

    channels: Channels | None = None
    """Appends channels to queries and keys, after their rotation, and so a summand to the logits."""

    contextual: Callable[[Tensor], Tensor] | None = None
    """Makes of the heads' queries (..., N, E) what is added to the logits before their scale, (..., N, N)."""

    def enter(self, x_BND: Tensor) -> Tensor:
        """Add to the residual stream what is added before the block."""
        if self.residual_1ND is not None:
            x_BND = x_BND + self.residual_1ND
        return x_BND if self.conditional is None else x_BND + self.conditional(x_BND)

    @property
    def depends_on_image(self) -> bool:
        return any(part is not None for part in (self.conditional, self.channels, self.contextual))
