"""A checkpoint as a folder that timm loads: safetensors and config.json."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lape_ray.config import NAMES, TrainConfig
from lape_ray.inference.official import official_state
from lape_ray.inference.predict import Predictor
from lape_ray.model import resolve
from lape_ray.model.position import ABSOLUTES
from lape_ray.model.swin import Swin
from lape_ray.model.variants import VariantSpec
from lape_ray.training.architecture import ARGUMENTS, TIMM_NAMES
from lape_ray.values.plugin import Plugin

_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")


def not_for_timm(config: TrainConfig) -> str | None:
    """Say why timm cannot load a network of this kind; None where it can."""
    model = config.model
    if model.variant not in TIMM_NAMES:
        return f"timm has no {model.variant}"
    if model.position not in ABSOLUTES:
        return f"timm has no position={model.position}"
    if model.pool is not None:
        return f"timm's {model.variant} reads a class token, and not pool={model.pool}"
    if model.join != "basic":
        return f"timm has no join={model.join}"
    swin = model.variant.startswith("swin_")
    family = "Swin" if swin else "DeiT"
    if swin and model.position != "none":
        return f"timm's Swin has no position={model.position}"
    if model.bias != "none" and not (swin and model.bias == "relative2d"):
        return f"timm's {family} has no bias={model.bias}"
    if swin and model.layer_scale:
        return "timm's Swin has no LayerScale"
    if model.bias_join != "basic":
        return f"timm has no bias_join={model.bias_join}"
    if model.rotary != "none":
        return f"timm's {family} has no rotary={model.rotary}"
    return None


def export_timm(predictor: Predictor, folder: Path) -> str:
    """Write model.safetensors and config.json in timm's layout and names; returns how to load them.

    A network that timm has (DeiT or DeiT III with join=basic, Swin with its relative bias or nothing) loads with
    `timm.create_model("local-dir:FOLDER", pretrained=True)`. Every other is written in the same layout under our names,
    and the returned line says so. Fixed tables (sincos) are written as weights, and no position as zeros.
    """
    network, spec = predictor.model.network, resolve(predictor.config.model)
    weights = dict(network.state_dict())
    reason = not_for_timm(predictor.config)
    if reason is None and isinstance(network, Swin):
        weights = _swin_names(network, spec)
    elif reason is None:
        weights["pos_embed"] = _no_position(spec) if network.pos_embed is None else network.pos_embed
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_timm_config(predictor), indent=1) + "\n")
    if reason is None:
        return f'timm.create_model("local-dir:{folder}", pretrained=True)'
    return f"names as in lape_ray; timm cannot load it, for {reason}"


def _no_position(spec: VariantSpec) -> Tensor:
    """Return zeros (1, tokens, D): timm's DeiT always adds a position embedding."""
    prefix = 0 if spec.position_on_patches else spec.num_prefix
    tokens = prefix + (spec.image_size // (spec.patch_size or 1)) ** 2
    return torch.zeros(1, tokens, spec.embed_dim)


def _swin_names(network: Swin, spec: VariantSpec) -> dict[str, Tensor]:
    """Name the weights as timm's Swin does: a merging begins a stage, and the head has a part more.

    Of a network without a bias the tables are zeros, for timm's Swin always adds one.
    """
    weights: dict[str, Tensor] = {}
    for stage, depth in enumerate(spec.depths or ()):
        window = min(spec.window_size or 1, network.grid[0] >> stage)
        table_RH = torch.zeros((2 * window - 1) ** 2, spec.num_heads << stage)
        for block in range(depth):
            weights[f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table"] = table_RH.clone()
    for name, tensor in official_state(network).items():
        name = _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample.", name)
        weights[re.sub(r"^head\.", "head.fc.", name)] = tensor
    return weights


def _timm_config(predictor: Predictor) -> dict[str, Any]:
    config, spec = predictor.config, resolve(predictor.config.model)
    return {
        "architecture": TIMM_NAMES.get(config.model.variant, config.model.variant),
        "num_classes": spec.num_classes,
        "num_features": spec.embed_dim << len(spec.depths or (0,)) - 1,
        "label_names": list(predictor.classes),
        "model_args": _timm_arguments(spec),
        "position": {**{key: getattr(config.model, key) for key in NAMES}, **_plugin(config.model.plugin)},
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
            "classifier": _classifier(spec),
        },
    }


def _plugin(plugin: Plugin | None) -> dict[str, Any]:
    """Return the text of a plugin, without a path of this machine."""
    if plugin is None:
        return {}
    return {"plugin": {**dataclasses.asdict(plugin), "name": PurePath(plugin.name).name}}


def _classifier(spec: VariantSpec) -> str | list[str]:
    if spec.depths is not None:
        return "head.fc"
    return ["head", "head_dist"] if spec.num_prefix == 2 else "head"


def _timm_arguments(spec: VariantSpec) -> dict[str, Any]:
    """Return what the network is built with, in timm's names; without what its family does not know."""
    values = {name: getattr(spec, field) for name, field in ARGUMENTS.items()}
    foreign = ("depth", "init_values") if spec.depths else ("depths", "window_size")
    known = {name: value for name, value in values.items() if name not in foreign and value is not None}
    if spec.depths:
        known["num_heads"] = [spec.num_heads << stage for stage in range(len(spec.depths))]
        return known
    return known | {
        "init_values": spec.layer_scale or None
    }  # timm's DeiT III has LayerScale unless it is told
