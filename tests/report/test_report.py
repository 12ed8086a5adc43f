"""Reports: the numbers that figures show equal hand-made ones, and the page needs nothing but itself."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import run_here
from helpers.networks import part, read_reference
from helpers.photographs import write_photographs
from PIL import Image
from torch import Tensor, nn

from lape_ray.config import ModelConfig
from lape_ray.inference.checkpoints import resolve_checkpoints
from lape_ray.inference.samples import evenly_spaced
from lape_ray.model import VisionTransformer, build_model
from lape_ray.model.position import LayerPosition
from lape_ray.report import figures, progress
from lape_ray.report.build import build_position_report, parse_token
from lape_ray.report.page import Page
from lape_ray.report.position import (
    PositionView,
    Strength,
    biases,
    correlations,
    cosine,
    measure_strength,
    rotations,
    seen_by_attention,
    split_common_norm,
    views,
)
from lape_ray.training.recompute import optimise_blocks

ROOT = Path(__file__).parent.parent.parent
TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "image_size": 16, "patch_size": 4, "num_classes": 5}


def network(**kwargs: object) -> VisionTransformer:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**TINY, **kwargs}))  # type: ignore[arg-type]
    with torch.no_grad():  # no norm at its neutral start, so that each of them must be applied
        for name, parameter in model.named_parameters():
            if "norm" in name or "table" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def view(*given: Any, **named: Any) -> PositionView:
    """The view of a network of one stage."""
    (one,) = views(*given, **named)
    return one


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """The textbook's formula against torch's."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


# --- what attention sees --------------------------------------------------------------------------------------


def test_cosine_of_known_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    half = math.sqrt(0.5)
    nan = math.nan
    expected = torch.tensor(
        [
            [1, 0, half, -1, nan],
            [0, 1, half, 0, nan],
            [half, half, 1, -half, nan],
            [-1, 0, -half, 1, nan],
            [nan] * 5,
        ]
    )
    torch.testing.assert_close(cosine(rows), expected, equal_nan=True)


@torch.no_grad()
def test_each_join_is_seen_as_the_paper_says() -> None:
    basic, share, unshare = (network(join=join) for join in ("basic", "share", "unshare"))
    for layer, block in enumerate(basic.blocks):
        torch.testing.assert_close(
            seen_by_attention(basic)[layer], layer_norm(basic.pos_embed[0], block.norm1)
        )
    for layer, block in enumerate(share.blocks):
        expected = layer_norm((layer + 1) * share.pos_embed[0], block.norm1)
        torch.testing.assert_close(seen_by_attention(share)[layer], expected)
    for layer, block in enumerate(unshare.blocks):
        expected = layer_norm(unshare.pos_embed[: layer + 1].sum(0), block.norm1)
        torch.testing.assert_close(seen_by_attention(unshare)[layer], expected)
    lape, shared = network(join="lape"), network(join="lape_shared")
    w = lape.pos_embed[0]
    for layer in range(3):
        w = layer_norm(w, lape.join.norms[layer])
        torch.testing.assert_close(seen_by_attention(lape)[layer], w)
        expected = layer_norm(shared.pos_embed[0], shared.join.norms[layer])
        torch.testing.assert_close(seen_by_attention(shared)[layer], expected)


@torch.no_grad()
def test_a_hand_made_embedding_gives_its_known_correlation() -> None:
    """Rows +v and -v alternate: every map is a chessboard of +1 and -1, in each layer, for each join."""
    for join in ("basic", "lape"):
        model = build_model(ModelConfig(**TINY, join=join)).eval()  # type: ignore[arg-type]
        v = torch.randn(32, generator=torch.Generator().manual_seed(1))
        v = v - v.mean()
        signs = torch.ones(17)
        signs[1:] = torch.tensor([1.0, -1.0]).repeat(8).unflatten(0, (4, 4)).mul(
            torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
        ).flatten()  # fmt: skip
        model.pos_embed.copy_(signs[None, :, None] * v)
        expected = signs[:, None] * signs[None, :]
        found = view(model, label="hand-made")
        torch.testing.assert_close(found.correlation_LNN, expected.expand(3, -1, -1), atol=1e-4, rtol=0)
        chessboard = signs[1:].unflatten(0, (4, 4)) * signs[1 + 5]
        torch.testing.assert_close(found.correlation_maps(5), chessboard.expand(3, -1, -1), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            found.prefix_maps()["class token"],
            signs[1:].unflatten(0, (4, 4)).expand(3, -1, -1),
            atol=1e-4,
            rtol=0,
        )
        figure = figures.token_figure([found], (1, 1))
        drawn = [axis.images[0].get_array() for axis in figure.axes if axis.images]
        assert len(drawn) == 3
        for pixels in drawn:
            np.testing.assert_allclose(pixels, chessboard.numpy(), atol=1e-4)


