"""The network families and sizes by name, and a `ModelConfig`'s overrides applied to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lape_ray.config import DropPathRule, ModelConfig
from lape_ray.model import ceit, t2t
from lape_ray.model.block import Block
from lape_ray.model.compact import ConvTokenizer, ResidualNormBlock, SequencePool
from lape_ray.model.swin import NormedPatchEmbed
from lape_ray.model.vit import MeanPool, PatchEmbed


@dataclass(frozen=True, kw_only=True)
class VariantSpec:
    """A named network. Fields above the line can be overridden by a `ModelConfig`."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    image_size: int = 224
    patch_size: int | None = 16  # None: the tokenizer knows no patches
    num_classes: int = 1000
    drop_path: float = 0.0
    drop_path_rule: DropPathRule = "linear"
    layer_scale: float = 0.0  # initial factor of a block's branches; 0: they have none
    attention_dropout: float = 0.0
    depths: tuple[int, ...] | None = None  # blocks of each stage; heads and width double from stage to stage
    window_size: int | None = None
    # ---
    num_prefix: int = 1
    tokenizer: Callable[..., Any] = PatchEmbed
    """Makes images to tokens on its `grid`; takes image_size, embed_dim, and patch_size where that is not None."""
    tokenizer_stride: int = 0  # pixels from one token to the next where there is no patch_size
    qkv_bias: bool = True
    eps: float = 1e-6
    block: type[Block] = Block
    pool: type[nn.Module] | None = None
    """Makes the tokens one; None: the head reads the class token."""
    layer_attention: bool = False
    init_prefix_std: float = 0.02
    init_position_std: float = 0.02
    position_on_patches: bool = False
    """Whether the prefix tokens have no row in the position table, and nothing is added to them."""
    square_only: bool = False
    """Whether it puts its tokens back into a square image, so that it takes no other grid."""

    @property
    def token_stride(self) -> int:
        """Pixels from one token to the next."""
        return self.patch_size or self.tokenizer_stride


OVERRIDABLE = (
    "embed_dim", "depth", "num_heads", "mlp_ratio", "image_size", "patch_size", "num_classes", "drop_path",
    "drop_path_rule", "layer_scale", "attention_dropout", "depths", "window_size",
)  # fmt: skip


def _deit(embed_dim: int, num_heads: int, num_prefix: int = 1) -> VariantSpec:
    return VariantSpec(embed_dim=embed_dim, depth=12, num_heads=num_heads, num_prefix=num_prefix)


def _deit3(embed_dim: int, depth: int, num_heads: int) -> VariantSpec:
    return VariantSpec(
        embed_dim=embed_dim, depth=depth, num_heads=num_heads, drop_path_rule="constant", layer_scale=1e-4,
        position_on_patches=True,
    )  # fmt: skip


def _compact(depth: int, **kwargs: Any) -> VariantSpec:
    """Fill in what all Compact Transformers share: a norm on the residual stream, no qkv bias, wide position."""
    return VariantSpec(
        embed_dim=256, depth=depth, num_heads=4, mlp_ratio=2.0, image_size=32, num_classes=10,
        attention_dropout=0.1, qkv_bias=False, eps=1e-5, block=ResidualNormBlock,
        init_prefix_std=0.0, init_position_std=0.2, **kwargs,
    )  # fmt: skip


def _cct(depth: int, layers: int) -> VariantSpec:
    tokenizer = partial(ConvTokenizer, layers=layers)
    return _pooled(depth, patch_size=None, tokenizer=tokenizer, tokenizer_stride=2**layers)


def _t2t(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float) -> VariantSpec:
    return VariantSpec(
        embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, patch_size=None,
        tokenizer=t2t.TokensToToken, tokenizer_stride=t2t.STRIDE, qkv_bias=False, eps=1e-5, square_only=True,
    )  # fmt: skip


def _ceit(embed_dim: int, num_heads: int) -> VariantSpec:
    return VariantSpec(
        embed_dim=embed_dim, depth=12, num_heads=num_heads, patch_size=None, tokenizer=ceit.ConvStem,
        tokenizer_stride=ceit.STRIDE, block=ceit.LeFFBlock, layer_attention=True, square_only=True,
    )  # fmt: skip


