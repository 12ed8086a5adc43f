"""The vision transformer: tokens from an embedding, position through the ports, blocks, a head.

Shapes: B images, C channels, N tokens = prefix tokens + P patches, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.block import Block, LayerPosition
from lape_ray.model.ports import logits_port, merge, rotation_port, token_port
from lape_ray.model.position import Grid, Layout

PREFIX_NAMES = ("cls_token", "dist_token")


class Embed(nn.Module):
    """What turns images (B, 3, H, W) into patch tokens (B, P, D), and knows their grid."""

    grid: Grid


class PatchEmbed(Embed):
    """Non-overlapping patches through one linear map; the weight is stored as the equivalent convolution's."""

    def __init__(self, *, image_size: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} does not divide by patch_size={patch_size}")
        self.patch_size = patch_size
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        size = self.patch_size
        patches = images_BCHW.unflatten(2, (-1, size)).unflatten(4, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """ViT and DeiT (arXiv 2010.11929, 2012.12877), and, with `pool`, Compact Transformers.

    Args:
        embed: images to patch tokens.
        make_block: drop-path rate -> Block.
        num_prefix: 0, 1 (class token) or 2 (class and distillation token).
        pool: maps normalised tokens (B, N, D) to (B, D); None reads the class token.
        init_prefix_std, init_position_std: standard deviations of the truncated normal initialisation.

    The output is (B, K). With a distillation token it is (B, 2, K) while training, class token first, and
    the mean of both in evaluation, as in DeiT.
    """

    def __init__(
        self,
        *,
        embed: Embed,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        make_block: Callable[[float], Block],
        drop_path: float = 0.0,
        eps: float = 1e-6,
        num_prefix: int = 1,
        pool: nn.Module | None = None,
        position: str = "learnable",
        join: str = "basic",
        bias: str = "none",
        bias_join: str = "basic",
        rotary: str = "none",
        init_prefix_std: float = 0.02,
        init_position_std: float = 0.02,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} does not divide by num_heads={num_heads}")
        self.grid, self.num_prefix, self.depth = embed.grid, num_prefix, depth
        self.patch_embed = embed
        for name in PREFIX_NAMES[:num_prefix]:
            token = torch.zeros(1, 1, embed_dim)
            if init_prefix_std > 0:
                nn.init.trunc_normal_(token, std=init_prefix_std)
            self.register_parameter(name, nn.Parameter(token))

        rates = [drop_path * layer / max(depth - 1, 1) for layer in range(depth)]
        self.blocks = nn.ModuleList(make_block(rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.pool = pool
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if num_prefix == 2 else None
        self.apply(_init_linear)

        layout = Layout(self.grid, num_prefix, depth, num_heads, embed_dim)
        port = token_port(layout, position, join, eps=eps, std=init_position_std)
        self.join = None
        if port is not None:
            table_TND, kind, self.join = port
            if kind.trained:
                self.pos_embed = nn.Parameter(table_TND)
            else:
                self.register_buffer("pos_embed", table_TND, persistent=False)
        self.bias = logits_port(layout, bias, bias_join)
        self.rotary = rotation_port(layout, rotary)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BND = self._tokens(images_BCHW)
        *layers, last = zip(self.blocks, self.layer_positions(), strict=True)
        for block, layer in layers:
            x_BND = block(x_BND, layer)
        # Where the head reads the prefix tokens, nothing depends on what the last block would make of the patches.
        block, layer = last
        x_BND = block(x_BND, layer, self.num_prefix if self.pool is None else None)
        return self._classify(self.norm(x_BND))

    def layer_positions(self) -> list[LayerPosition]:
        """What every layer receives of position, through all ports; the same for every image."""
        tokens = None if self.join is None else self.join(self.pos_embed)
        return merge(self.depth, tokens, self.bias, self.rotary)

    def _tokens(self, images_BCHW: Tensor) -> Tensor:
        x_BPD = self.patch_embed(images_BCHW)
        prefix = [
            getattr(self, name).expand(x_BPD.shape[0], -1, -1) for name in PREFIX_NAMES[: self.num_prefix]
        ]
        return torch.cat([*prefix, x_BPD], dim=1) if prefix else x_BPD

    def _classify(self, x_BND: Tensor) -> Tensor:
        if self.pool is not None:
            return self.head(self.pool(x_BND))
        if self.head_dist is None:
            return self.head(x_BND[:, 0])
        both_B2K = torch.stack((self.head(x_BND[:, 0]), self.head_dist(x_BND[:, 1])), dim=1)
        return both_B2K if self.training else both_B2K.mean(dim=1)

    def position_parameters(self) -> set[str]:
        """Names of the parameters that DeiT exempts from weight decay beside norms and biases.

        The relative bias table is not among them: DeiT-style code, the paper's included, decays it.
        """
        names = {"pos_embed", "rotary.frequencies_L2HF", *PREFIX_NAMES[: self.num_prefix]}
        return names & {name for name, _ in self.named_parameters()}


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