def test_a_zero_row_has_no_correlation() -> None:
    model = build_model(ModelConfig(**TINY, position="sincos2d", join="lape"))  # type: ignore[arg-type]
    (found,) = correlations(model)
    assert found[:, 0].isnan().all()
    assert found[:, 1:, 1:].isfinite().all()


def test_position_is_not_told_where_it_depends_on_the_image() -> None:
    model = build_model(ModelConfig(variant="vit_lite_6_4", join="share"))
    with pytest.raises(ValueError, match=r"Compact Transformer.*report joins basic, lape"):
        correlations(model)
    assert correlations(build_model(ModelConfig(variant="cvt_7_4", join="basic")))[0].shape == (7, 64, 64)


def test_bias_maps_are_the_tables_offsets() -> None:
    model = network(position="none", bias="relative2d")
    table, (maps,) = model.bias.table.table_LRH, biases(model)
    assert maps.shape == (3, 2, 16, 16)
    for query, key in ((0, 15), (5, 6), (9, 2)):
        rows, columns = query // 4 - key // 4 + 3, query % 4 - key % 4 + 3
        torch.testing.assert_close(maps[:, :, query, key], table[:, rows * 7 + columns])
    assert biases(network()) == [None]


def test_what_depends_on_the_image_is_shown_by_its_strength(tmp_path: Path) -> None:
    from lape_ray.report.position_page import write_position_report

    peg = network(position="peg")
    with pytest.raises(ValueError, match="depends on the image, and none is given"):
        write_position_report([view(peg, label="p")], tmp_path)
    (one,) = views(peg, label="p", images_BCHW=torch.randn(2, 3, 16, 16))
    assert one.strength is not None and one.strength.norm_ratio_LN is not None
    assert one.strength.norm_ratio_LN[0].max() == 0, "the first block has no position"
    assert one.strength.norm_ratio_LN[1, 1:].min() > 0
    assert one.strength.moved_LN[1].min() > 0
    assert "depends on the image" in write_position_report([one], tmp_path).read_text()


def test_a_key_that_no_query_sees_is_grey_in_a_bias_figure() -> None:
    one = view(network(position="none", bias="lookhere"), label="l")
    hidden = network(position="none", bias="lookhere").bias.table(slice(None)).isneginf()
    assert hidden.any()
    assert torch.equal(one.bias_LHPP.isnan(), hidden)
    drawn = figures.bias_figure(one, (2, 1)).axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn.mask, hidden[0, 0, 9].unflatten(0, (4, 4)).numpy())


def test_rotation_of_a_patch_against_itself_is_one() -> None:
    (found,) = rotations(network(position="none", rotary="axial"))
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.ones(3, 16))
    frequency = 100.0 ** (
        -torch.arange(0, 16, 4) / 16
    )  # one column to the right: only x turns, half of the channels
    torch.testing.assert_close(found[0, 0, 1], (frequency.cos().sum() + 4) / 8)
    assert rotations(network()) == [None]


# --- how strongly ---------------------------------------------------------------------------------------------


def test_the_shares_of_a_common_norm_add_up_to_it() -> None:
    """Equations 6 and 7 of the paper: LN(x) = l1 LN(x - w) + l2 LN(w) + l3 beta."""
    norm = network().blocks[0].norm1
    x, w = torch.randn(2, 5, 32), torch.randn(1, 5, 32)
    position, tokens = split_common_norm(norm, x, w)
    deviation = [(part.var(-1, keepdim=True, correction=0) + norm.eps).sqrt() for part in (x, x - w, w)]
    l3 = (deviation[0] - deviation[1] - deviation[2]) / deviation[0]
    torch.testing.assert_close(position + tokens + l3 * norm.bias, layer_norm(x, norm))


