"""LAMB beside its formula in a few lines, timm's, and what it must share with the other optimizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from lape_ray.config import ModelConfig, OptimConfig
from lape_ray.model import build_model
from lape_ray.training.lamb import Lamb
from lape_ray.training.optim import build_optimizer

OPTIONS: dict[str, Any] = {"lr": 4e-3, "betas": (0.9, 0.99), "eps": 1e-6}
SHAPES = [(16, 8), (8, 3, 2, 2), (5, 1), (12,), (12,)]


def parameters() -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=draws)) for shape in SHAPES]


def groups(members: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": members[:4], "weight_decay": 0.05}, {"params": members[4:], "weight_decay": 0.0}]


def set_gradients(members: list[nn.Parameter], seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for member in members:
        member.grad = torch.randn(member.shape, generator=draws) * 10 ** float(
            torch.rand((), generator=draws) * 4 - 3
        )


def by_formula(p: Tensor, gradients: list[Tensor], decay: float) -> Tensor:
    """The paper's algorithm 2 in float64, with both averages corrected."""
    (b1, b2), p = OPTIONS["betas"], p.double()
    m = v = torch.zeros_like(p)
    for t, g in enumerate((g.double() for g in gradients), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        r = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + OPTIONS["eps"]) + decay * p
        length = float(p.norm() / r.norm()) if decay and p.norm() * r.norm() > 0 else 1.0
        p = p - OPTIONS["lr"] * length * r
    return p


def test_steps_are_the_formulas() -> None:
    members = parameters()
    start, seen = [p.detach().clone() for p in members], [list[Tensor]() for _ in members]
    optimizer = Lamb(groups(members), **OPTIONS)
    for step in range(6):
        set_gradients(members, step)
        for member, history in zip(members, seen, strict=True):
            assert member.grad is not None
            history.append(member.grad.clone())
        optimizer.step()
    for index, (member, before) in enumerate(zip(members, start, strict=True)):
        wanted = by_formula(before, seen[index], 0.05 if index < 4 else 0.0)
        torch.testing.assert_close(member.detach().double(), wanted, rtol=1e-6, atol=1e-7)
        assert (wanted - before).norm() > 1e-3 * before.norm()


def test_steps_are_timms() -> None:
    """Whose clipping to a norm of 1 is `clip_grad_norm_` here, as the loop does it for optim.clip_norm."""
    mine, theirs = parameters(), parameters()
    ours = Lamb(groups(mine), **OPTIONS)
    timms = timm.optim.Lamb(groups(theirs), max_grad_norm=1.0, **OPTIONS)
    for step in range(6):
        for members in (mine, theirs):
            set_gradients(members, step)
        assert nn.utils.clip_grad_norm_(mine, 1.0) > 1
        ours.step()
        timms.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


def test_a_weight_or_a_gradient_of_zeros_stays_finite() -> None:
    """A norm of 0 gives a factor of 1: a weight that starts at zero moves, one without gradient and decay stays."""
    still, new = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))
    still.grad, new.grad = torch.zeros(3), torch.ones(2, 2)
    Lamb([{"params": [still], "weight_decay": 0.0}, {"params": [new], "weight_decay": 0.1}], **OPTIONS).step()
    assert torch.equal(still, torch.ones(3))
    torch.testing.assert_close(new.detach(), torch.full((2, 2), -OPTIONS["lr"]), rtol=1e-4, atol=0)


def test_a_step_rescales_with_its_weight() -> None:
    """What LAMB is for: twice the weights move twice as far, whatever their gradients are."""
    moved = []
    for scale in (1.0, 2.0):
        members = [nn.Parameter(p.detach() * scale) for p in parameters()[:1]]
        set_gradients(members, 0)
        before = members[0].detach().clone()
        Lamb([{"params": members, "weight_decay": 1e-9}], **OPTIONS).step()
        moved.append((members[0].detach() - before).norm())
    assert moved[1] / moved[0] == pytest.approx(2.0, rel=1e-4)


def test_a_parameter_that_joins_later_has_its_own_count() -> None:
    members = parameters()[:2]
    optimizer = Lamb([{"params": members, "weight_decay": 0.05}], **OPTIONS)
    history: list[list[Tensor]] = [[], []]
    start = [p.detach().clone() for p in members]
    for step in range(4):
        set_gradients(members, step)
        if step < 2:
            members[1].grad = None
        for index, member in enumerate(members):
            history[index] += [] if member.grad is None else [member.grad.clone()]
        optimizer.step()
    for index, member in enumerate(members):
        wanted = by_formula(start[index], history[index], 0.05)
        torch.testing.assert_close(member.detach().double(), wanted, rtol=1e-6, atol=1e-7)


def test_a_restored_optimizer_goes_on_to_the_bit() -> None:
    wanted, found = parameters(), parameters()
    whole, first = Lamb(groups(wanted), **OPTIONS), Lamb(groups(found), **OPTIONS)
    for step in range(3):
        for members, optimizer in ((wanted, whole), (found, first)):
            set_gradients(members, step)
            optimizer.step()
    second = Lamb(groups(found), **OPTIONS)
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        for members, optimizer in ((wanted, whole), (found, second)):
            set_gradients(members, step)
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_a_rate_in_a_tensor_is_a_rate() -> None:
    one, other = parameters(), parameters()
    for members, lr in ((one, 0.5), (other, torch.tensor(0.5))):
        optimizer = Lamb(groups(members), **{**OPTIONS, "lr": lr})
        for step in range(2):
            set_gradients(members, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_network_learns() -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = build_model(ModelConfig(variant="deit3_small", layer_scale=1.0, join="lape", **sizes))  # type: ignore[arg-type]
    config = OptimConfig(algorithm="lamb", lr=2e-2, clip_norm=1.0)
    optimizer = build_optimizer(model, config, exempt=model.position_parameters())
    assert isinstance(optimizer, Lamb)
    images, labels, losses = torch.randn(20, 3, 16, 16), torch.arange(20) % 5, list[float]()
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < 1.4 < losses[0] and math.isfinite(losses[-1])
