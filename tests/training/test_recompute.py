"""Optimised blocks beside the plain ones that the paper's equation can be read in: outputs, gradients, names, draws."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import BIAS_NAMES, POSITIONS, WHOLE_JOINS, cell_id, paired
from safetensors.torch import save_file
from torch import Tensor, nn
from train_step import synthetic_state, training_config

from lape_ray.config import ModelConfig, TrainConfig
from lape_ray.inference.predict import load_network
from lape_ray.model import VisionTransformer, build_model
from lape_ray.model.block import Block
from lape_ray.model.position import ROTARIES, valid_bias_joins, valid_joins
from lape_ray.model.variants import VARIANTS
from lape_ray.training import checkpoint, recompute
from lape_ray.training.loss import load_teacher
from lape_ray.training.optim import Ema
from lape_ray.training.recompute import optimise_blocks

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "image_size": 16, "num_classes": 5}
SIZES: dict[str, dict[str, Any]] = {
    "cct": {},
    "t2t": {"image_size": 32},
    "ceit": {"image_size": 32},
    "swin": {"image_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 1, 1, 1), "depth": None},
}
JOINS = [
    {"position": position, "join": join}
    for position in POSITIONS
    for join in valid_joins(position, WHOLE_JOINS)
]
BIAS_JOINS = [{"bias": bias, "bias_join": join} for bias in BIAS_NAMES for join in valid_bias_joins(bias)]
# Every join with every bias and rotation that it can meet a layer with (those that lack a part of LaPE meet it as it
# does); then the families, of which some heads read a class token, some two tokens and some all.
PAIRS = paired(
    {"variant": variant, **joined, **biased, "rotary": rotary}
    for variant, joins in {"deit_tiny": JOINS, "cct_7_3x1": [{"join": "basic"}, {"join": "lape"}]}.items()
    for joined in joins
    for biased in BIAS_JOINS
    for rotary in ROTARIES
)
CELLS = [
    *PAIRS,
    *({"variant": variant, "join": join} for variant in VARIANTS for join in ("basic", "lape")),
    {"variant": "deit_tiny", "join": "mpvg", "pool": "gap"},
]


def network_of(**fields: Any) -> Any:
    """A small network none of whose norms and biases is at its neutral start, so that each of them must be applied."""
    fields = {**SIZES.get(fields["variant"].split("_")[0], {"patch_size": 4}), **fields}
    torch.manual_seed(0)
    # Of fewer queries dropout draws fewer numbers: then it is another draw, and nothing could be compared.
    made = build_model(ModelConfig(**{**TINY, "drop_path": 0.3, "attention_dropout": 0.0, **fields}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def images(side: int = 16) -> Tensor:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(2))


def outputs_and_gradients(network: nn.Module, *, bf16: bool = False, side: int = 16) -> dict[str, Tensor]:
    """What a training step computes, with the same draws of stochastic depth each time, and evaluation's logits."""
    images_BCHW = images(side)
    network.train().zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = network(images_BCHW)
    (logits.float() * torch.arange(5)).square().mean().backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    with torch.inference_mode():
        return {"logits": logits.detach(), "evaluated": network.eval()(images_BCHW), **found}


@pytest.mark.parametrize("cell", CELLS, ids=cell_id)
def test_optimised_blocks_compute_what_plain_ones_do(cell: dict[str, str]) -> None:
    network = network_of(**cell)
    side = 32 if cell["variant"].startswith(("t2t", "ceit", "swin")) else 16
    statistics = copy.deepcopy(network.state_dict())
    plain = outputs_and_gradients(network, side=side)
    network.load_state_dict(statistics)  # which a pass of CeiT moves
    optimised = outputs_and_gradients(optimise_blocks(network), side=side)
    assert not any(type(block) in recompute.OPTIMISED for stage in network.stages() for block in stage.blocks)
    assert set(plain) == set(optimised) == {"logits", "evaluated", *dict(network.named_parameters())}
    largest = max(value.norm() for value in plain.values())
    for name, wanted in plain.items():
        # A gradient that is zero but for rounding (that of a bias before a softmax) is measured by the largest value.
        distance = (optimised[name] - wanted).norm() / wanted.norm().clamp_min(1e-2 * largest)
        # Parabolas, 50 to a logit, make attention sharp, and so rounding larger.
        assert distance < (1e-4 if cell.get("bias") == "pape" else 2e-5), f"{name}: {distance:.1e}"


