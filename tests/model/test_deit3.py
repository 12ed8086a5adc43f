"""DeiT III: parity with timm, names of the official files, LayerScale, a table without a row for the class token."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.networks import CELLS, cell_id, check_cell, check_golden, count, perturbed
from torch import Tensor, nn

from lape_ray.config import ModelConfig, OptimConfig, Variant
from lape_ray.model import VisionTransformer, build_model
from lape_ray.model.block import LayerScale
from lape_ray.model.convert import load_weights
from lape_ray.report.position import biases, correlations, rotations
from lape_ray.training.optim import parameter_groups
from lape_ray.training.recompute import optimise_blocks

SMALL: dict[str, Any] = {
    "variant": "deit3_small", "image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2,
    "num_classes": 5,
}  # fmt: skip

# Every join meets no bias and no rotation, and a trained one of each.
MET_CELLS = [
    cell
    for cell in CELLS
    if (cell["bias"], cell["bias_join"], cell["rotary"])
    in {("none", "basic", "none"), ("relative2d", "lape", "mixed")}
]


def small(**fields: Any) -> VisionTransformer:
    network = perturbed(ModelConfig(**{**SMALL, **fields}))
    assert isinstance(network, VisionTransformer)
    return network


def of_timm(size: str) -> nn.Module:
    """Make timm's network, none of whose weights is at its neutral start: its own LayerScale hides every branch."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(f"deit3_{size}_patch16_224", pretrained=False).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("gamma") else 0.02))
    return network


@pytest.mark.parametrize("join", ["basic", "lape"])
@pytest.mark.parametrize("size", ["small", "medium", "base", "large"])
def test_parameters_are_as_many_as_timms(size: str, join: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"deit3_{size}_patch16_224", pretrained=False)
        ours = build_model(ModelConfig(variant=f"deit3_{size}", join=join))  # type: ignore[arg-type]
    lape = 2 * ours.pos_embed.shape[-1] * len(theirs.blocks) if join == "lape" else 0  # type: ignore[union-attr]
    assert count(ours) == count(theirs) + lape
    assert (size != "small") or count(theirs) == 22_059_496


@pytest.mark.parametrize("optimised", [False, True])
def test_timms_weights_give_timms_logits_and_gradients(optimised: bool) -> None:
    theirs = of_timm("small")
    ours = build_model(ModelConfig(variant="deit3_small"))
    assert load_weights(ours, theirs.state_dict()) == []
    if optimised:
        optimise_blocks(ours)
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([3, 700])
    found, wanted = ours.eval()(images), theirs(images)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for logits in (found, wanted):
        F.cross_entropy(logits, labels).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in gradients.items():
        # A gradient that is zero but for rounding is measured by the whole one.
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-4 * total)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name weights as facebookresearch/deit's models_v2 does."""
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): state[name] for name in state
    }


def test_official_names_load() -> None:
    network = small()
    state = official(network.state_dict())
    assert "blocks.2.gamma_2" in state and not any("ls" in name.split(".") for name in state)
    copy = build_model(ModelConfig(**SMALL))
    assert load_weights(copy, {"model": state}) == []
    for name, value in copy.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_another_network_is_told_from_it() -> None:
    deit3, deit = ModelConfig(**SMALL), ModelConfig(**{**SMALL, "variant": "deit_small"})
    with pytest.raises(ValueError, match=r"LayerScale, such as DeiT III \(--model.variant deit3_\*\)"):
        load_weights(build_model(deit), official(build_model(deit3).state_dict()))
    with pytest.raises(ValueError, match=r"missing blocks\.0\.ls1\.gamma.* it has no LayerScale: choose"):
        load_weights(build_model(deit3), build_model(deit).state_dict())
    with torch.device("meta"):
        whole = build_model(ModelConfig(variant="deit3_small")).state_dict()
        with pytest.raises(ValueError, match=r"12 blocks of width 384: choose --model.variant deit3_small"):
            load_weights(build_model(deit3), whole)


def test_a_table_is_resized_without_a_row_kept() -> None:
    larger = build_model(ModelConfig(**{**SMALL, "image_size": 24}))
    notes = load_weights(larger, small().state_dict())
    assert notes == ["pos_embed resized from (1, 16, 32) to (1, 36, 32)"]


@pytest.mark.parametrize("join", ["basic", "lape"])
def test_logits_stay(join: str) -> None:
    check_golden(f"deit3_small-{join}", ModelConfig(**SMALL, join=join))  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", MET_CELLS, ids=cell_id)
def test_every_cell_trains(cell: dict[str, str]) -> None:
    check_cell(ModelConfig(**SMALL, **cell))


@pytest.mark.parametrize("join", ["basic", "share", "unshare", "lape", "lape_shared"])
def test_the_class_token_gets_no_position(join: str) -> None:
    """Nothing of the table is added to it, and every patch gets its row, or LN_l of it."""
    network = small(join=join)
    assert network.pos_embed is not None and network.pos_embed.shape[1:] == (16, 32)
    for index, layer in enumerate(network.layer_positions()):
        added = layer.residual_1ND if layer.attention_1ND is None else layer.attention_1ND
        assert (added is None) == (join == "basic" and index > 0)
        if added is not None:
            assert added.shape == (1, 17, 32)
            assert not added[:, 0].any() and added[:, 1:].abs().amax(-1).min() > 0
    w = network.pos_embed
    if join == "lape":
        for norm, layer in zip(network.join.norms, network.layer_positions(), strict=True):  # type: ignore[union-attr,arg-type]
            w = norm(w)
            torch.testing.assert_close(layer.attention_1ND[:, 1:], w)  # type: ignore[index]