@pytest.mark.parametrize("variant", ["deit_tiny", "vit_lite_6_4"])
@torch.no_grad()
def test_strength_of_the_first_layer_by_hand(variant: str) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    for join in ("basic", "lape"):
        model = network(variant=variant, join=join)
        (strength,) = measure_strength(model, images)
        x, block, w = model._tokens(images), model.blocks[0], model.pos_embed
        if join == "lape":
            tokens, position = block.norm1(x), layer_norm(w, model.join.norms[0])
            whole = tokens + position
        else:
            whole = block.norm1(x + w)
            position, tokens = split_common_norm(block.norm1, x + w, w)
        ratio = (position.norm(dim=-1) / tokens.norm(dim=-1)).mean(0)
        torch.testing.assert_close(strength.norm_ratio_LN[0], ratio)
        attention = [block.attn.weights(given, LayerPosition()) for given in (whole, whole - position)]
        moved = (attention[0] - attention[1]).abs().sum(-1).mean((0, 1)) / 2
        torch.testing.assert_close(strength.moved_LN[0], moved)


@pytest.mark.parametrize("variant", ["deit_tiny", "vit_lite_6_4"])
@torch.no_grad()
def test_the_position_part_of_the_stream_is_exact_in_every_layer(variant: str) -> None:
    """Where nothing but position enters the stream, all of attention's input is position, in the last layer too."""
    model = network(variant=variant)
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        block.norm2.bias.zero_()
    if model.cls_token is not None:
        model.cls_token.zero_()
    model.patch_embed.proj.weight.zero_()
    model.patch_embed.proj.bias.zero_()
    seen: list[Tensor] = []
    model.blocks[2].attn.qkv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    (strength,) = measure_strength(model, torch.randn(2, 3, 16, 16))
    if variant == "deit_tiny":
        torch.testing.assert_close(seen[0][0], seen_by_attention(model)[2])
    else:  # the norm on the stream scales rows: same directions, and its own size
        torch.testing.assert_close(cosine(seen[0][0]), cosine(seen_by_attention(model)[2]), atol=1e-4, rtol=0)
    assert (strength.norm_ratio_LN > 3).all(), "no token part but the norm's bias"


@pytest.mark.parametrize("variant", ["deit_tiny", "vit_lite_6_4", "cvt_7_4"])
@pytest.mark.parametrize("join", ["basic", "lape"])
def test_strength_is_that_of_the_plain_blocks(variant: str, join: str) -> None:
    """A checkpoint is opened with optimised blocks, whose norms and last layer are called in another way."""
    images = torch.randn(3, 3, 16, 16)
    (plain,) = measure_strength(network(variant=variant, join=join), images)
    (optimised,) = measure_strength(optimise_blocks(network(variant=variant, join=join)), images)
    torch.testing.assert_close(optimised.norm_ratio_LN, plain.norm_ratio_LN)
    torch.testing.assert_close(optimised.moved_LN, plain.moved_LN, rtol=1e-4, atol=1e-6)


def test_without_position_nothing_moves() -> None:
    (strength,) = measure_strength(network(position="none"), torch.randn(2, 3, 16, 16))
    assert strength.norm_ratio_LN is None
    assert strength.moved_LN.abs().max() == 0
    moved = measure_strength(network(position="none", bias="alibi2d"), torch.randn(2, 3, 16, 16))[0].moved_LN
    assert (moved[:, 1:] > 0.01).all()
    assert moved[:, 0].abs().max() == 0, "ALiBi gives the class token no bias"


def test_attention_weights_are_those_of_the_fused_kernel() -> None:
    model = network(bias="relative2d", rotary="mixed")
    block, layer = model.blocks[1], list(model.layer_positions())[1]
    x = torch.randn(2, 17, 32)
    weights = block.attn.weights(x, layer)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 17))
    v = block.attn.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)[2]
    torch.testing.assert_close(
        block.attn.proj((weights @ v).transpose(1, 2).flatten(2)), block.attn(x, layer)
    )


