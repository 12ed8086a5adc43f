"""LaPE's joins against their formulas, written out: LN_w whole, and taken apart as in the paper's table 8."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import threads
from helpers.families import JOINS_OF
from helpers.networks import POSITIONS, THIN_CELLS, check_cell, count, paired, perturbed
from torch import Tensor

from lape_ray.config import ModelConfig, OptimConfig
from lape_ray.model import Network, build_model
from lape_ray.model.convert import load_weights
from lape_ray.model.position import (
    BIASES,
    JOINS,
    PREFIX_JOINS,
    ROTARIES,
    STAGED_JOINS,
    LayerPosition,
    valid_bias_joins,
    valid_joins,
)
from lape_ray.model.swin import Swin
from lape_ray.training.optim import parameter_groups
from lape_ray.training.recompute import optimise_blocks

DEIT: dict[str, Any] = {
    "variant": "deit_tiny", "image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2,
    "num_classes": 5,
}  # fmt: skip
TOKENIZED = {**DEIT, "image_size": 32, "patch_size": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "deit": DEIT,
    "distilled": {**DEIT, "variant": "deit_tiny_distilled"},
    "vit_lite": {**DEIT, "variant": "vit_lite_6_4"},
    "cvt": {**DEIT, "variant": "cvt_7_4"},
    "cct": {**TOKENIZED, "image_size": 8, "variant": "cct_7_3x1"},
    "t2t": {**TOKENIZED, "variant": "t2t_vit_7"},
    "ceit": {**TOKENIZED, "variant": "ceit_tiny"},
    "swin": {
        **DEIT, "variant": "swin_tiny", "depth": None, "patch_size": 2, "window_size": 2, "embed_dim": 8,
        "depths": (1, 1, 2, 1),
    },
}  # fmt: skip
CROSSED = {"deit", "t2t", "ceit", "swin"}  # whose own tests train every other cell, rotations too
PARTIAL = [name for name, join in JOINS.items() if join.partial]
UNREAD: dict[str, str | tuple[str, ...]] = {
    "ceit": "blocks.1.mlp.",  # of patches alone, and the class token is read
    "distilled": ("bias.norms.1.", "bias.table.mlps.1.", "bias.layers.1.table"),  # likewise
    "vit_lite": ("bias.norms.1.", "bias.table.mlps.1.", "bias.layers.1.table"),
    "cvt": "pool.score.bias",  # a softmax is the same with another one
    "cct": "pool.score.bias",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks are so small that threads would wait for each other most of the time."""
    with threads.one_thread():
        yield


def normal(w: Tensor, eps: float) -> Tensor:
    mean, variance = w.mean(-1, keepdim=True), w.var(-1, keepdim=True, correction=0)
    return (w - mean) / (variance + eps).sqrt()


# w_l of w_{l-1}, the layer's parameters and eps.
FORMULAS: dict[str, Callable[[Tensor, Mapping[str, Tensor], float], Tensor]] = {
    "lape_identity": lambda w, own, eps: w,
    "lape_scalar": lambda w, own, eps: own["weight"] * w,
    "lape_gamma": lambda w, own, eps: own["weight"] * w,
    "lape_affine": lambda w, own, eps: own["weight"] * w + own["bias"],
    "lape_norm": lambda w, own, eps: normal(w, eps),
    "lape_scalar_norm": lambda w, own, eps: own["weight"] * normal(w, eps),
    "lape_gamma_norm": lambda w, own, eps: own["weight"] * normal(w, eps),
    "lape": lambda w, own, eps: own["weight"] * normal(w, eps) + own["bias"],
}


def network(join: str, **fields: Any) -> Network:
    return perturbed(ModelConfig(**{**DEIT, "depth": 3, "join": join, **fields}))


def test_the_rows_of_table_8_are_all_here() -> None:
    assert {*PARTIAL, "lape"} == set(FORMULAS)
    assert set(PARTIAL) < set(STAGED_JOINS)


