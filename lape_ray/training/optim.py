"""Parameter groups, the learning rate as a pure function of the step, and the weights' moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lape_ray.config import OptimConfig
from lape_ray.training.lamb import Lamb
from lape_ray.training.muon import MuonWithAdamW


def parameter_groups(
    model: nn.Module,
    config: OptimConfig,
    *,
    exempt: set[str],
    layer_of: Callable[[str], int] = lambda name: 0,
) -> list[dict[str, Any]]:
    """Split the parameters that are trained into groups: first those that are decayed, then those that are not.

    Biases, norms (every 1-D tensor) and `exempt` are not decayed. Of the others, the blocks' matrices have separate
    groups where Muon steps them; `parts` says into how many it takes each of them apart, 0 that a group is AdamW's.
    With `layer_decay` below 1 each layer has groups of its own: `lr_scale`, that of BEiT (arXiv 2106.08254), is
    layer_decay^(layer of the head - layer), with the layers that `layer_of` gives to the parameters' names.
    """
    layers = {name: layer_of(name) if config.layer_decay < 1 else 0 for name, _ in model.named_parameters()}
    groups: dict[tuple[bool, int, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept, parts = parameter.ndim <= 1 or name in exempt, 0
        if not kept and config.algorithm == "muon" and parameter.ndim == 2 and ".blocks." in f".{name}":
            parts = 3 if name.endswith("qkv.weight") else 1
        groups.setdefault((kept, parts, layers[name]), []).append(parameter)
    top = max(layers.values())
    return [
        {
            "params": members,
            "weight_decay": 0.0 if kept else config.weight_decay,
            "parts": parts,
            "lr_scale": config.layer_decay ** (top - layer),
        }
        for (kept, parts, layer), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    *,
    exempt: set[str],
    layer_of: Callable[[str], int] = lambda name: 0,
    lr: Tensor | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of `model`; it decays `exempt` parameters too where the config says `decay_position`.

    Args:
        layer_of: the layer of a parameter's name, for `layer_decay`.
        lr: a float32 scalar on the parameters' device that holds the learning rate; with it a step can become part of a
            CUDA graph. None: a number, which the loop sets in each group.
    """
    groups = parameter_groups(
        model,
        config,
        exempt=set() if config.decay_position else exempt,
        layer_of=layer_of,
    )
    rate, capturable = (config.lr, False) if lr is None else (lr, True)
    for group in groups:  # each has its own, for its scale
        group["lr"] = rate if lr is None else lr.clone()
    if config.algorithm == "muon":
        return MuonWithAdamW(groups, lr=rate, betas=config.betas, eps=config.eps, capturable=capturable)
    groups = [{key: value for key, value in group.items() if key != "parts"} for group in groups]
    if config.algorithm == "lamb":
        return Lamb(groups, lr=rate, betas=config.betas, eps=config.eps, capturable=capturable)
    return torch.optim.AdamW(
        groups, lr=rate, betas=config.betas, eps=config.eps, fused=True, capturable=capturable,
    )  # fmt: skip


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: its share of `lr`, that of the head."""
    for group in optimizer.param_groups:
        scaled = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def lr_at(step: int, *, config: OptimConfig, steps_per_epoch: int) -> float:
    """Compute the learning rate of optimizer step `step` (from 0).

    It has a linear warm-up, then a cosine, then `min_lr` in the cool-down. The cosine runs over all `epochs` from step
    0, so that the warm-up cuts its beginning off, as in DeiT.
    """
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    progress = min(step / total, 1.0)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


class Ema:
    """Exponential moving average of a model's weights and statistics; `model` is a copy that holds it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average, self._source = _floating_state(self.model), _floating_state(model)

    @torch.no_grad()
    def update(self) -> None:
        """Set average = decay * average + (1 - decay) * weights, in one fused call over all tensors."""
        torch._foreach_lerp_(self._average, self._source, 1 - self.decay)


def _floating_state(model: nn.Module) -> list[Tensor]:
    """List what an average is taken of: parameters and saved buffers, but no counts."""
    return [value for value in model.state_dict(keep_vars=True).values() if value.is_floating_point()]
