"""Swin: parity with the official code and timm, every cell, w through the merging of stages, impossible cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import CELLS as ALL_CELLS
from helpers.networks import cell_id, check_cell, check_golden, check_official, count, paired, perturbed
from timm.models.swin_transformer import SwinTransformer

from lape_ray.config import ModelConfig, parse_value
from lape_ray.model import build_model
from lape_ray.model.convert import load_weights
from lape_ray.model.position import STAGED_JOINS
from lape_ray.model.swin import Swin
from lape_ray.training.optim import parameter_groups
from lape_ray.training.recompute import optimise_blocks

# Grids of 16, 8, 4 and 2 tokens: shifted windows in the first two stages, one whole window in the last two.
SMALL: dict[str, Any] = {
    "variant": "swin_tiny", "image_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 2, 1, 1),
    "embed_dim": 16, "num_heads": 2, "num_classes": 5,
}  # fmt: skip
REFERENCE = {"variant": "swin_tiny", "embed_dim": 8, "num_heads": 1, "num_classes": 10}
OFFICIAL: dict[str, dict[str, str]] = {
    "swin-RPE-basic": {"position": "none", "bias": "relative2d"},
    "swin-learnable-LaPE": {"position": "learnable", "join": "lape"},
}
CELLS = paired(cell for cell in ALL_CELLS if cell["join"] in STAGED_JOINS)


def small(**fields: Any) -> Swin:
    network = perturbed(ModelConfig(**{**SMALL, **fields}))
    assert isinstance(network, Swin)
    return network


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_outputs_and_gradients(name: str, optimised: bool) -> None:
    check_official(name, {**REFERENCE, **OFFICIAL[name]}, optimised=optimised)


@pytest.mark.parametrize("cell", OFFICIAL.values(), ids=OFFICIAL)
def test_logits_stay(cell: dict[str, str]) -> None:
    check_golden("swin_tiny_" + cell_id(cell), ModelConfig(**SMALL, **cell))


@pytest.mark.parametrize("cell", CELLS, ids=cell_id)
def test_every_cell_trains(cell: dict[str, str]) -> None:
    check_cell(ModelConfig(**{**SMALL, **cell, "num_heads": 1}))  # a head of spiral is 16 wide or more


@pytest.mark.parametrize(
    ("variant", "neither", "relative", "learnable", "both", "lape"),
    [
        ("swin_tiny", 28_265_032, 28_288_354, 28_566_088, 28_589_410, 8_832),
        ("swin_small", 49_558_600, 49_606_258, 49_859_656, 49_907_314, 18_048),
    ],
)
def test_parameter_counts(
    variant: str, neither: int, relative: int, learnable: int, both: int, lape: int
) -> None:
    none, table, bias = {"position": "none"}, {"position": "learnable"}, {"bias": "relative2d"}
    counts = [(none, neither), ({**none, **bias}, relative), (table, learnable), ({**table, **bias}, both)]
    counts += [
        ({**table, "join": "lape"}, learnable + lape),
        ({**table, **bias, "join": "lape"}, both + lape),
    ]
    with torch.device("meta"):
        for fields, parameters in counts:
            assert count(build_model(ModelConfig(variant=variant, **fields))) == parameters  # type: ignore[arg-type]


def test_timms_weights_give_timms_logits() -> None:
    """Its names differ: a merging begins a stage, and the head has a part more."""
    torch.manual_seed(0)
    theirs = SwinTransformer(
        img_size=112, patch_size=2, embed_dim=16, depths=(2, 2, 1, 1), num_heads=(2, 4, 8, 16), num_classes=5
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    sizes = {**SMALL, "image_size": 112, "window_size": 7}
    ours = build_model(ModelConfig(**sizes, position="none", bias="relative2d"))
    assert load_weights(ours, theirs.state_dict()) == []
    images = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        for network in (ours, optimise_blocks(ours)):
            torch.testing.assert_close(network.eval()(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_w_crosses_stages_through_their_own_merging() -> None:
    """w_l = LN_l(w_{l-1}) in every block; between stages the tokens' norm and reduction, and no other parameter."""
    network = small(join="lape")
    layers, w, index = list(network.layer_positions()), network.pos_embed, 0
    for stage in network.layers:
        for norm in stage.join.norms:
            w = F.layer_norm(w, w.shape[-1:], norm.weight, norm.bias, 1e-5)  # type: ignore[union-attr,arg-type]
            torch.testing.assert_close(layers[index].attention_1ND, w)
            assert layers[index].residual_1ND is None
            index += 1
        if stage.downsample is not None:
            w = stage.downsample(w)
    assert index == len(layers) == 6
    assert layers[-1].attention_1ND.shape == (1, 4, 128)  # type: ignore[union-attr]