# --- figures and the page -------------------------------------------------------------------------------------


def test_every_figure_of_a_pair_has_one_colour_scale_and_labels() -> None:
    pair = [view(network(join=join), label=join) for join in ("basic", "lape")]
    for figure in (figures.token_figure(pair, None), figures.class_figure(pair), figures.matrix_figure(pair)):
        drawn = [axis.images[0] for axis in figure.axes if axis.images]
        assert len(drawn) == 6
        assert {image.get_clim() for image in drawn} == {(-1.0, 1.0)}
        labels = [axis.get_ylabel().split("\n")[0] for axis in figure.axes if axis.get_ylabel()]
        assert labels[:2] == ["basic", "lape"]
        assert [axis.get_title() for axis in figure.axes if axis.get_title()] == [
            "layer 1",
            "layer 2",
            "layer 3",
        ]
    matrix = figures.matrix_figure(pair)
    drawn = [axis.images[0].get_array() for axis in matrix.axes if axis.images]
    np.testing.assert_array_equal(drawn[4], pair[1].correlation_LNN[1].numpy())


def test_a_bias_figure_shows_the_table_on_its_own_scale() -> None:
    one = view(network(position="none", bias="relative2d"), label="r")
    figure = figures.bias_figure(one, (2, 1))
    drawn = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(drawn) == 6
    np.testing.assert_array_equal(drawn[4].get_array(), one.bias_LHPP[1, 1, 9].unflatten(0, (4, 4)).numpy())
    shown = one.bias_LHPP[:, :, 9].abs().max().item()
    assert {image.get_clim() for image in drawn} == {(-shown, shown)}


def test_a_strength_figure_tells_patches_from_the_class_token() -> None:
    one = view(network(join="lape"), label="lape", images_BCHW=torch.randn(2, 3, 16, 16))
    left, right = figures.strength_figure([one]).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), one.strength.norm_ratio_LN[:, 1:].mean(1))
    np.testing.assert_allclose(right.lines[1].get_ydata(), one.strength.moved_LN[:, 0])


def test_a_ratio_of_one_looks_like_one() -> None:
    """LaPE keeps both parts as long as each other; noise of 1e-5 must not fill the panel."""
    one = view(network(join="lape"), label="lape")
    strength = Strength(norm_ratio_LN=1 + 1e-5 * torch.randn(3, 17), moved_LN=torch.rand(3, 17))
    left, _ = figures.strength_figure([dataclasses.replace(one, strength=strength)]).axes
    low, high = left.get_ylim()
    assert low <= 0.1
    assert high >= 10
    assert left.yaxis.get_major_formatter()(0.1, 0) == "0.1"


def test_both_tokens_before_the_patches_are_shown() -> None:
    one = view(network(variant="deit_tiny_distilled"), label="d", images_BCHW=torch.randn(2, 3, 16, 16))
    figure = figures.class_figure([one])
    labels = [axis.get_ylabel() for axis in figure.axes if axis.images and axis.get_ylabel()]
    assert labels == ["d\nclass token\nrow", "d\ndistillation token\nrow"]
    drawn = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    np.testing.assert_array_equal(drawn[3], one.correlation_LNN[0, 1, 2:].unflatten(0, (4, 4)).numpy())
    left, _ = figures.strength_figure([one]).axes
    assert [line.get_label() for line in left.lines][:3] == [
        "d, patches",
        "d, class token",
        "d, distillation token",
    ]


def test_a_training_is_followed_over_restarts(tmp_path: Path) -> None:
    """Maps are kept in the run's folder; the page shows a row for each epoch that has them."""
    run, seen = str(tmp_path / "run"), {}
    for epoch in (2, 4, 8):
        one = view(network(join="lape"), label="a")
        what, seen[epoch] = progress.training_maps([one])
        progress.remember(run, epoch, seen[epoch])
    maps = progress.recall(run, range(2, 11, 2))
    assert list(maps) == [2, 4, 8]
    torch.testing.assert_close(maps[8], seen[8], atol=5e-5, rtol=0)
    page = progress.write_training_page("a run", what, maps, tmp_path / "page")
    assert "After 8 epochs. Shown is the cosine similarity" in page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {"training.html", "training.png", "training.svg"}


