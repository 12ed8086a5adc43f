"""LAMB: AdamW's direction, made as long for each weight as the weight itself (You et al., arXiv 1904.00962).

With the choices of apex's FusedLAMB, which DeiT III trains with: gradients are averaged and both averages corrected for
their start at zero, weight decay is part of the direction, and what is not decayed is not rescaled, so that AdamW steps
it. FusedLAMB also clips the whole gradient to a norm of 1: that is `optim.clip_norm` here. timm's `Lamb` computes the
same; here a step's number lies on the device too, so that a step can become part of a CUDA graph.

Shapes: P parameters of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """Step each parameter by lr * |p| / |d| along d = m / (sqrt(v) + eps) + weight_decay * p.

    The factor |p| / |d| is 1 where either norm is 0, and in groups without weight decay.

    Args:
        groups: with `params` and `weight_decay`.
        lr: a number, or a scalar tensor on the parameters' device.
        betas: averaging factors of the gradient (m) and of its square (v).
        capturable: whether a step can become part of a CUDA graph: torch then loads its number to the parameters.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        capturable: bool = False,
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "capturable": capturable})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all parameters that have gradients."""
        if closure is not None:
            raise ValueError("closures are not supported: compute the gradients before step()")
        for group in self.param_groups:
            if parameters := [parameter for parameter in group["params"] if parameter.grad is not None]:
                directions = self._directions(group, parameters)
                lengths_P = group["lr"] * _trust_ratios(parameters, directions, group["weight_decay"])
                torch._foreach_mul_(directions, lengths_P.unbind())
                torch._foreach_sub_(parameters, directions)

    def _directions(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Move the averages of gradients, and return the direction of each parameter's step."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        steps, means, squares = (
            [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        steps_P = torch.stack(steps)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, _share_seen(beta2, steps_P).sqrt().unbind())
        torch._foreach_add_(denominators, group["eps"])
        directions = list(torch._foreach_div(means, _share_seen(beta1, steps_P).unbind()))
        torch._foreach_div_(directions, denominators)
        torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
        return directions


def _share_seen(beta: float, steps_P: Tensor) -> Tensor:
    """Compute 1 - beta^step, the share of an average that is not its start at zero; exact where it is small."""
    return torch.ones_like(steps_P) if beta == 0 else -torch.expm1(steps_P * math.log(beta))


def _trust_ratios(parameters: list[Tensor], directions: list[Tensor], weight_decay: float) -> Tensor:
    """Compute the norm of each parameter over that of its direction, (P,)."""
    if weight_decay == 0:
        return torch.ones(len(parameters), device=parameters[0].device)
    parameters_P, directions_P = (torch.stack(torch._foreach_norm(each)) for each in (parameters, directions))
    known_P = (parameters_P > 0) & (directions_P > 0)
    return torch.where(known_P, parameters_P / directions_P, 1.0)
