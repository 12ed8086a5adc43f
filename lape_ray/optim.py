"""Parameter groups, the learning rate as a pure function of the step, and the weights' moving average."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from lape_ray.config import OptimConfig


def parameter_groups(
    model: nn.Module, *, weight_decay: float, exempt: set[str]
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Two groups: matrices and tables are decayed; biases, norms (every 1-D tensor) and `exempt` are not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (kept if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    groups: list[dict[str, list[nn.Parameter] | float]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig, *, exempt: set[str]) -> torch.optim.AdamW:
    """AdamW over `model`; `exempt` parameters are decayed after all where the config says `decay_position`."""
    groups = parameter_groups(
        model, weight_decay=config.weight_decay, exempt=set() if config.decay_position else exempt
    )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_at(step: int, *, config: OptimConfig, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, cosine, then `min_lr` in the cool-down.

    The cosine runs over all `epochs` from step 0, so that the warm-up cuts its beginning off, as in DeiT.
    """
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    progress = min(step / total, 1.0)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


class Ema:
    """Exponential moving average of a model's weights; `model` is a copy of the network that holds it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average: list[Tensor] = list(self.model.parameters())
        self._source: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * weights, in one fused call over all tensors."""
        torch._foreach_lerp_(self._average, self._source, 1 - self.decay)