def test_a_training_without_token_embedding_shows_what_there_is() -> None:
    what, maps = progress.training_maps(views(network(position="none", bias="relative2d"), label="r"))
    assert (what.partition(",")[0], [one.shape for one in maps]) == (
        "bias on the attention logits",
        [(4, 4)] * 3,
    )
    what, maps = progress.training_maps(views(network(position="none", rotary="axial"), label="r"))
    assert (what.partition(" of")[0], [one.shape for one in maps]) == ("mean cosine", [(4, 4)] * 3)


def test_a_figure_is_the_same_bytes_twice() -> None:
    one = view(network(), label="a")
    first, second = (figures.svg(figures.token_figure([one], None)) for _ in range(2))
    assert first == second


def test_a_page_escapes_what_it_is_given() -> None:
    page = Page("<script>alert(1)</script>")
    page.table(("a", "<b>"), [("x & y", "1.5")])
    page.code("a < b")
    text = page.html()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert '<td>x &amp; y</td><td class="number">1.5</td>' in text
    assert "<pre>a &lt; b</pre>" in text


# --- the job --------------------------------------------------------------------------------------------------

REFERENCE = ["--model.embed_dim=64", "--model.depth=3", "--model.num_heads=2", "--model.image_size=32",
             "--model.patch_size=8", "--model.num_classes=10"]  # fmt: skip
