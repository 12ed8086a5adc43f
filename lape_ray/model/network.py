"""The interface of a network: what training, checkpoints and reports read of it, whatever is inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from lape_ray.model.position import Grid, LayerPosition


class Stage(NamedTuple):
    """Blocks that follow each other and see one grid of tokens."""

    blocks: nn.ModuleList
    grid: Grid
    window: Grid
    """Rows and columns of patches that see each other, on which bias and rotation are defined; the grid, or less."""
    num_read: int | None = None
    """How many of the first tokens are read after the last block; None: all."""
    merge: nn.Module | None = None
    """Makes the stage's tokens those of the next one, and its w too; None: there is no next one."""


class Network(nn.Module):
    """The interface of a network, which maps images (B, 3, H, W) to logits (B, K).

    A `VisionTransformer` has one stage, and other networks may have several. A buffer that a network keeps in its
    state dict is part of its state: checkpoints and the moving average hold it.
    """

    pos_embed: Tensor | None
    """The (T, N, D) table of the absolute position embedding."""
    num_prefix: int
    """Tokens before the patches, in every stage."""

    def stages(self) -> list[Stage]:
        """List the stages in the order of the forward pass; `training` puts cheaper blocks into their lists."""
        raise NotImplementedError

    def layer_positions(self) -> list[LayerPosition]:
        """Compute what every block receives of position, through all stages; the same for every image."""
        raise NotImplementedError

    def position_parameters(self) -> set[str]:
        """Name the parameters that weight decay exempts beside norms and biases."""
        raise NotImplementedError

    def resizers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Tell how each weight whose size depends on the resolution is resized, by the beginning of its name."""
        raise NotImplementedError
