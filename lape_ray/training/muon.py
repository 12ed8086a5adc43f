"""Muon: momentum whose singular values are made alike, for the blocks' matrices; AdamW for everything else.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the scale of "Muon is Scalable
for LLM Training" (arXiv 2502.16982, section 2.2): an update has the root mean square of AdamW's, so that learning
rate and weight decay of AdamW carry over.

`torch.optim.Muon` computes the same, one matrix after the other and with a learning rate on the host. Here matrices
of one shape are multiplied together, as those of a small network take less time than their launches, and the learning
rate may lie on the device, as a step that is replayed as a CUDA graph needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that Jordan et al. found
_ITERATIONS = 5
_RMS = 0.2  # root mean square of AdamW's updates, as 2502.16982 found it


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer for all parameters: each group is stepped by Muon or by AdamW.

    Args:
        groups: with `params`, `weight_decay` and `parts`: into how many matrices, one above the other, Muon takes each
            parameter apart (3 for the queries, keys and values of one weight); 0: the group is AdamW's.
        lr: a number, or a scalar tensor on the parameters' device.
        betas, eps: of AdamW.
        capturable: whether a step can become part of a CUDA graph.
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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "fused": True, "capturable": capturable}
        super().__init__(list(groups), defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["parts"] and (parameter.ndim != 2 or len(parameter) % group["parts"]):
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is not {group['parts']} matrices"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all parameters that have gradients."""
        if closure is not None:
            raise ValueError("closures are not supported: compute the gradients before step()")
        matrices: list[Tensor] = []
        for group in self.param_groups:
            if group["parts"]:
                matrices += self._momentum(group)
            else:
                self._adamw(group)
        directions = iter(orthogonalized(matrices))
        for group in self.param_groups:
            if group["parts"]:
                self._follow(group, directions)

    def _momentum(self, group: dict[str, Any]) -> list[Tensor]:
        """Move the group's averages, and return what Nesterov's method makes of them, as single matrices."""
        parameters = _with_gradients(group)
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if not parameters:
            return []
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [_gradient(parameter) for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, averages, MOMENTUM)
        return [matrix for whole in ahead for matrix in whole.chunk(group["parts"])]

    def _follow(self, group: dict[str, Any], directions: Iterator[Tensor]) -> None:
        parameters = _with_gradients(group)
        if not parameters:
            return
        updates = [torch.cat([next(directions) for _ in range(group["parts"])]) for _ in parameters]
        torch._foreach_mul_(updates, group["lr"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, updates)

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = _with_gradients(group)
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [_gradient(parameter) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            capturable=group["capturable"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Bring each matrix's singular values near 1 (0.7 to 1.2), and scale it to Muon's update; float32.

    Those of one shape, or of that of the transpose, are computed together: on a GPU in bfloat16, which is enough, on a
    CPU in float32, which is faster there. Shapes: S matrices of M rows and N >= M columns.
    """
    found: list[Tensor] = [torch.empty(0)] * len(matrices)
    alike: dict[tuple[int, ...], list[int]] = {}
    for at, matrix in enumerate(matrices):
        alike.setdefault(tuple(sorted(matrix.shape)), []).append(at)
    for (rows, columns), places in alike.items():
        tall = [matrices[at].shape[0] > rows for at in places]
        x_SMN = torch.stack(
            [matrices[at].T if turn else matrices[at] for at, turn in zip(places, tall, strict=True)]
        )
        x_SMN = x_SMN.to(torch.bfloat16 if x_SMN.is_cuda else torch.float32)
        scale = _RMS * math.sqrt(columns)
        for at, turn, matrix in zip(places, tall, _newton_schulz(x_SMN).float().mul_(scale), strict=True):
            found[at] = matrix.T if turn else matrix
    return found


def _newton_schulz(x_SMN: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    x_SMN = x_SMN / x_SMN.norm(dim=(1, 2), keepdim=True).clamp(
        min=1e-7
    )  # the largest singular value: at most 1
    for _ in range(_ITERATIONS):
        gram_SMM = x_SMN @ x_SMN.mT
        x_SMN = torch.baddbmm(
            x_SMN, torch.baddbmm(gram_SMM, gram_SMM, gram_SMM, beta=b, alpha=c), x_SMN, beta=a
        )
    return x_SMN


def _with_gradients(group: dict[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