REFERENCE_SIZES = {word[2:].split("=")[0]: int(word.split("=")[1]) for word in REFERENCE}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Checkpoints as the official code saves them, and a folder of images."""
    for name in ("learnable-basic", "learnable-LaPE", "2D_RPE-LN"):
        tensors, _ = read_reference(name)
        torch.save({"model": part(tensors, "state.")}, tmp_path / f"{name}.pth")
    write_photographs(tmp_path / "images", count=4)
    return tmp_path


def test_the_report_of_official_checkpoints(official: Path) -> None:
    specs = [
        f"basic={official}/learnable-basic.pth@deit_tiny_basic",
        f"{official}/learnable-LaPE.pth@deit_tiny_lape",
    ]
    (official / "out").mkdir()
    for name in ("position_report.html", "bias_7.png", "robustness.csv", "mine.txt"):
        (official / "out" / name).touch()
    options = ["--out", official / "out", "--images", official / "images", *REFERENCE]
    done = run_here("jobs/position_report.py", *specs, *options)
    assert done.returncode == 0, done.stderr
    assert f"report: {official}/out/position_report.html" in done.stdout
    made = {path.name for path in (official / "out").iterdir()}
    figure_names = ("token", "class_token", "matrix", "strength")
    assert "bias_7.png" not in made, "a figure of an earlier report"
    assert made == {"position_report.html", "mine.txt"} | {
        f"{name}.{kind}" for name in figure_names for kind in ("png", "svg")
    }
    for path in (official / "out").glob("*.png"):
        assert np.asarray(Image.open(path)).std() > 5, f"{path.name} is empty"
    text = (official / "out/position_report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text), "the page must not ask for anything"
    assert "deit_tiny_lape" in text
    assert text.count("<figure") == 4
    assert (official / "out").stat().st_mode & 0o777 == 0o755, "others may read it as before"


def test_the_report_says_what_it_leaves_out_and_why(official: Path) -> None:
    model = {"model.position": "none", "model.bias": "relative2d", "model.bias_join": "lape"}
    _, notes = build_position_report(
        [f"{official}/2D_RPE-LN.pth"], official / "out", overrides=REFERENCE_SIZES | model
    )
    assert "how strongly position is used is left out, as no images can be read" in notes[0]
    assert notes[0].split("(")[0] in (official / "out/position_report.html").read_text()
    assert (official / "out/bias_1.png").exists()
    assert not (official / "out/token.png").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.pth", "nowhere.pth is neither a checkpoint nor the id of an MLflow run"),
        ("a@b@c", r"'a@b@c' is not \[LABEL=\]CHECKPOINT\[@RECIPE"),
        ("0" * 32, "has no model that can be fetched"),
    ],
)
def test_a_wrong_spec_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    overrides = {"tracking.uri": "http://127.0.0.1:9"}
    with pytest.raises((ValueError, OSError), match=message):
        build_position_report([spec], tmp_path / "out", overrides=overrides)
    assert not (tmp_path / "out").exists()


def test_each_spec_has_its_own_fields(official: Path) -> None:
    """A relative bias next to a learnable embedding; what is written for all holds for both."""
    written = [
        f"a={official}/learnable-basic.pth@deit_tiny_basic",
        f"b={official}/2D_RPE-LN.pth@deit_tiny_basic,position=none,bias=relative2d,bias_join=lape",
    ]
    a, b = resolve_checkpoints(written, REFERENCE_SIZES, downloads=official)
    assert (a.config.model.position, a.config.model.bias, a.config.model.depth) == ("learnable", "none", 3)
    assert b.description == "deit_tiny at 32 px; position none; bias relative2d, join lape"
    with pytest.raises(ValueError, match="a model has no field 'colour'; it has variant, "):
        resolve_checkpoints([f"{written[1]},colour=3"], {}, downloads=official)


def test_robustness_needs_validation_images(official: Path) -> None:
    with pytest.raises(ValueError, match=r"learnable-basic: --robustness needs validation images"):
        build_position_report(
            [f"{official}/learnable-basic.pth"], official / "out", overrides=REFERENCE_SIZES, robustness=True
        )


def test_a_wrong_spec_is_one_line(tmp_path: Path) -> None:
    done = run_here("jobs/position_report.py", "nowhere.pth", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("error: "), "Traceback" in done.stderr) == (2, 1, False)


def test_a_token_must_be_on_the_grid() -> None:
    with pytest.raises(ValueError, match=r"token 4,0 is not on a's grid of 4 rows.*0,0 to 3,3"):
        view(network(), label="a").patch((4, 0))
    with pytest.raises(ValueError, match="--token 'x' must be a row and a column"):
        parse_token("x")


def test_nothing_to_report_is_said(official: Path) -> None:
    with pytest.raises(ValueError, match="there is no position to report"):
        one = PositionView(label="n", description="", grid=(4, 4), num_prefix=1, correlation_LNN=None,
                           bias_LHPP=None, rotation_LPP=None)  # fmt: skip
        from lape_ray.report.position_page import write_position_report

        write_position_report([one], official / "out")


def test_labels_are_unique_and_indices_are_spread(official: Path) -> None:
    path = f"{official}/learnable-basic.pth"
    found = resolve_checkpoints([path, path, f"other={path}"], REFERENCE_SIZES, downloads=official)
    assert [one.label for one in found] == ["learnable-basic (1)", "learnable-basic (2)", "other"]
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 64).tolist() == [0, 1, 2]


@pytest.mark.skipif(
    shutil.which("chromium-headless-shell") is None and shutil.which("chromium") is None,
    reason="needs chromium or chromium-headless-shell",
)
def test_a_browser_opens_the_page_without_errors_or_requests(official: Path) -> None:
    page, _ = build_position_report(
        [f"{official}/learnable-LaPE.pth@deit_tiny_lape"], official / "out", images=official / "images",
        overrides=REFERENCE_SIZES,
    )  # fmt: skip
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    log = official / "net.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    flags.append("--host-resolver-rules=MAP * ~NOTFOUND")  # no network
    command = [
        str(browser),
        *flags,
        f"--log-net-log={log}",
        f"--user-data-dir={official}/profile",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "<h1>Position embeddings</h1>" in done.stdout
    assert "CONSOLE" not in done.stderr
    started = [event["params"] for event in json.loads(log.read_text())["events"] if "params" in event]
    # Chromium asks for updates by itself; what a page asks for has the page as its origin.
    asked = {one["url"] for one in started if one.get("initiator", "not an origin") != "not an origin"}
    assert all(url.startswith("file:") for url in asked), asked