def test_a_basic_table_enters_once() -> None:
    first, *others = small(join="basic", bias="none").layer_positions()
    assert first.residual_1ND is not None
    assert others == [first._replace(residual_1ND=None)] * 5


def test_attention_sees_windows_of_the_image_and_no_opposite_border() -> None:
    """A changed token changes those of its window alone; in a shifted block no window spans the border."""
    network = small(position="none")
    blocks = network.layers[0].blocks
    layer, x = next(iter(network.layer_positions())), torch.randn(1, 256, 16)
    for block, shift in ((blocks[0], 0), (blocks[1], 2)):
        for row, column in ((0, 0), (5, 14), (15, 2)):
            moved = x.clone()
            moved[0, 16 * row + column] += torch.randn(16)
            changed = (block(moved, layer) - block(x, layer)).abs().amax(-1).reshape(16, 16) > 0
            rows, columns = (
                {other for other in range(16) if (other + shift) // 4 == (place + shift) // 4}
                for place in (row, column)
            )
            wanted = {(r, c) for r in rows for c in columns}
            assert {(r, c) for r, c in changed.nonzero().tolist()} == wanted


def test_position_does_not_grow_with_the_batch() -> None:
    network = small(join="lape", bias="relative2d")
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        together, alone = network.eval()(images), torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("join", ["share", "unshare", "lape_shared"])
def test_joins_without_a_meaning_are_refused(join: str) -> None:
    with pytest.raises(
        ValueError, match=r"several stages.*valid joins of learnable are basic, lape, lape_identity, "
    ):
        build_model(ModelConfig(**SMALL, join=join))
    with pytest.raises(ValueError, match="nothing to join"):
        build_model(ModelConfig(**SMALL, position="none", join=join))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 40}, "image_size=40 gives stage 1 a grid of 10 x 10.*a multiple of 64"),
        ({"image_size": 24}, "gives stage 1 a grid of 6 x 6"),
        ({"depth": 3}, "depth=3 does not apply to swin_tiny, which has several stages; set model.depths"),
        ({"variant": "deit_tiny", "window_size": None}, "depths and window_size do not apply to deit_tiny"),
        ({"variant": "deit_tiny", "depths": None}, "depths and window_size do not apply to deit_tiny"),
    ],
)
def test_sizes_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(**{**SMALL, **fields}))


def test_depths_on_the_command_line() -> None:
    kind = ModelConfig.__annotations__["depths"]
    assert parse_value(eval(kind), "2,2,18,2") == (2, 2, 18, 2)
    with pytest.raises(ValueError, match="must be 4 values"):
        parse_value(eval(kind), "2,2")
    with pytest.raises(ValueError, match="must be above 0 for every stage"):
        ModelConfig(variant="swin_tiny", depths=(2, 0, 6, 2))


def test_another_resolution_resizes_tables() -> None:
    old = small(join="lape", bias="relative2d", bias_join="lape")
    new = small(join="lape", bias="relative2d", bias_join="lape", image_size=64, window_size=8)
    notes = [note.split()[0] for note in load_weights(new, old.state_dict())]
    assert notes[0] == "pos_embed"
    assert {f"layers.{stage}.bias.table.table_LRH" for stage in range(4)} < set(notes)
    assert new(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_official_files_hold_buffers_that_are_computed_here() -> None:
    state: dict[str, Any] = dict(small(position="none").state_dict())
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16)
    assert load_weights(small(position="none"), {"model": state}) == []


def test_a_fresh_network_begins_as_the_official_one() -> None:
    torch.manual_seed(0)
    network = build_model(ModelConfig(**SMALL, bias="relative2d"))
    for name, parameter in network.named_parameters():
        if name.startswith("patch_embed.proj"):
            continue  # a convolution, as PyTorch makes it
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        else:
            assert (parameter == float("norm" in name and name.endswith("weight"))).all(), name


def test_no_table_is_decayed() -> None:
    """As in Swin's own code, which exempts relative biases too; DeiT-style code decays these."""
    network = small(join="lape", bias="relative2d")
    tables = {"pos_embed", *(f"layers.{stage}.bias.table.table_LRH" for stage in range(4))}
    assert network.position_parameters() == tables


def test_muon_takes_the_blocks_matrices() -> None:
    from lape_ray.config import OptimConfig

    network = small(join="lape", bias="relative2d")
    groups = parameter_groups(network, OptimConfig(algorithm="muon"), exempt=network.position_parameters())
    matrices = {id(p) for group in groups if group["parts"] for p in group["params"]}
    wanted = {id(p) for name, p in network.named_parameters() if ".blocks." in name and p.ndim == 2}
    assert matrices == wanted
