"""The network that timm's config.json next to a file of weights names: by timm's architecture, or by our own entry."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from lape_ray.config import NETWORK_FIELDS, ModelConfig, Variant
from lape_ray.model import resolve
from lape_ray.training.classes import timm_config
from lape_ray.training.preprocessing import timm_fields
from lape_ray.values.plugin import Plugin
from lape_ray.values.typed import typed

_SIZES = ("tiny", "small", "base")
TIMM_NAMES: Mapping[str, str] = {
    **{
        f"deit_{size}{kind}": f"deit_{size}{kind}_patch16_224"
        for size in _SIZES
        for kind in ("", "_distilled")
    },
    **{f"deit3_{size}": f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")},
    **{f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in _SIZES},
}
"""Variants that timm has, and its names for them."""
_PLAIN = re.compile(r"(deit3?|vit)_([a-z]+(?:_distilled)?)_patch(\d+)_\d+")  # timm's ViT is DeiT's network
_SWIN = re.compile(r"(swin_[a-z]+)_patch4_window(\d+)_\d+")
ARGUMENTS = {
    "embed_dim": "embed_dim", "depth": "depth", "depths": "depths", "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio", "patch_size": "patch_size", "window_size": "window_size", "init_values": "layer_scale",
    "img_size": "image_size",
}  # fmt: skip
"""timm's names of a network's arguments, and the fields of a config that they are here."""


def timm_network(file: Path) -> dict[str, Any]:
    """Return the `model.*` fields of the network of a file of weights; empty: its config.json names none of ours.

    Raises:
        ValueError: our own entry in it is damaged; names the file.
    """
    whole = timm_config(file)
    ours = whole.get("position")
    found = _named(str(whole.get("architecture")), known=get_args(Variant) if isinstance(ours, dict) else ())
    if not found:
        return {}
    try:
        if isinstance(ours, dict):
            found |= {key: str(ours[key]) for key in NETWORK_FIELDS if key in ours} | {"layer_scale": 0.0}
            found["plugin"] = typed(Plugin | None, ours.get("plugin"), "position.plugin", defaults=True)
        arguments = whole.get("model_args")
        for name, value in arguments.items() if isinstance(arguments, dict) else ():
            if name not in ARGUMENTS:
                return {}  # a network that timm builds in another way
            if name == "num_heads" and isinstance(value, list):
                value = value[0]  # of the first stage; from each to the next they double
            if value is not None:
                found[ARGUMENTS[name]] = tuple(value) if isinstance(value, list) else value
        return {f"model.{key}": value for key, value in _differing(found).items()}
    except (TypeError, ValueError) as error:
        if not isinstance(ours, dict):
            return {}
        raise ValueError(
            f"{file.parent / 'config.json'}: {error}; mend or remove it, and give --model.* options"
        ) from None


def network_of(file: Path) -> ModelConfig | None:
    """Return the network of a file of weights, where its config.json names it: its classes and image size as well."""
    if not (fields := timm_network(file)):
        return None
    fields = {**timm_fields(file), **fields}
    return ModelConfig(**{key[6:]: value for key, value in fields.items() if key.startswith("model.")})


def _named(architecture: str, *, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields that a name of timm's stands for, or one of our own `known`; empty: it is another's."""
    architecture = architecture.partition(".")[0]  # behind it stands which weights
    if architecture in known:
        return {"variant": architecture}
    if match := _PLAIN.fullmatch(architecture):
        variant = f"{match[1].replace('vit', 'deit')}_{match[2]}"
        found = {"variant": variant, "position": "learnable", "join": "basic", "patch_size": int(match[3])}
    elif match := _SWIN.fullmatch(architecture):
        found = {"variant": match[1], "position": "none", "bias": "relative2d", "window_size": int(match[2])}
    else:
        return {}
    return found if found["variant"] in get_args(Variant) else {}


def _differing(found: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a network's fields what its variant has anyway."""
    variant = resolve(ModelConfig(variant=found["variant"]))
    own = dataclasses.asdict(ModelConfig(variant=found["variant"])) | vars(variant)
    ModelConfig(**found)  # refuses what is no network
    if variant.depths is not None:
        found = {key: value for key, value in found.items() if key != "depth"}
    kept = ("variant", "position", "join")
    return {key: value for key, value in found.items() if key in kept or value != own.get(key)}