@pytest.mark.parametrize("join", ["basic", "lape"])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_computed_again_changes_no_bit(
    join: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant in ("deit_tiny", "cct_7_3x1"):
        network = optimise_blocks(network_of(variant=variant, join=join, attention_dropout=0.1))
        again = outputs_and_gradients(network, bf16=bf16)
        with monkeypatch.context() as patch:
            patch.setattr(recompute, "recomputed", lambda product, cheap, x: product(cheap(x)))
            kept = outputs_and_gradients(network, bf16=bf16)
        assert again.keys() == kept.keys()
        for name, value in again.items():
            assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_stay_what_and_where_they_are(variant: str) -> None:
    """Checkpoints, optimizers and seeds do not notice: names, their order, the tensors themselves, no number drawn."""
    network = network_of(variant=variant, join="lape")
    before, keys, drawn = list(network.named_parameters()), list(network.state_dict()), torch.get_rng_state()
    assert optimise_blocks(network) is network
    after = list(network.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(one is other for (_, one), (_, other) in zip(before, after, strict=True))
    assert keys == list(network.state_dict())
    assert torch.equal(drawn, torch.get_rng_state())


def tokens_of_the_last_block(network: VisionTransformer, images_BCHW: Tensor) -> int:
    seen: list[int] = []
    with network.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1])):
        network(images_BCHW)
    return seen[0]


@pytest.mark.parametrize(
    ("variant", "tokens"),
    [("deit_tiny", 1), ("deit_tiny_distilled", 2), ("vit_lite_6_4", 1), ("cvt_7_4", 16), ("cct_7_3x1", 64)],
)
def test_the_last_block_computes_what_the_head_reads(variant: str, tokens: int) -> None:
    network = network_of(variant=variant)
    all_tokens = network.num_prefix + network.grid[0] * network.grid[1]
    assert tokens_of_the_last_block(network, images()) == all_tokens
    assert tokens_of_the_last_block(optimise_blocks(network), images()) == tokens


def test_whoever_trains_or_evaluates_has_optimised_blocks(tmp_path: Path) -> None:
    config = TrainConfig(model=ModelConfig(variant="deit_tiny", patch_size=4, **TINY))
    save_file(build_model(config.model).state_dict(), tmp_path / "weights.safetensors")
    state = synthetic_state(training_config("toy", join="lape", batch_size=2), torch.device("cpu"))
    meta = checkpoint.Metadata(epochs_done=1, steps_done=1, config=state.config, metrics={}, world_size=1)
    (tmp_path / "teacher").mkdir()
    parts = {**state.saved_parts, "ema": None}
    checkpoint.snapshot(**parts, metadata=meta).save(tmp_path / "teacher")
    assert state.ema is not None
    networks = [
        (state.network, 32),
        (state.ema.model, 32),
        (load_teacher(str(tmp_path / "teacher"), num_classes=10, image_sizes=(32,)), 32),
        (load_network(str(tmp_path / "weights.safetensors"), config), 16),
    ]
    for network, side in networks:
        assert isinstance(network, VisionTransformer)
        assert tokens_of_the_last_block(network, torch.rand(1, 3, side, side)) == 1


def test_an_average_has_blocks_of_its_own() -> None:
    network = optimise_blocks(network_of(variant="deit_tiny", join="lape"))
    average = Ema(network, 0.5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    wanted = network_of(variant="deit_tiny", join="lape").eval()(images())
    torch.testing.assert_close(average.model(images()), wanted)


def test_blocks_of_another_kind_stay() -> None:
    class Other(Block):
        pass

    network = network_of(variant="deit_tiny")
    network.blocks[1] = Other(embed_dim=32, num_heads=2, mlp_ratio=4, eps=1e-6)
    kinds = [type(block).__name__ for block in optimise_blocks(network).blocks]
    assert kinds == ["RecomputingBlock", "Other", "RecomputingBlock"]
