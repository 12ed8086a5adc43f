"""The interface of a network: what training, checkpoints and reports read of it, whatever is inside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from lape_ray.model.position import Grid, LayerPosition

_OF_BLOCK = re.compile(
    r"(?:layers\.(\d+)\.)?(?:blocks|join\.norms|bias\.(?:norms|table\.mlps|layers))\.(\d+)\."
)
_OF_STAGE = re.compile(r"layers\.(\d+)\.(downsample\.)?")
_BEHIND_NORM = ("head.", "head_dist.", "pool.")


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
    """The interface of a network, which maps images (B, 3, H, W) to logits (B, K): `classify(features(images))`.

    A `VisionTransformer` has one stage, and other networks may have several. A buffer that a network keeps in its
    state dict is part of its state: checkpoints and the moving average hold it.
    """

    pos_embed: Tensor | None
    """The (T, N, D) table of the absolute position embedding."""
    num_prefix: int
    """Tokens before the patches, in every stage."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.classify(self.features(images_BCHW))

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Compute what the head reads of images, after the last norm: (B, D), or (B, 2, D) where two heads read."""
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Compute the logits of `features`; uses the head alone."""
        raise NotImplementedError

    def stages(self) -> list[Stage]:
        """List the stages in the order of the forward pass; `training` puts cheaper blocks into their lists."""
        raise NotImplementedError

    def layer_positions(self) -> Iterator[LayerPosition]:
        """Compute what every block receives of position, through all stages; the same for every image.

        One after another, for biases of all layers at once could fill the memory at a high resolution.
        """
        raise NotImplementedError

    def position_parameters(self) -> set[str]:
        """Name the parameters that weight decay exempts beside norms and biases."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """Return the number of a parameter's layer: 0 the embeddings, 1 to L the blocks of all stages, L + 1 the head.

        A block's PE-LNs are part of it. As in timm, the last norm (and CeiT's attention over layers) goes with the last
        block, and a merging with the block behind it. One parameter that holds the tables of several blocks goes with
        the embeddings, in a stage of Swin with the stage's first block.
        """
        first = [0, *accumulate(len(stage.blocks) for stage in self.stages())]
        if match := _OF_BLOCK.match(name):
            return first[int(match[1] or 0)] + int(match[2]) + 1
        if match := _OF_STAGE.match(name):
            return first[int(match[1]) + bool(match[2])] + 1
        if name.startswith(_BEHIND_NORM):
            return first[-1] + 1
        return first[-1] if name.startswith(("norm.", "lca.")) else 0

    def resizers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Tell how each weight whose size depends on the resolution is resized, by the beginning of its name."""
        raise NotImplementedError
