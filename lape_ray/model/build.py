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
from lape_ray.model.network import Network
from lape_ray.model.plugin import build_checked
from lape_ray.model.position import Grid, Layout, build_position, build_staged_position
from lape_ray.model.swin import PatchMerging, Swin, SwinStage, WindowBlock
from lape_ray.model.variants import VariantSpec, resolve
from lape_ray.model.vit import VisionTransformer


def build_model(config: ModelConfig, *, grid: Grid | None = None) -> Network:
    """Build a freshly initialised network; draws from torch's global generator, in an order that seeds rest on.

    Args:
        grid: rows and columns of tokens of images that are no squares; None: those of `image_size`.

    Raises:
        ValueError: the sizes or the position embeddings do not fit each other; says how to mend it.
    """
    if config.plugin is not None:
        return build_checked(config.plugin, partial(_build, config, grid))
    return _build(config, grid)


def _build(config: ModelConfig, grid: Grid | None) -> Network:
    spec = resolve(config)
    if grid is not None and spec.square_only:
        raise ValueError(
            f"{config.variant} takes square images only, into which it puts its tokens back; "
            f"leave out the grid of {grid[0]} x {grid[1]} tokens"
        )
    return _build_vit(spec, config, grid) if spec.depths is None else _build_swin(spec, config)


def _build_vit(spec: VariantSpec, config: ModelConfig, grid: Grid | None) -> VisionTransformer:
    width = spec.embed_dim
    patch_embed = _patch_embed(spec)
    grid = grid or patch_embed.grid
    pool = None if spec.pool is None else spec.pool(embed_dim=width)
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
        **_position_options(spec, config),
        on_patches=spec.position_on_patches,
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


def _position_options(spec: VariantSpec, config: ModelConfig) -> dict[str, Any]:
    names = {name: getattr(config, name) for name in ("position", "join", "bias", "bias_join", "rotary")}
    return {**names, "eps": spec.eps, "std": spec.init_position_std}


def _build_swin(spec: VariantSpec, config: ModelConfig) -> Swin:
    """Build Swin's stages: from each to the next, rows and columns are halved, width and heads doubled."""
    patch_embed = _patch_embed(spec)
    layouts = [
        Layout((side, side), 0, depth, spec.num_heads << stage, spec.embed_dim << stage)
        for stage, (side, depth) in enumerate(stage_sides(spec, patch_embed.grid[0]))
    ]
    windows = [each._replace(grid=(min(each.grid[0], spec.window_size or 1),) * 2) for each in layouts]
    positions = build_staged_position(layouts, windows, **_position_options(spec, config))
    width, rates = layouts[-1].embed_dim, iter(_drop_path_rates(spec))
    stages = [
        SwinStage(
            blocks=[
                _window_block(spec, layout, window.grid[0], block, next(rates))
                for block in range(layout.depth)
            ],
            window=window.grid,
            position=position,
            downsample=None
            if layout is layouts[-1]
            else PatchMerging(side=layout.grid[0], embed_dim=layout.embed_dim, eps=spec.eps),
        )
        for layout, window, position in zip(layouts, windows, positions, strict=True)
    ]
    network = Swin(
        patch_embed=patch_embed,
        grid=patch_embed.grid,
        stages=stages,
        pos_embed=positions[0].pos_embed,
        norm=nn.LayerNorm(width, eps=spec.eps),
        head=nn.Linear(width, spec.num_classes),
    )
    return network.apply(_init_linear)


def stage_sides(spec: VariantSpec, side: int) -> list[tuple[int, int]]:
    """List the side of each stage's grid and its number of blocks; a ValueError where windows do not fill a grid."""
    depths, window = spec.depths or (), spec.window_size or 1
    found = []
    for stage, depth in enumerate(depths):
        odd = stage + 1 < len(depths) and side % 2
        if side < 1 or odd or side % min(side, window):
            multiple = (spec.patch_size or 1) * (window << len(depths) - 1)
            raise ValueError(
                f"image_size={spec.image_size} gives stage {stage} a grid of {side} x {side}, which windows of "
                f"{window} do not fill or merging cannot halve; choose a multiple of {multiple}, or another "
                "model.window_size"
            )
        found.append((side, depth))
        side //= 2
    return found


def _window_block(
    spec: VariantSpec, layout: Layout, window: int, block: int, drop_path: float
) -> WindowBlock:
    """Make a block; every second one is shifted by half a window, unless one window is the whole grid."""
    side = layout.grid[0]
    return WindowBlock(
        side=side,
        window=window,
        shift=window // 2 if block % 2 and side > window else 0,
        embed_dim=layout.embed_dim,
        num_heads=layout.num_heads,
        mlp_ratio=spec.mlp_ratio,
        eps=spec.eps,
        qkv_bias=spec.qkv_bias,
        attention_dropout=spec.attention_dropout,
        drop_path=drop_path,
        layer_scale=spec.layer_scale,
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
    return [
        spec.block(
            embed_dim=spec.embed_dim,
            num_heads=spec.num_heads,
            mlp_ratio=spec.mlp_ratio,
            eps=spec.eps,
            qkv_bias=spec.qkv_bias,
            attention_dropout=spec.attention_dropout,
            drop_path=rate,
            layer_scale=spec.layer_scale,
        )
        for rate in _drop_path_rates(spec)
    ]


def _drop_path_rates(spec: VariantSpec) -> list[float]:
    """Compute each block's rate of stochastic depth: `spec.drop_path`, or up to it linearly from 0."""
    if spec.drop_path_rule == "constant":
        return [spec.drop_path] * spec.depth
    return [spec.drop_path * layer / max(spec.depth - 1, 1) for layer in range(spec.depth)]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