def _swin(embed_dim: int, depths: tuple[int, ...], num_heads: int) -> VariantSpec:
    return VariantSpec(
        embed_dim=embed_dim, depth=sum(depths), depths=depths, num_heads=num_heads, patch_size=4, window_size=7,
        num_prefix=0, tokenizer=NormedPatchEmbed, eps=1e-5, square_only=True,
    )  # fmt: skip


def _pooled(depth: int, **kwargs: Any) -> VariantSpec:
    return _compact(depth, num_prefix=0, pool=SequencePool, **kwargs)


VARIANTS: dict[str, VariantSpec] = {
    "deit_tiny": _deit(192, 3),
    "deit_small": _deit(384, 6),
    "deit_base": _deit(768, 12),
    "deit_tiny_distilled": _deit(192, 3, num_prefix=2),
    "deit_small_distilled": _deit(384, 6, num_prefix=2),
    "deit_base_distilled": _deit(768, 12, num_prefix=2),
    "deit3_small": _deit3(384, 12, 6),
    "deit3_medium": _deit3(512, 12, 8),
    "deit3_base": _deit3(768, 12, 12),
    "deit3_large": _deit3(1024, 24, 16),
    "vit_lite_6_4": _compact(6, patch_size=4),
    "vit_lite_7_4": _compact(7, patch_size=4),
    "cvt_7_4": _pooled(7, patch_size=4),
    "cct_6_3x1": _cct(6, layers=1),
    "cct_7_3x1": _cct(7, layers=1),
    "cct_7_3x2": _cct(7, layers=2),
    "t2t_vit_7": _t2t(256, 7, 4, 2.0),
    "t2t_vit_12": _t2t(256, 12, 4, 2.0),
    "t2t_vit_14": _t2t(384, 14, 6, 3.0),
    "ceit_tiny": _ceit(192, 3),
    "ceit_small": _ceit(384, 6),
    "swin_tiny": _swin(96, (2, 2, 6, 2), 3),
    "swin_small": _swin(96, (2, 2, 18, 2), 3),
    "swin_base": _swin(128, (2, 2, 18, 2), 4),
}


def _mean_of_patches(spec: VariantSpec, variant: str) -> dict[str, Any]:
    """Say what pool=gap changes; a ValueError where it does not apply."""
    why = None
    if spec.depths is not None:
        why = "whose head reads the mean anyway"
    elif spec.layer_attention:
        why = "whose attention over the layers reads class tokens"
    elif spec.num_prefix > 1:
        why = "of whose two heads each reads a token"
    if why is not None:
        raise ValueError(f"pool=gap does not apply to {variant}, {why}; leave model.pool out")
    return {"num_prefix": 0, "pool": MeanPool}


def resolve(config: ModelConfig) -> VariantSpec:
    """Look up the variant and apply the config's overrides; a ValueError where one does not apply."""
    spec = VARIANTS[config.variant]
    if spec.patch_size is None and config.patch_size is not None:
        raise ValueError(
            f"patch_size={config.patch_size} does not apply to {config.variant}, whose tokens are no patches; "
            "leave model.patch_size out"
        )
    if spec.depths is None and (config.depths, config.window_size) != (None, None):
        raise ValueError(
            f"depths and window_size do not apply to {config.variant}, which has one stage; set model.depth, or choose "
            "a swin_* variant"
        )
    if spec.depths is not None and config.depth is not None:
        raise ValueError(
            f"depth={config.depth} does not apply to {config.variant}, which has several stages; set model.depths"
        )
    chosen: dict[str, Any] = {
        name: getattr(config, name) for name in OVERRIDABLE if getattr(config, name) is not None
    }
    if config.depths is not None:
        chosen["depth"] = sum(config.depths)
    if config.pool is not None:
        chosen |= _mean_of_patches(spec, config.variant)
    return dataclasses.replace(spec, **chosen)
