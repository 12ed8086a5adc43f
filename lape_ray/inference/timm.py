"""A checkpoint as a folder that timm loads: safetensors and config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lape_ray.config import TrainConfig
from lape_ray.inference.predict import Predictor
from lape_ray.model import resolve
from lape_ray.model.variants import VariantSpec
from lape_ray.training.architecture import ARGUMENTS, TIMM_NAMES


def not_for_timm(config: TrainConfig) -> str | None:
    """Say why timm cannot load a network of this kind; None where it can."""
    model = config.model
    if model.variant.startswith("swin_"):
        return "a Swin is not written in timm's names"
    if model.variant not in TIMM_NAMES:
        return f"timm has no {model.variant}"
    if model.join != "basic":
        return f"timm has no join={model.join}"
    if model.bias != "none":
        return f"timm's DeiT has no bias={model.bias}"
    if model.rotary != "none":
        return f"timm's DeiT has no rotary={model.rotary}"
    return None


def export_timm(predictor: Predictor, folder: Path) -> str:
    """Write model.safetensors and config.json in timm's layout and names; returns how to load them.

    A network that timm has (DeiT with join=basic) loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
    Every other network is written in the same layout under our names, and the returned line says so. Fixed tables
    (sincos) are written as weights, and no position as zeros.
    """
    network = predictor.model.network
    weights = dict(network.state_dict())
    reason = not_for_timm(predictor.config)
    if reason is None:
        table = getattr(network, "pos_embed", None)
        weights["pos_embed"] = table if isinstance(table, Tensor) else _no_position(predictor.config)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_timm_config(predictor), indent=1) + "\n")
    if reason is None:
        return f'timm.create_model("local-dir:{folder}", pretrained=True)'
    return f"names as in lape_ray; timm cannot load it, for {reason}"


def _no_position(config: TrainConfig) -> Tensor:
    """Return zeros (1, tokens, D): timm's DeiT always adds a position embedding."""
    spec = resolve(config.model)
    prefix = 0 if spec.position_on_patches else spec.num_prefix
    tokens = prefix + (spec.image_size // (spec.patch_size or 1)) ** 2
    return torch.zeros(1, tokens, spec.embed_dim)


def _timm_config(predictor: Predictor) -> dict[str, Any]:
    config, spec = predictor.config, resolve(predictor.config.model)
    return {
        "architecture": TIMM_NAMES.get(config.model.variant, config.model.variant),
        "num_classes": spec.num_classes,
        "num_features": spec.embed_dim,
        "label_names": list(predictor.classes),
        "model_args": _timm_arguments(spec),
        "position": {
            key: getattr(config.model, key) for key in ("position", "join", "bias", "bias_join", "rotary")
        },
        "pretrained_cfg": {
            "input_size": [3, spec.image_size, spec.image_size],
            "fixed_input_size": True,
            "num_classes": spec.num_classes,
            "mean": list(config.data.mean),
            "std": list(config.data.std),
            "crop_pct": config.data.eval_crop,
            "crop_mode": "center",
            "interpolation": "bilinear" if config.data.interpolation == "bilinear" else "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if spec.num_prefix == 2 else "head",
        },
    }


def _timm_arguments(spec: VariantSpec) -> dict[str, Any]:
    """Return what the network is built with, in timm's names; without what its family does not know."""
    values = {name: getattr(spec, field) for name, field in ARGUMENTS.items()}
    foreign = ("depth",) if spec.depths else ("depths", "window_size")
    known = {name: value for name, value in values.items() if name not in foreign and value is not None}
    return known | {
        "init_values": spec.layer_scale or None
    }  # timm's DeiT III has LayerScale unless it is told
