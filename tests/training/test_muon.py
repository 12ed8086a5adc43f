"""Muon beside torch's own, which steps one matrix after the other, and beside AdamW for what is no matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lape_ray.config import ModelConfig, OptimConfig
from lape_ray.model import VisionTransformer, build_model
from lape_ray.training.muon import MuonWithAdamW, orthogonalized
from lape_ray.training.optim import build_optimizer

ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
TINY = ModelConfig(
    image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5, join="lape"
)


def pairs(*shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    draws = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=draws) * 0.05 for shape in shapes]
    first, second = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    return first, second


def set_gradients(first: list[nn.Parameter], second: list[nn.Parameter], seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for mine, theirs in zip(first, second, strict=True):
        mine.grad = torch.randn(mine.shape, generator=draws)
        theirs.grad = mine.grad.clone()


def test_steps_are_those_of_torch() -> None:
    """Up to torch's bfloat16, in which a step of rounded matrices is off by 1 %."""
    mine, theirs = pairs((64, 64), (128, 64), (64, 128), (64, 64))
    start = [parameter.detach().clone() for parameter in mine]
    ours = MuonWithAdamW([{"params": mine, "weight_decay": 0.1, "parts": 1}], **ADAMW)
    torchs = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        set_gradients(mine, theirs, step)
        ours.step()
        torchs.step()
    for before, one, other in zip(start, mine, theirs, strict=True):
        assert (one - other).norm() < 0.02 * (other - before).norm()


def test_what_is_no_matrix_is_stepped_by_adamw() -> None:
    mine, theirs = pairs((8, 4), (6,))
    ours = MuonWithAdamW([{"params": mine, "weight_decay": 0.1, "parts": 0}], **ADAMW)
    torchs = torch.optim.AdamW(theirs, weight_decay=0.1, fused=True, **ADAMW)
    for step in range(4):
        set_gradients(mine, theirs, step)
        ours.step()
        torchs.step()
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)


def test_parts_are_matrices_of_their_own() -> None:
    whole, apart = pairs((96, 32))
    thirds = [nn.Parameter(part.clone()) for part in apart[0].detach().chunk(3)]
    set_gradients(whole, apart, 0)
    assert apart[0].grad is not None
    for part, gradient in zip(thirds, apart[0].grad.chunk(3), strict=True):
        part.grad = gradient
    MuonWithAdamW([{"params": whole, "weight_decay": 0.1, "parts": 3}], **ADAMW).step()
    MuonWithAdamW([{"params": thirds, "weight_decay": 0.1, "parts": 1}], **ADAMW).step()
    assert torch.equal(whole[0], torch.cat(thirds))
    with pytest.raises(ValueError, match=r"a parameter of shape \(96, 32\) is not 5 matrices"):
        MuonWithAdamW([{"params": whole, "weight_decay": 0.1, "parts": 5}], **ADAMW)


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 128)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    found: Tensor = orthogonalized([torch.randn(shape, generator=torch.Generator().manual_seed(1))])[0]
    values = torch.linalg.svdvals(found) / (0.2 * max(shape) ** 0.5)
    assert values.min() > 0.5 and values.max() < 1.3


def test_what_each_parameter_of_a_network_gets() -> None:
    """Muon the matrices of the blocks, taken apart where three share a weight; nothing is left out or stepped twice."""
    model: VisionTransformer = build_model(TINY)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        model, OptimConfig(algorithm="muon", weight_decay=0.1), exempt=model.position_parameters()
    )
    found = {
        names[id(parameter)]: (group["parts"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    assert found["blocks.0.attn.qkv.weight"] == (3, 0.1)
    assert found["blocks.1.mlp.fc2.weight"] == found["blocks.1.attn.proj.weight"] == (1, 0.1)
    assert found["patch_embed.proj.weight"] == found["head.weight"] == (0, 0.1)
    assert found["pos_embed"] == found["join.norms.1.weight"] == found["blocks.0.norm1.bias"] == (0, 0.0)


def test_a_network_learns() -> None:
    torch.manual_seed(0)
    model = build_model(TINY)
    images, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 5
    optimizer = build_optimizer(
        model, OptimConfig(algorithm="muon", lr=3e-3), exempt=model.position_parameters()
    )
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 1.5 < losses[0]
