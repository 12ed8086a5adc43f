"""CeiT: parity with the official code, every cell, batch norms whose statistics are part of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.networks import THIN_CELLS, cell_id, check_cell, check_golden, check_official, count, perturbed
from torch import Tensor

from lape_ray.config import ModelConfig
from lape_ray.model import build_model
from lape_ray.model.ceit import LeFF
from lape_ray.model.convert import load_weights
from lape_ray.training.optim import Ema
from lape_ray.training.recompute import optimise_blocks

SMALL: dict[str, Any] = {
    "variant": "ceit_tiny", "image_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5,
    "mlp_ratio": 2.0,
}  # fmt: skip
REFERENCE = {
    "variant": "ceit_tiny", "image_size": 64, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 10,
    "join": "lape",
}  # fmt: skip


@pytest.mark.parametrize("optimised", [False, True])
def test_official_outputs_and_gradients(optimised: bool) -> None:
    check_official("ceit-learnable-LaPE", REFERENCE, optimised=optimised)


def test_logits_stay() -> None:
    check_golden("ceit_tiny", ModelConfig(**REFERENCE))  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", THIN_CELLS, ids=cell_id)
def test_every_cell_trains(cell: dict[str, str]) -> None:
    check_cell(ModelConfig(**SMALL, **cell))


def test_the_last_feed_forward_layer_reaches_no_output() -> None:
    """Its weights count in the published sizes; their gradient is zero, and there, as data parallelism wants it."""
    network = build_model(ModelConfig(variant="ceit_tiny", image_size=32))
    dead = {name for name, _ in network.named_parameters() if name.startswith("blocks.11.mlp.")}
    assert count(network.blocks[11].mlp) == 307_008
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        if "conv" not in name:  # a bias before a batch norm has no gradient but rounding
            assert (parameter.grad.abs().max() == 0) == (name in dead), name


def test_the_class_token_passes_leff_as_it_is() -> None:
    leff, x = LeFF(embed_dim=8, hidden_dim=16), torch.randn(2, 10, 8)
    assert torch.equal(leff(x)[:, 0], x[:, 0])
    assert leff(x).shape == x.shape


def statistics(network: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: value.clone() for name, value in network.named_buffers() if "running" in name or "num" in name
    }


def test_recomputation_moves_statistics_once() -> None:
    config = ModelConfig(**SMALL, join="lape")
    plain, optimised = perturbed(config), optimise_blocks(perturbed(config))
    images = torch.randn(4, 3, 32, 32)
    for network in (plain, optimised):
        network.train()(images).sum().backward()
    wanted, found = statistics(plain), statistics(optimised)
    assert len(wanted) == 3 * (1 + 3 * 3)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
        if name.endswith("num_batches_tracked"):
            assert value == 1


def test_an_average_has_averaged_statistics() -> None:
    network = build_model(ModelConfig(**SMALL))
    average, name = Ema(network, 0.75), "patch_embed.backbone.bn.running_mean"
    before = network.state_dict()[name].clone()
    network.train()(torch.randn(4, 3, 32, 32))
    average.update()
    moved = network.state_dict()[name]
    assert (moved - before).abs().min() > 0
    torch.testing.assert_close(average.model.state_dict()[name], 0.75 * before + 0.25 * moved)


def test_official_files_load_at_another_resolution() -> None:
    small, large = perturbed(ModelConfig(**SMALL)), build_model(ModelConfig(**{**SMALL, "image_size": 64}))
    official = {
        name.replace("patch_embed", "i2t")
        .replace("lca.mlp", "lca.feedforward")
        .replace("lca.pos_layer", "pos_layer")
        .replace(".mlp.conv", ".leff.conv")
        .replace(".mlp.bn", ".leff.bn"): value
        for name, value in small.state_dict().items()
    }
    assert not official.keys() & {"lca.pos_layer_embed", "blocks.0.mlp.bn1.running_var"}
    assert [note.split()[0] for note in load_weights(large, {"model": official})] == ["pos_embed"]
    same = build_model(ModelConfig(**SMALL))
    load_weights(same, {"model": official})
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(same.eval()(images), small.eval()(images))


def test_weight_decay_exempts_tables_of_the_image_alone() -> None:
    network = build_model(ModelConfig(**SMALL, join="lape"))
    assert network.position_parameters() == {"cls_token", "pos_embed"}  # and not the table over layers


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="image_size=40 does not divide by 16"):
        build_model(ModelConfig(**{**SMALL, "image_size": 40}))
