"""Position reports of the other families: Swin's stages and windows, T2T-ViT's and CeiT's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.networks import perturbed
from PIL import Image
from torch import Tensor, nn

from lape_ray.config import ModelConfig
from lape_ray.model import Network
from lape_ray.model.position import LayerPosition
from lape_ray.model.swin import Swin
from lape_ray.report import figures, progress
from lape_ray.report.position import (
    PositionView,
    biases,
    correlations,
    cosine,
    measure_strength,
    rotations,
    seen_by_attention,
    views,
)
from lape_ray.report.position_page import write_position_report
from lape_ray.training.recompute import optimise_blocks

# Grids of 16, 8, 4 and 2 tokens: shifted windows in the first two stages, one whole window in the last two.
SWIN: dict[str, Any] = {
    "variant": "swin_tiny", "image_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 2, 1, 1),
    "embed_dim": 16, "num_heads": 2, "num_classes": 10,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "t2t_vit_7": {"image_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2},
    "ceit_tiny": {"image_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2},
}
GRIDS = [(16, 16), (8, 8), (4, 4), (2, 2)]


def swin(**fields: Any) -> Swin:
    network = perturbed(ModelConfig(**{**SWIN, **fields})).eval()
    assert isinstance(network, Swin)
    return network


def seen(**fields: Any) -> list[PositionView]:
    return views(swin(**fields), label="s")


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def normal(w: Tensor, eps: float) -> Tensor:
    mean, variance = w.mean(-1, keepdim=True), w.var(-1, keepdim=True, correction=0)
    return (w - mean) / (variance + eps).sqrt()


def of_2x2(x_1ND: Tensor, side: int) -> Tensor:
    """Four neighbours in one vector, by index: the column's parity before the row's, as in Swin's code."""
    image = x_1ND.reshape(side, side, -1)
    parts = [image[row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return torch.cat(parts, dim=-1).reshape(1, side * side // 4, -1)


@torch.no_grad()
def test_lapes_w_is_seen_as_it_is_on_every_grid() -> None:
    network = swin(join="lape")
    found = correlations(network)
    layers = network.layer_positions()
    for stage, grid, correlation_LNN in zip(network.stages(), GRIDS, found, strict=True):
        assert stage.grid == grid
        assert correlation_LNN is not None and len(correlation_LNN) == len(stage.blocks)
        for correlation_NN in correlation_LNN:
            w = next(layers).attention_1ND
            assert w is not None
            torch.testing.assert_close(correlation_NN, F.cosine_similarity(w[0, :, None], w[0, None], dim=-1))


@torch.no_grad()
def test_a_table_in_the_stream_is_followed_through_merging() -> None:
    """The merging's norm leaves gamma (w - mean) of it, but for a factor; its beta is no position."""
    network = swin(join="basic")
    found, w = iter(seen_by_attention(network) or []), network.pos_embed
    for stage, (side, _) in zip(network.stages(), GRIDS, strict=True):
        for block in stage.blocks:
            norm = block.norm1
            wanted = normal(w, norm.eps) * norm.weight + norm.bias
            torch.testing.assert_close(next(found), wanted[0], atol=1e-5, rtol=1e-5)
        if isinstance(stage.merge, nn.Module):
            four = of_2x2(w, side)
            w = (
                stage.merge.norm.weight * (four - four.mean(-1, keepdim=True))
            ) @ stage.merge.reduction.weight.T
    assert next(found, None) is None


@torch.no_grad()
def test_the_position_part_of_the_stream_is_exact_through_merging() -> None:
    """Where nothing but position enters the stream, all of attention's input is position, in the last stage too."""
    network = swin(join="basic")
    for name, parameter in network.named_parameters():
        if (
            name.startswith("patch_embed")
            or ".attn.proj." in name
            or ".fc2." in name
            or "downsample.norm.b" in name
        ):
            parameter.zero_()
    inputs: list[Tensor] = []
    block = network.stages()[3].blocks[0]
    block.norm1.register_forward_hook(lambda _, given, out: inputs.append(out - block.norm1.bias))
    strength = measure_strength(network, images())[3]
    wanted = inputs[0].norm(dim=-1)[0]  # l2 LN(w) is all but the norm's beta, and l1 LN(x) that beta's share
    assert wanted.min() > 1
    assert strength.norm_ratio_LN is not None and (strength.norm_ratio_LN > 3).all()


@torch.no_grad()
@pytest.mark.parametrize("bias", ["none", "relative2d"])
def test_weights_of_a_window_are_those_that_attention_mixes_with(bias: str) -> None:
    network = swin(position="none", bias=bias)
    layers, x = list(network.layer_positions()), torch.randn(2, 256, 16)
    for block, layer, shift in zip(network.stages()[0].blocks, layers, (0, 2), strict=False):
        weights_BHNV = block.attn.weights(x, layer)
        assert weights_BHNV.shape == (2, 2, 256, 16)
        torch.testing.assert_close(weights_BHNV.sum(-1), torch.ones(2, 2, 256))
        whole_BHNN = torch.zeros(2, 2, 256, 256)
        for query in range(256):
            row, column = ((place - shift) % 16 // 4 * 4 for place in divmod(query, 16))
            keys = [
                (row + r + shift) % 16 * 16 + (column + c + shift) % 16 for r in range(4) for c in range(4)
            ]
            whole_BHNN[:, :, query, keys] = weights_BHNV[:, :, query]
        values_BHNE = block.attn.qkv(x)[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
        wanted = block.attn.proj((whole_BHNN @ values_BHNE).transpose(1, 2).flatten(2))
        torch.testing.assert_close(block.attn(x, layer), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("join", ["basic", "lape", "lape_norm"])
@torch.no_grad()
def test_strength_is_told_for_every_stage_and_of_the_plain_blocks(join: str) -> None:
    network = swin(join=join)
    found = measure_strength(network, images())
    optimised = measure_strength(optimise_blocks(swin(join=join)), images())
    for strength, again, (side, _), depth in zip(found, optimised, GRIDS, SWIN["depths"], strict=True):
        assert strength.norm_ratio_LN is not None and again.norm_ratio_LN is not None
        assert strength.norm_ratio_LN.shape == strength.moved_LN.shape == (depth, side * side)
        assert ((strength.moved_LN >= 0) & (strength.moved_LN <= 1)).all() and strength.moved_LN.max() > 1e-4
        torch.testing.assert_close(again.norm_ratio_LN, strength.norm_ratio_LN, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.moved_LN, strength.moved_LN, rtol=1e-3, atol=1e-5)
    block, layer = network.stages()[0].blocks[0], next(iter(network.layer_positions()))
    x = network.patch_embed(images()) + (0 if layer.residual_1ND is None else layer.residual_1ND)
    if layer.attention_1ND is not None:
        bare = block.norm1(x)
        both = [block.attn.weights(h, LayerPosition()) for h in (bare + layer.attention_1ND, bare)]
        moved = (both[0] - both[1]).abs().sum(-1).mean((0, 1)) / 2
        torch.testing.assert_close(found[0].moved_LN[0], moved)


def test_views_say_where_a_stage_lies() -> None:
    found = seen(join="lape", bias="relative2d", rotary="axial")
    assert [one.label for one in found] == [f"s, stage {number}" for number in (1, 2, 3, 4)]
    assert [one.grid for one in found] == GRIDS
    assert [one.window for one in found] == [(4, 4), (4, 4), (4, 4), (2, 2)]
    assert [one.first_layer for one in found] == [0, 2, 4, 5]
    assert [divmod(one.patch((13, 2)), one.grid[1]) for one in found] == [(13, 2), (6, 1), (3, 0), (1, 0)]
    assert [one.place_in_window((13, 2)) for one in found] == [(1, 2), (2, 1), (3, 0), (1, 0)]
    assert [one.place_in_window(None) for one in found] == [(2, 2), (2, 2), (2, 2), (1, 1)]
    with pytest.raises(ValueError, match="token 16,0 is not on s, stage 3's grid of 16 rows and 16 columns"):
        found[2].patch((16, 0))


def test_bias_and_rotation_are_a_windows() -> None:
    network = swin(position="none", bias="relative2d", rotary="axial")
    found = biases(network)
    for stage, maps in zip(network.layers, found, strict=True):
        side, table = stage.window[0], stage.bias.table.table_LRH  # type: ignore[index,union-attr]
        assert maps is not None
        rows, columns = divmod(side * side - 1, side)  # of the last token
        index = (0 - rows + side - 1) * (2 * side - 1) + (0 - columns + side - 1)
        torch.testing.assert_close(maps[:, :, 0, side * side - 1], table[:, index])  # type: ignore[index]
    turned = rotations(network)
    assert [one.shape for one in turned if one is not None] == [
        (2, 16, 16),
        (2, 16, 16),
        (1, 16, 16),
        (1, 4, 4),
    ]
    assert correlations(network) == [None] * 4


def test_figures_have_a_row_for_each_stage() -> None:
    both = [*views(swin(join="basic"), label="a"), *views(swin(join="lape"), label="b")]
    figure = figures.token_figure(both, (13, 2))
    assert figure is not None
    drawn = [
        axis for axis in figure.axes if axis.images and axis.get_xlabel() is not None and axis.get_visible()
    ]
    maps = [axis.images[0].get_array() for axis in drawn][:12]
    assert [one.shape for one in maps] == [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4)] + [(2, 2)] + [
        (16, 16)
    ] * 2 + [(8, 8)] * 2 + [(4, 4)] + [(2, 2)]
    wanted = both[5].correlation_LNN
    assert wanted is not None
    np.testing.assert_allclose(maps[8], wanted[0, 6 * 8 + 1].unflatten(0, (8, 8)).numpy())
    titles = [axis.get_title() for axis in drawn if axis.get_title()]
    assert titles == [f"layer {number}" for number in (1, 2, 3, 4, 5, 6)] * 2
    corners = [tuple(patch.get_xy()) for axis in drawn for patch in axis.patches]
    assert corners[2] == corners[8] == (0.5, 5.5)
    measured = [*views(swin(join="lape"), label="b", images_BCHW=images())]
    left, _ = figures.strength_figure(measured).axes  # type: ignore[union-attr]
    assert [line.get_xdata().tolist() for line in left.lines if "patches" in str(line.get_label())] == [
        [1, 2], [3, 4], [5], [6],
    ]  # fmt: skip


EVERYTHING = {"join": "lape", "bias": "relative2d", "rotary": "axial"}


@pytest.mark.parametrize(
    ("variant", "fields"),
    [*[("swin_tiny", each) for each in ({"join": "basic"}, EVERYTHING, {"position": "none", "bias": "alibi2d"})],
     *[(other, EVERYTHING) for other in OTHERS]],
    ids=str,
)  # fmt: skip
def test_every_family_has_a_page(variant: str, fields: dict[str, str], tmp_path: Path) -> None:
    sizes = SWIN if variant == "swin_tiny" else {"variant": variant, **OTHERS[variant]}
    network: Network = optimise_blocks(perturbed(ModelConfig(**sizes, **fields))).eval()  # type: ignore[arg-type]
    found = views(network, label="a network", description="small", images_BCHW=images())
    page = write_position_report(found, tmp_path, token=(1, 0)).read_text()
    assert ("A network of several stages" in page) == (variant == "swin_tiny" and "join" in fields)
    names = {path.stem for path in tmp_path.glob("*.png")}
    stages, prefix = len(found), network.num_prefix
    wanted = {"strength"} | {f"bias_{index + 1}" for index in range(stages) if "bias" in fields}
    if "join" in fields:
        wanted |= {"token", "matrix"} | ({"class_token"} if prefix else set())
    assert names == wanted | ({"rotation"} if "rotary" in fields else set())
    for path in tmp_path.glob("*.png"):
        assert np.asarray(Image.open(path)).std() > 5, f"{path.name} is empty"
    for one in found:
        assert one.strength is not None and one.strength.moved_LN.isfinite().all()


def test_a_training_is_followed_on_every_grid(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    what, maps = progress.training_maps(seen(join="lape"))
    progress.remember(run, 3, maps)
    found = progress.recall(run, [3])
    assert [one.shape for one in found[3]] == [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4), (2, 2)]
    torch.testing.assert_close(found[3], maps, atol=5e-5, rtol=0)
    page = progress.write_training_page("a run", what, found, tmp_path / "page")
    assert np.asarray(Image.open(page.with_suffix(".png"))).std() > 5
    for fields in ({"bias": "relative2d"}, {"rotary": "axial"}):
        _, maps = progress.training_maps(seen(position="none", **fields))
        assert [one.shape for one in maps] == [(4, 4)] * 5 + [(2, 2)]


def test_rows_that_are_alike_correlate_through_stages() -> None:
    """A table that is the same in every 8 x 8 patches is, too, on the last grid, whose tokens are 8 x 8 patches."""
    network = swin(join="lape")
    with torch.no_grad():
        assert network.pos_embed is not None
        network.pos_embed.copy_(torch.randn(8, 8, 16).repeat(2, 2, 1).flatten(0, 1)[None])
    last = correlations(network)[3]
    assert last is not None
    torch.testing.assert_close(last, torch.ones_like(last))
    assert cosine(network.pos_embed[0]).min() < 0