def test_the_class_token_comes_behind_the_table_as_in_the_official_code() -> None:
    """x = [cls; patches + table], written out."""
    network, images = small().eval(), torch.randn(2, 3, 16, 16)
    x = torch.cat(
        (network.cls_token.expand(2, -1, -1), network.patch_embed(images) + network.pos_embed), dim=1
    )  # type: ignore[union-attr]
    bare = small().eval()
    bare.pos_embed = bare.join = None
    for block, position in zip(bare.blocks, bare.layer_positions(), strict=True):
        x = block(x, position)
    torch.testing.assert_close(network(images), network.head(network.norm(x)[:, 0]))


def test_the_report_reads_it() -> None:
    network = small(join="lape", bias="relative2d", bias_join="lape", rotary="mixed")
    (maps,), (logits,), (turns,) = correlations(network), biases(network), rotations(network)
    assert maps is not None and maps.shape == (3, 17, 17) and maps[:, 1:, 1:].isfinite().all()
    assert logits is not None and logits.shape == (3, 2, 16, 16)
    assert turns is not None and turns.shape == (3, 16, 16)


def test_layer_scale_is_no_matrix_that_decays() -> None:
    network = small()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    kept = parameter_groups(network, OptimConfig(), exempt=network.position_parameters())[-1]
    found = {names[id(parameter)] for parameter in kept["params"]}
    assert {f"blocks.{index}.ls{branch}.gamma" for index in range(3) for branch in (1, 2)} <= found
    assert kept["weight_decay"] == 0 and {"pos_embed", "cls_token"} <= found


@pytest.mark.parametrize("variant", ["deit_tiny", "vit_lite_6_4", "ceit_tiny", "swin_tiny"])
def test_any_network_takes_layer_scale(variant: Variant) -> None:
    """A factor of 1 changes nothing, and of two branches each has its own, plain and optimised."""
    sizes: dict[str, Any] = {"variant": variant, "image_size": 32, "embed_dim": 32, "num_heads": 2}
    if variant == "swin_tiny":
        sizes |= {"patch_size": 4, "window_size": 1, "depths": (1, 1, 1, 1)}
    else:
        sizes |= {"depth": 2} | ({} if variant == "ceit_tiny" else {"patch_size": 4})
    plain, scaled = (build_model(ModelConfig(**sizes, layer_scale=scale)).eval() for scale in (None, 1.0))
    state = dict(plain.state_dict())
    gammas = {name: value for name, value in scaled.state_dict().items() if name.endswith("gamma")}
    assert gammas and not any(name.endswith("gamma") for name in state)
    scaled.load_state_dict(state | gammas)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = plain(images)
        torch.testing.assert_close(scaled(images), wanted)
        for name in list(gammas)[:2]:
            scaled.load_state_dict(state | gammas | {name: gammas[name] * 2})
            other = scaled(images)
            assert (other - wanted).abs().max() > 1e-3
    torch.testing.assert_close(optimise_blocks(scaled)(images), other, rtol=1e-4, atol=1e-5)


def kept_numbers(network: nn.Module) -> int:
    """Count the numbers of activations that a pass keeps for the gradient, but for what it computes again."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(64, 3, 16, 16))
    return sum(size for size in sizes if size >= 64 * 17 * 32)


def test_layer_scale_keeps_no_activation_for_the_gradient() -> None:
    """Where blocks are optimised it is part of the weights, and nothing more is kept than without it."""
    without, plain = kept_numbers(optimise_blocks(small(layer_scale=0.0))), kept_numbers(small())
    assert kept_numbers(optimise_blocks(small())) == without < plain


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        ({}, [0.0, 0.1, 0.2]),
        ({"drop_path_rule": "constant"}, [0.2, 0.2, 0.2]),
        ({"variant": "deit3_small"}, [0.2, 0.2, 0.2]),
        ({"variant": "deit3_small", "drop_path_rule": "linear"}, [0.0, 0.1, 0.2]),
    ],
)
def test_rates_of_stochastic_depth(fields: dict[str, Any], rates: list[float]) -> None:
    network = build_model(ModelConfig(**{**SMALL, "variant": "deit_tiny", "drop_path": 0.2, **fields}))
    assert [block.drop_path.rate for block in network.stages()[0].blocks] == pytest.approx(rates)  # type: ignore[union-attr]


def test_layer_scale_begins_where_it_is_set() -> None:
    for given, wanted in ((None, 1e-4), (1e-6, 1e-6)):
        network = build_model(ModelConfig(**SMALL, layer_scale=given))
        scales = [part for part in network.modules() if isinstance(part, LayerScale)]
        assert len(scales) == 6
        assert all(torch.equal(scale.gamma, torch.full((32,), wanted)) for scale in scales)
    off = build_model(ModelConfig(**SMALL, layer_scale=0.0))
    assert not any(isinstance(part, LayerScale) for part in off.modules())
    with pytest.raises(
        ValueError, match="drop_path_rule='cosine' is not known; choose one of linear, constant"
    ):
        ModelConfig(drop_path_rule="cosine")  # type: ignore[arg-type]
