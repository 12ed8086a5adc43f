"""Parameter groups, the learning rate as a pure function of the step, and the weights' moving average."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from lape_ray.config import OptimConfig
from lape_ray.training.lamb import Lamb
from lape_ray.training.muon import MuonWithAdamW


def parameter_groups(model: nn.Module, config: OptimConfig, *, exempt: set[str]) -> list[dict[str, Any]]:
    """Split the parameters into the decayed groups and, last, the one that is not decayed.

    Biases, norms (every 1-D tensor) and `exempt` are not decayed. Of the others, the blocks' matrices have separate
    groups where Muon steps them; `parts` says into how many it takes each of them apart, 0 that a group is AdamW's.
    """
    decayed: dict[int, list[nn.Parameter]] = {0: [], 1: [], 3: []}
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or name in exempt:
            kept.append(parameter)
        elif config.algorithm == "muon" and parameter.ndim == 2 and ".blocks." in f".{name}":
            decayed[3 if name.endswith("qkv.weight") else 1].append(parameter)
        else:
            decayed[0].append(parameter)
    groups = [
        {"params": members, "weight_decay": config.weight_decay, "parts": parts}
        for parts, members in decayed.items()
    ]
    return [
        group for group in [*groups, {"params": kept, "weight_decay": 0.0, "parts": 0}] if group["params"]
    ]


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, exempt: set[str], lr: Tensor | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer of `model`; it decays `exempt` parameters too where the config says `decay_position`.

    Args:
        lr: a float32 scalar on the parameters' device that holds the learning rate; with it a step can become part of a
            CUDA graph. None: a number, which the loop sets in each group.
    """
    groups = parameter_groups(model, config, exempt=set() if config.decay_position else exempt)
    rate, capturable = (config.lr, False) if lr is None else (lr, True)
    if config.algorithm == "muon":
        return MuonWithAdamW(groups, lr=rate, betas=config.betas, eps=config.eps, capturable=capturable)
    groups = [{key: value for key, value in group.items() if key != "parts"} for group in groups]
    if config.algorithm == "lamb":
        return Lamb(groups, lr=rate, betas=config.betas, eps=config.eps, capturable=capturable)
    return torch.optim.AdamW(
        groups, lr=rate, betas=config.betas, eps=config.eps, fused=True, capturable=capturable,
    )  # fmt: skip


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