@pytest.mark.parametrize("join", FORMULAS)
def test_a_join_is_its_formula(join: str) -> None:
    """Values, and the gradients of the table and of every parameter, in float64."""
    found = network(join).double()
    w, norms = found.pos_embed, list(found.join.norms)
    assert w is not None
    shapes = [{name: tuple(p.shape) for name, p in norm.named_parameters()} for norm in norms]
    weight = {} if join in ("lape_identity", "lape_norm") else {"weight": (1,) if "scalar" in join else (16,)}
    assert shapes == [{**weight, **({"bias": (16,)} if join in ("lape_affine", "lape") else {})}] * 3
    layers = list(found.layer_positions())
    wanted, given = [], w
    for norm, layer in zip(norms, layers, strict=True):
        given = FORMULAS[join](given, dict(norm.named_parameters()), 1e-6)
        wanted.append(given)
        assert layer.residual_1ND is None and layer.attention_1ND is not None
        torch.testing.assert_close(layer.attention_1ND, given)
    parameters = [w, *found.join.parameters()]
    pulls = torch.randn(len(wanted), *w.shape, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(
            sum((w_l * pull).sum() for w_l, pull in zip(all_layers, pulls, strict=True)), parameters
        )
        for all_layers in ([layer.attention_1ND for layer in layers], wanted)
    ]
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("join", FORMULAS)
def test_w_crosses_swins_stages_through_their_merging(join: str) -> None:
    found = perturbed(ModelConfig(**FAMILIES["swin"], join=join))  # type: ignore[arg-type]
    assert isinstance(found, Swin)
    layers, w = found.layer_positions(), found.pos_embed
    for stage in found.layers:
        for norm in stage.join.norms:
            w = FORMULAS[join](w, dict(norm.named_parameters()), 1e-5)  # type: ignore[arg-type]
            torch.testing.assert_close(next(layers).attention_1ND, w)
        w = w if stage.downsample is None else stage.downsample(w)
    assert next(layers, None) is None


