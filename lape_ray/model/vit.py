"""The vision transformer: patches to tokens, blocks that receive position, a head.

Shapes: B images, C channels, H x W pixels, N tokens = prefix tokens + P patches, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.network import Network, Stage
from lape_ray.model.position import Grid, LayerPosition, PositionEmbeddings, resizers


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map; the weight is stored as the equivalent convolution's."""

    def __init__(self, *, image_size: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} does not divide by patch_size={patch_size}; change one of them"
            )
        self.patch_size = patch_size
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        size = self.patch_size
        patches = images_BCHW.unflatten(2, (-1, size)).unflatten(4, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class MeanPool(nn.Module):
    """The mean of all tokens, (B, N, D) to (B, D)."""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__()

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND.mean(dim=1)


class VisionTransformer(Network):
    """ViT and DeiT (arXiv 2010.11929, 2012.12877); with `pool` Compact Transformers, and with LaPE by `position`.

    Args:
        patch_embed: images (B, C, H, W) to patch tokens (B, P, D).
        grid: rows and columns of these patches.
        blocks: each maps tokens (B, N, D) and its `LayerPosition` to tokens.
        position: what the blocks receive of position.
        norm: of the last block's tokens.
        head: (B, D) to logits (B, K).
        cls_token, dist_token: (1, 1, D) each, before the patches.
        head_dist: the distillation token's head.
        pool: normalised tokens (B, N, D) to (B, D); None: the head reads the class token.

    The output is (B, K). With a distillation token it is (B, 2, K) while training, class token first, and
    the mean of both in evaluation, as in DeiT.
    """

    def __init__(
        self,
        *,
        patch_embed: nn.Module,
        grid: Grid,
        blocks: Iterable[nn.Module],
        position: PositionEmbeddings,
        norm: nn.Module,
        head: nn.Module,
        cls_token: nn.Parameter | None = None,
        dist_token: nn.Parameter | None = None,
        head_dist: nn.Module | None = None,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token, self.dist_token = cls_token, dist_token
        self.num_prefix = len(self._prefix())
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.pool = pool
        self.head = head
        self.head_dist = head_dist
        self.pos_embed, self.join, self.bias, self.rotary, self.bare_prefix, self.conditional = position

    def features(self, images_BCHW: Tensor) -> Tensor:
        x_BND = self._tokens(images_BCHW)
        for block, position in zip(self.blocks, self.layer_positions(), strict=True):
            x_BND = block(x_BND, position)
        x_BND = self.norm(x_BND)
        if self.join is not None and self.pos_embed is not None:
            w_1ND = self.join.behind(self.pos_embed)
            x_BND = x_BND if w_1ND is None else x_BND + w_1ND
        if self.pool is not None:
            return self.pool(x_BND)
        return x_BND[:, 0] if self.head_dist is None else x_BND[:, :2]

    def classify(self, features: Tensor) -> Tensor:
        if self.head_dist is None:
            return self.head(features)
        both_B2K = torch.stack((self.head(features[:, 0]), self.head_dist(features[:, 1])), dim=1)
        return both_B2K if self.training else both_B2K.mean(dim=1)

    def layer_positions(self) -> Iterator[LayerPosition]:
        parts = self.pos_embed, self.join, self.bias, self.rotary, self.bare_prefix, self.conditional
        return PositionEmbeddings(*parts).layers(len(self.blocks))

    def _prefix(self) -> list[nn.Parameter]:
        return [token for token in (self.cls_token, self.dist_token) if token is not None]

    def _tokens(self, images_BCHW: Tensor) -> Tensor:
        x_BPD = self.patch_embed(images_BCHW)
        prefix = [token_11D.expand(x_BPD.shape[0], -1, -1) for token_11D in self._prefix()]
        return torch.cat([*prefix, x_BPD], dim=1) if prefix else x_BPD

    def stages(self) -> list[Stage]:
        num_read = self.num_prefix if self.pool is None else None
        return [Stage(self.blocks, self.grid, self.grid, num_read)]

    def position_parameters(self) -> set[str]:
        """Name what DeiT exempts from weight decay as it does norms and biases: tokens and tables.

        So are the frequencies of a rotation, and CPVT's convolution by its authors. The relative bias is not among
        them: DeiT-style code, the paper's included, decays it.
        """
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if "." not in name or name.startswith(("rotary.", "conditional."))}

    def resizers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return resizers(self.grid, self.num_prefix - self.bare_prefix)
