"""Build a network from a `ModelConfig`: names are looked up here, and modules handed in.

Shapes: D width, K classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from lape_ray.config import ModelConfig
from lape_ray.model.block import Block
from lape_ray.model.ceit import CeiT, LayerAttention
from lape_ray.model.compact import SequencePool
from lape_ray.model.network import Network
from lape_ray.model.position import Layout, build_position
from lape_ray.model.variants import VariantSpec, resolve
from lape_ray.model.vit import VisionTransformer


def build_model(config: ModelConfig) -> Network:
    """Build a freshly initialised network; draws from torch's global generator, in an order that seeds rest on.

    Raises:
        ValueError: the sizes or the position embeddings do not fit each other; says how to mend it.
    """
    spec = resolve(config)
    width = spec.embed_dim
    patch_embed = _patch_embed(spec)
    grid = patch_embed.grid
    pool = SequencePool(embed_dim=width) if spec.sequence_pool else None
    tokens = [_prefix_token(width, spec.init_prefix_std) for _ in range(spec.num_prefix)]
    cls_token, dist_token, *_ = [*tokens, None, None]
    blocks = nn.ModuleList(_blocks(spec))
    head = nn.Linear(width, spec.num_classes)
    head_dist = None if dist_token is None else nn.Linear(width, spec.num_classes)
    lca = _layer_attention(spec)
    for module in (patch_embed, blocks, pool, head, head_dist, lca):
        if module is not None:
            module.apply(_init_linear)
    position = build_position(
        Layout(grid, spec.num_prefix, spec.depth, spec.num_heads, width),
        position=config.position,
        join=config.join,
        bias=config.bias,
        bias_join=config.bias_join,
        rotary=config.rotary,
        eps=spec.eps,
        std=spec.init_position_std,
    )
    network = VisionTransformer if lca is None else partial(CeiT, lca=lca)
    return network(
        patch_embed=patch_embed,
        grid=grid,
        blocks=blocks,
        position=position,
        norm=nn.LayerNorm(width, eps=spec.eps),
        head=head,
        cls_token=cls_token,
        dist_token=dist_token,
        head_dist=head_dist,
        pool=pool,
    )


def _patch_embed(spec: VariantSpec) -> Any:
    patches = {} if spec.patch_size is None else {"patch_size": spec.patch_size}
    return spec.tokenizer(image_size=spec.image_size, embed_dim=spec.embed_dim, **patches)


def _layer_attention(spec: VariantSpec) -> LayerAttention | None:
    if not spec.layer_attention:
        return None
    return LayerAttention(
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_ratio,
        eps=spec.eps,
        dropout=spec.attention_dropout,
    )


def _prefix_token(width: int, std: float) -> nn.Parameter:
    token_11D = torch.zeros(1, 1, width)
    return nn.Parameter(nn.init.trunc_normal_(token_11D, std=std) if std > 0 else token_11D)


def _blocks(spec: VariantSpec) -> list[Block]:
    """Make the blocks; stochastic depth grows linearly from 0 to `spec.drop_path`."""
    rates = [spec.drop_path * layer / max(spec.depth - 1, 1) for layer in range(spec.depth)]
    return [
        spec.block(
            embed_dim=spec.embed_dim,
            num_heads=spec.num_heads,
            mlp_ratio=spec.mlp_ratio,
            eps=spec.eps,
            qkv_bias=spec.qkv_bias,
            attention_dropout=spec.attention_dropout,
            drop_path=rate,
        )
        for rate in rates
    ]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