@pytest.mark.parametrize("variant", ["deit", "vit_lite", "swin"])
def test_joins_that_begin_alike_become_different(variant: str) -> None:
    """Gains begin at 1 and shifts at 0, so that fresh networks compute what those without them do."""
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 16, 16, generator=draws, dtype=torch.float64)

    def logits(join: str, steps: int) -> Tensor:
        torch.manual_seed(0)
        made = build_model(ModelConfig(**{**FAMILIES[variant], "join": join})).eval().double()
        optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(made(images), torch.arange(2)).backward()
            optimizer.step()
        return made(images).detach()

    plain = ["lape_identity", "lape_scalar", "lape_gamma", "lape_affine"]
    normed = ["lape_norm", "lape_scalar_norm", "lape_gamma_norm", "lape"]
    for alike in (plain, normed):
        first = logits(alike[0], 0)
        for other in alike[1:]:
            torch.testing.assert_close(logits(other, 0), first, atol=1e-13, rtol=1e-13)
        trained = [logits(join, 2) for join in alike]
        for one, other in itertools.combinations(trained, 2):
            assert (one - other).abs().max() > 1e-12
    assert (logits("lape_norm", 0) - logits("lape_identity", 0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("join", "deit", "swin"),
    [
        ("lape_identity", 0, 0),
        ("lape_scalar", 12, 12),
        ("lape_gamma", 2_304, 4_416),
        ("lape_affine", 4_608, 8_832),
        ("lape_norm", 0, 0),
        ("lape_scalar_norm", 12, 12),
        ("lape_gamma_norm", 2_304, 4_416),
        ("lape", 4_608, 8_832),
    ],
)
def test_parameter_counts(join: str, deit: int, swin: int) -> None:
    with torch.device("meta"):
        for variant, basic, more in (("deit_tiny", 5_717_416, deit), ("swin_tiny", 28_566_088, swin)):
            assert count(build_model(ModelConfig(variant=variant, join=join))) == basic + more  # type: ignore[arg-type]


@pytest.mark.parametrize("join", FORMULAS)
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_no_part_of_a_join_is_decayed(join: str, algorithm: str) -> None:
    found = network(join)
    for exempt in (found.position_parameters(), set()):
        groups = parameter_groups(found, OptimConfig(algorithm=algorithm), exempt=exempt)  # type: ignore[arg-type]
        kept = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        assert {id(p) for p in found.join.parameters()} <= kept


@pytest.mark.parametrize("join", FORMULAS)
def test_weights_load_by_the_official_names_and_at_another_resolution(join: str) -> None:
    trained = network(join)
    official = {
        name.replace("join.norms.", "blocks.").replace(*_pe_norm(name)): value
        for name, value in trained.state_dict().items()
    }
    same, large = network(join), network(join, image_size=32)
    for parameter in same.parameters():
        torch.nn.init.normal_(parameter)
    assert load_weights(same, {"model": official}) == []
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(same.eval()(images), trained.eval()(images))
    torch.testing.assert_close(optimise_blocks(same)(images), trained(images), atol=1e-5, rtol=1e-5)
    assert [note.split()[0] for note in load_weights(large, official)] == ["pos_embed"]


def _pe_norm(name: str) -> tuple[str, str]:
    place = name.rpartition(".")[2]
    return (f".{place}", f".pe_norm.{place}") if name.startswith("join.") else ("", "")


@pytest.mark.parametrize("join", [name for name in FORMULAS if JOINS[name].normalised])  # type: ignore[attr-defined]
def test_a_zero_row_keeps_gradients_finite_at_full_depth(join: str) -> None:
    """The class token's row of sincos2d; without the guard lape_scalar_norm's gradients are no numbers."""
    fields = {**DEIT, "depth": 24, "position": "sincos2d", "join": join}
    torch.manual_seed(0)
    found = build_model(ModelConfig(**fields))
    F.cross_entropy(found(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    for name, parameter in found.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() < 1e4, name


# --- MPVG -----------------------------------------------------------------------------------------------------

GAP_CELLS = paired(
    {"position": position, "join": "mpvg", "bias": bias, "bias_join": bias_join, "rotary": rotary}
    for position in POSITIONS
    if "mpvg" in valid_joins(position)
    for bias in BIASES
    for bias_join in valid_bias_joins(bias)
    for rotary in ROTARIES
)


def test_mpvg_is_its_formula() -> None:
    """x_0 = x + w; LaPE's chain in all layers but the first; the mean of LN(x_L) + LN_L(w), of the table itself."""
    found = perturbed(ModelConfig(**{**DEIT, "depth": 4}, join="mpvg", pool="gap")).eval()
    images = torch.randn(2, 3, 16, 16)
    w, norms = found.pos_embed, [norm.weight for norm in found.join.norms]
    assert w is not None and w.shape == (1, 16, 16) and len(norms) == 4 and found.cls_token is None
    x, given = found.patch_embed(images) + w, w
    for index, block in enumerate(found.blocks):
        h = block.norm1(x)
        if index:
            norm = found.join.norms[index - 1]
            given = F.layer_norm(given, (16,), norm.weight, norm.bias, 1e-6)
            h = h + given
        x = x + block.attn(h, LayerPosition())
        x = x + block.mlp(block.norm2(x))
    last = found.join.norms[-1]
    read = (found.norm(x) + F.layer_norm(w, (16,), last.weight, last.bias, 1e-6)).mean(dim=1)
    torch.testing.assert_close(found.features(images), read, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(optimise_blocks(found)(images), found.head(read), atol=1e-5, rtol=1e-5)


def test_mpvg_has_the_sizes_that_its_paper_prints() -> None:
    sizes = {"deit_tiny": 5_721, "deit_small": 22_059, "deit_base": 86_584}  # thousands, cut
    with torch.device("meta"):
        for variant, thousands in sizes.items():
            config = ModelConfig(variant=variant, join="mpvg", pool="gap")  # type: ignore[arg-type]
            assert count(build_model(config)) // 1000 == thousands
        assert (
            count(build_model(ModelConfig(variant="vit_lite_7_4", num_classes=100, join="mpvg", pool="gap")))
            == 3_743_076
        )


@pytest.mark.parametrize("cell", GAP_CELLS, ids=lambda cell: "-".join(cell.values()))
def test_mpvg_trains_with_every_bias_and_rotation(cell: dict[str, str]) -> None:
    fields: dict[str, Any] = {**DEIT, **cell, "num_heads": 1, "pool": "gap"}
    for name, parameter in check_cell(ModelConfig(**fields)).named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), f"{name} is not trained"


@pytest.mark.parametrize("family", ["deit", "ceit", "swin"])
def test_mpvg_is_refused_where_a_class_token_is_read(family: str) -> None:
    with pytest.raises(
        ValueError, match=r"reads the mean of the patches \(model.pool=gap\): join=mpvg is not valid"
    ):
        build_model(ModelConfig(**FAMILIES[family], join="mpvg"))


@pytest.mark.parametrize(
    ("family", "why"),
    [("swin", "reads the mean anyway"), ("ceit", "reads class tokens"), ("distilled", "two heads")],
)
def test_gap_is_refused_where_it_does_not_apply(family: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"pool=gap does not apply to {FAMILIES[family]['variant']}.*{why}"):
        build_model(ModelConfig(**FAMILIES[family], pool="gap"))


@pytest.mark.parametrize("family", ["deit", "vit_lite", "cvt", "cct", "t2t"])
def test_gap_reads_the_mean_of_patches(family: str) -> None:
    found = build_model(ModelConfig(**FAMILIES[family], pool="gap")).eval()
    side = FAMILIES[family]["image_size"]
    seen: list[Tensor] = []
    found.norm.register_forward_hook(lambda norm, given, tokens: seen.append(tokens))
    read = found.features(torch.randn(2, 3, side, side))
    rows, columns = found.grid
    assert seen[0].shape == (2, rows * columns, 16)
    torch.testing.assert_close(read, seen[0].mean(dim=1))


# --- every family ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_join_and_every_bias(family: str) -> None:
    """Without rotation: two steps of training, and a gradient for whatever reaches the output."""
    thin = [cell for cell in THIN_CELLS if isinstance(cell, dict)]
    plain = [{**cell, "rotary": "none"} for cell in thin if family not in CROSSED]
    partial = [
        {"position": position, "join": join, "bias": bias}
        for position in ("learnable", "sincos1d", "sincos2d")
        for join in PARTIAL
        for bias in (("none",) if family in CROSSED else ("none", "relative2d", "alibi2d"))
    ]
    for cell in [*plain, *partial]:
        trained = check_cell(ModelConfig(**FAMILIES[family], **cell))
        for name, parameter in trained.named_parameters():
            if not name.startswith(UNREAD.get(family, "-")):
                assert parameter.grad is not None and parameter.grad.any(), f"{cell}: {name} is not trained"


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_without_a_meaning_list_the_valid_ones(family: str) -> None:
    joins = JOINS_OF.get(family, PREFIX_JOINS)
    for position, join in itertools.product(("none", "learnable", "sincos1d", "sincos2d"), JOINS):
        valid = valid_joins(position, joins)
        config = ModelConfig(**FAMILIES[family], position=position, join=join)  # type: ignore[arg-type]
        if join in valid:
            with torch.device("meta"):
                build_model(config)
            continue
        with pytest.raises(ValueError, match=f"valid joins of {position} are {', '.join(valid)}$"):
            build_model(config)
    with pytest.raises(ValueError, match=r"valid bias joins of none are basic$"):
        build_model(ModelConfig(**FAMILIES[family], bias_join="lape"))
