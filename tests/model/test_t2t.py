"""T2T-ViT: parity with the official code, every cell, performers in float32, projections that are state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import THIN_CELLS, cell_id, check_cell, check_golden, check_official, count, perturbed
from torch import Tensor

from lape_ray.config import ModelConfig
from lape_ray.model import build_model
from lape_ray.model.convert import load_weights
from lape_ray.model.t2t import Performer
from lape_ray.training.checkpoint import read_weights

SMALL: dict[str, Any] = {
    "variant": "t2t_vit_7", "image_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5,
}  # fmt: skip
REFERENCE = {
    "variant": "t2t_vit_7", "image_size": 64, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 10,
    "position": "sincos1d", "join": "lape",
}  # fmt: skip


@pytest.mark.parametrize("optimised", [False, True])
def test_official_outputs_and_gradients(optimised: bool) -> None:
    check_official("t2t-1D_sin-LaPE", REFERENCE, optimised=optimised)


def test_logits_stay() -> None:
    check_golden("t2t_vit_7", ModelConfig(**REFERENCE))  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", THIN_CELLS, ids=cell_id)
def test_every_cell_trains(cell: dict[str, str]) -> None:
    check_cell(ModelConfig(**SMALL, **cell))


@pytest.mark.parametrize(
    ("position", "basic", "lape"), [("sincos1d", 4_255_694, 4_259_278), ("learnable", 4_306_126, 4_309_710)]
)
def test_parameter_counts(position: str, basic: int, lape: int) -> None:
    with torch.device("meta"):
        for join, parameters in (("basic", basic), ("lape", lape)):
            model = build_model(ModelConfig(variant="t2t_vit_7", position=position, join=join))  # type: ignore[arg-type]
            assert count(model) == parameters


def performer() -> tuple[Performer, Tensor]:
    torch.manual_seed(0)
    made = Performer(12, 8).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made, torch.randn(2, 9, 12)


def test_linear_attention_is_attention_with_its_kernel() -> None:
    """The same with the (N, N) weights written out: those of exp(Wk - |k|^2 / 2) . exp(Wq - |q|^2 / 2)."""
    made, x = performer()
    k, q, v = made.kqv(made.norm1(x)).chunk(3, dim=-1)
    w = made.get_buffer("w")
    phi_k, phi_q = (torch.exp(z @ w.T - z.square().sum(-1, keepdim=True) / 2) for z in (k, q))
    weights = phi_q @ phi_k.mT
    y = v + made.proj(weights / weights.sum(-1, keepdim=True) @ v)
    torch.testing.assert_close(made(x), y + made.mlp(made.norm2(y)), atol=1e-5, rtol=1e-4)


def test_projections_have_orthogonal_rows_of_one_length() -> None:
    w = Performer(3, 64).get_buffer("w")
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), atol=1e-4, rtol=0)


def test_performers_compute_in_float32_under_autocast() -> None:
    made, x = performer()
    alone = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x)
        tokens = build_model(ModelConfig(**SMALL)).patch_embed(torch.randn(1, 3, 32, 32))
    assert found.dtype == torch.float32
    assert torch.equal(found, alone)
    assert tokens.dtype == torch.bfloat16  # autocast goes on behind them


def test_a_fresh_network_begins_as_the_official_one() -> None:
    torch.manual_seed(0)
    embed = build_model(ModelConfig(**SMALL)).patch_embed
    for linear in (embed.attention1.kqv, embed.attention2.mlp[0], embed.project):  # type: ignore[union-attr,index]
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert linear.bias.abs().max() == 0


def test_projections_are_state_that_nothing_trains() -> None:
    torch.manual_seed(0)
    network = build_model(ModelConfig(**SMALL))
    torch.manual_seed(0)
    other_rank = build_model(ModelConfig(**SMALL))
    torch.manual_seed(1)
    resumed = build_model(ModelConfig(**SMALL))
    name = "patch_embed.attention1.w"
    assert name not in dict(network.named_parameters())
    assert torch.equal(network.state_dict()[name], other_rank.state_dict()[name])
    assert not torch.equal(network.state_dict()[name], resumed.state_dict()[name])
    load_weights(resumed, network.state_dict())
    assert torch.equal(network.state_dict()[name], resumed.state_dict()[name])


def test_a_published_file_loads_its_weights_or_their_average(tmp_path: Path) -> None:
    """Their files hold the training state, and the published figures are the average's."""
    average, weights = (
        {f"module.{name}".replace("patch_embed", "tokens_to_token"): value for name, value in state.items()}
        for state in (
            perturbed(ModelConfig(**SMALL)).state_dict(),
            build_model(ModelConfig(**SMALL)).state_dict(),
        )
    )
    torch.save({"epoch": 3, "state_dict": weights, "state_dict_ema": average}, tmp_path / "t2t.pth.tar")
    for ema, wanted in ((True, average), (False, weights)):
        loaded, config = read_weights(tmp_path / "t2t.pth.tar", ema=ema)
        assert config is None
        network = build_model(ModelConfig(**SMALL))
        assert load_weights(network, loaded) == []
        assert torch.equal(network.state_dict()["head.weight"], wanted["module.head.weight"])


@pytest.mark.parametrize("position", ["learnable", "sincos1d"])
def test_another_resolution_resizes_tables(position: str) -> None:
    small = build_model(ModelConfig(**SMALL, position=position))  # type: ignore[arg-type]
    large = build_model(ModelConfig(**{**SMALL, "image_size": 64}, position=position))  # type: ignore[arg-type]
    notes = load_weights(large, small.state_dict())
    assert len(notes) == (position == "learnable")
    assert large(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="image_size=40 does not divide by 16"):
        build_model(ModelConfig(**{**SMALL, "image_size": 40}))
    with pytest.raises(ValueError, match="patch_size=16 does not apply to t2t_vit_7"):
        build_model(ModelConfig(**SMALL, patch_size=16))
