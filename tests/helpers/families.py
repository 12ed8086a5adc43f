"""A small network of each family."""

from __future__ import annotations

from typing import Any

from lape_ray.model.position import JOINS, PREFIX_JOINS, STAGED_JOINS, valid_joins

SMALL: dict[str, dict[str, Any]] = {
    name: {"embed_dim": 32, "num_heads": 2, "num_classes": 5, "image_size": 32, "variant": variant, **sizes}
    for name, variant, sizes in (
        ("deit", "deit_tiny", {"patch_size": 8, "depth": 3}),
        ("distilled", "deit_tiny_distilled", {"patch_size": 8, "depth": 3}),
        ("vit_lite", "vit_lite_7_4", {"patch_size": 8, "depth": 3}),
        ("cvt", "cvt_7_4", {"patch_size": 8, "depth": 3}),
        ("cct", "cct_7_3x2", {"depth": 3}),
        ("t2t", "t2t_vit_7", {"depth": 3}),
        ("ceit", "ceit_tiny", {"depth": 3}),
        ("swin", "swin_tiny", {"patch_size": 2, "window_size": 2, "depths": (2, 2, 1, 1)}),
    )
}


JOINS_OF = {"cvt": JOINS, "cct": JOINS, "swin": STAGED_JOINS}
"""Of families without class token; all others have `PREFIX_JOINS`."""


def joins_of(family: str) -> tuple[str, ...]:
    """List the joins that a learnable table has in a family."""
    return valid_joins("learnable", JOINS_OF.get(family, PREFIX_JOINS))
