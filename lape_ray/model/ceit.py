"""CeiT (arXiv 2103.11816): a convolutional stem, MLPs with a depthwise convolution, attention over the layers.

Shapes: B images, C channels, H x W pixels, N tokens = class token + P patches, D width, L layers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.block import Attention, Block, Mlp
from lape_ray.model.position import LayerPosition
from lape_ray.model.vit import VisionTransformer

STRIDE = 16  # pixels from one token to the next: convolution 2, pooling 2, patches of 4


class ConvStem(nn.Module):
    """Image-to-tokens (section 3.1): convolution 7x7, batch norm, max-pooling, and patches of 4x4 of the result."""

    def __init__(self, *, image_size: int, embed_dim: int, hidden: int = 64) -> None:
        super().__init__()
        if image_size % STRIDE:
            raise ValueError(
                f"image_size={image_size} does not divide by {STRIDE}, as the tokens of CeiT need it; change it"
            )
        self.grid = (image_size // STRIDE, image_size // STRIDE)
        parts = {
            "conv": nn.Conv2d(3, hidden, 7, stride=2, padding=3, bias=False),
            "bn": nn.BatchNorm2d(hidden),
            "pool": nn.MaxPool2d(3, stride=2, padding=1),
        }
        self.backbone = nn.Sequential(OrderedDict(parts))
        self.proj = nn.Conv2d(hidden, embed_dim, 4, stride=4)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.proj(self.backbone(images_BCHW)).flatten(2).transpose(1, 2)


class LeFF(nn.Module):
    """Locally-enhanced feed-forward layer (section 3.2): an MLP of the patches with a depthwise 3x3 between.

    The class token passes through as it is. Batch norms follow each convolution, GELU the first two, as in the
    authors' code (their text has a third).
    """

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(embed_dim, hidden_dim, 1)
        self.bn1 = nn.BatchNorm2d(hidden_dim)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.bn2 = nn.BatchNorm2d(hidden_dim)
        self.conv3 = nn.Conv2d(hidden_dim, embed_dim, 1)
        self.bn3 = nn.BatchNorm2d(embed_dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        class_B1D, patches_BPD = x_BND[:, :1], x_BND[:, 1:]
        side = math.isqrt(patches_BPD.shape[1])
        # Contiguous, so that weights' gradients have the weights' layout, in which data parallelism sends them.
        image_BCHW = patches_BPD.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        image_BCHW = F.gelu(self.bn1(self.conv1(image_BCHW)))
        image_BCHW = F.gelu(self.bn2(self.conv2(image_BCHW)))
        image_BCHW = self.bn3(self.conv3(image_BCHW))
        return torch.cat((class_B1D, image_BCHW.flatten(2).transpose(1, 2)), dim=1)


class LeFFBlock(Block):
    """The block of ViT and LaPE with a `LeFF` for an MLP: x = x + MSA(LN(x) + w); x = x + LeFF(LN(x))."""

    def __init__(self, *, embed_dim: int, mlp_ratio: float, **options: Any) -> None:
        super().__init__(embed_dim=embed_dim, mlp_ratio=mlp_ratio, **options)
        self.mlp = LeFF(embed_dim=embed_dim, hidden_dim=int(embed_dim * mlp_ratio))  # type: ignore[assignment]


class LayerAttention(nn.Module):
    """Layer-wise class token attention (section 3.3): the last layer's class token reads those of all layers.

    It has a table over layers, which is no position embedding of the image: no join changes it.
    """

    def __init__(
        self, *, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.pos_layer_embed = nn.Parameter(torch.zeros(1, depth, embed_dim))
        self.norm1 = nn.LayerNorm(embed_dim, eps=eps)
        self.attn = Attention(embed_dim=embed_dim, num_heads=num_heads, qkv_bias=True, dropout=dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=eps)
        self.mlp = Mlp(embed_dim=embed_dim, hidden_dim=int(embed_dim * mlp_ratio))

    def forward(self, classes_BLD: Tensor) -> Tensor:
        z_BLD = classes_BLD + self.pos_layer_embed
        q_BHLE, k_BHLE, v_BHLE, _ = self.attn.heads(self.attn.qkv(self.norm1(z_BLD)), LayerPosition())
        u_B1D = z_BLD[:, -1:] + self.attn.attend(q_BHLE[:, :, -1:], k_BHLE, v_BHLE, None)
        return (u_B1D + self.mlp(self.norm2(u_B1D))).squeeze(1)


class CeiT(VisionTransformer):
    """A vision transformer whose head reads the class tokens of all layers through `lca`.

    The last block's `LeFF` reaches no output, since class tokens pass through it. Its parameters count in the published
    sizes and get gradients of zero.
    """

    def __init__(self, *, lca: LayerAttention, **parts: Any) -> None:
        super().__init__(**parts)
        self.lca = lca

    def features(self, images_BCHW: Tensor) -> Tensor:
        x_BND, classes = self._tokens(images_BCHW), []
        for block, position in zip(self.blocks, self.layer_positions(), strict=True):
            x_BND = block(x_BND, position)
            classes.append(x_BND[:, 0])
        return self.norm(self.lca(torch.stack(classes, dim=1)))
