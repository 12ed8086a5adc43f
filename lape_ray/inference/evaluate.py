"""Exact accuracy of a checkpoint of any origin, on this machine's device, without Ray and without a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lape_ray.config import TrainConfig, replace_fields
from lape_ray.data.loader import build_loader
from lape_ray.data.ready import Normalized
from lape_ray.inference.predict import load_network
from lape_ray.model import resolve
from lape_ray.recipes import recipe
from lape_ray.training.checkpoint import read_metadata
from lape_ray.training.loop import evaluate
from lape_ray.training.preflight import check_split
from lape_ray.training.state import autocast_for, available_cpus


def config_for(checkpoint: str, recipe_name: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Choose the config by which a checkpoint is evaluated.

    It is the named recipe, else the checkpoint's own config, else the defaults; then come the `overrides`.
    """
    if recipe_name is not None:
        base = recipe(recipe_name)
    elif Path(checkpoint).is_dir():
        base = read_metadata(Path(checkpoint)).config
    else:
        base = TrainConfig()
    return replace_fields(base, overrides)


def choose_device(config: TrainConfig) -> torch.device:
    """Choose this machine's GPU where the config asks for it, or leaves it open and the machine has one."""
    gpu = config.run.device == "gpu" or (config.run.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def evaluate_checkpoint(checkpoint: str, config: TrainConfig, *, ema: bool = False) -> dict[str, float]:
    """Evaluate `config.model` with the checkpoint's weights on `data.val`.

    Returns:
        `images`, `loss`, `acc1` and `acc5` (percent).
    """
    spec, device = resolve(config.model), choose_device(config)
    network = load_network(checkpoint, config, ema=ema)
    check_split(config, "val")
    loader = build_loader(
        config.data,
        "val",
        image_size=spec.image_size,
        batch_size=config.data.eval_batch_size,
        device=device,
        threads=available_cpus(),
    )
    with autocast_for(config, device)():
        return evaluate(network.to(device), Normalized(loader, config.data, device))
