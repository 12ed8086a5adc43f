"""Networks: sizes, the grid of position embeddings, and parity with timm and the paper's official code."""

from __future__ import annotations

import ast
import itertools
import math
import weakref
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.networks import PAIRED_CELLS, cell_id, check_official, count, read_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lape_ray
from lape_ray.config import ModelConfig, Variant
from lape_ray.model import build_model, resolve
from lape_ray.model.block import Attention, Block, rotate
from lape_ray.model.compact import ResidualNormBlock
from lape_ray.model.convert import convert_state_dict, load_weights
from lape_ray.model.position import (
    ABSOLUTES,
    BIAS_JOINS,
    BIASES,
    CONDITIONALS,
    CONTENT_BIASES,
    JOINS,
    ROTARIES,
    LayerPosition,
)
from lape_ray.model.position.content import bucket_of
from lape_ray.model.position.layout import Channels
from lape_ray.model.position.resize import resize_absolute, resize_relative
from lape_ray.model.position.rotary import spiral_frequencies
from lape_ray.model.variants import VARIANTS
from lape_ray.model.vit import VisionTransformer

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "image_size": 16, "patch_size": 4, "num_classes": 5}


def tiny(**kwargs: object) -> ModelConfig:
    return ModelConfig(**{**TINY, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variant", "parameters", "lape"),
    [
        ("deit_tiny", 5_717_416, 4_608),
        ("deit_small", 22_050_664, 9_216),
        ("deit_base", 86_567_656, 18_432),
        ("deit_tiny_distilled", 5_910_800, 4_608),
        ("deit_small_distilled", 22_436_432, 9_216),
        ("deit_base_distilled", 87_338_192, 18_432),
        ("deit3_small", 22_059_496, 9_216),
        ("deit3_medium", 38_849_512, 12_288),
        ("deit3_base", 86_585_320, 18_432),
        ("deit3_large", 304_374_760, 49_152),
        ("vit_lite_6_4", 3_190_538, 3_072),
        ("vit_lite_7_4", 3_716_874, 3_584),
        ("cvt_7_4", 3_716_619, 3_584),
        ("cct_6_3x1", 3_233_803, 3_072),
        ("cct_7_3x1", 3_760_139, 3_584),
        ("cct_7_3x2", 3_853_259, 3_584),
        ("t2t_vit_7", 4_306_126, 3_584),
        ("t2t_vit_12", 6_937_806, 6_144),
        ("t2t_vit_14", 21_541_454, 10_752),
        ("ceit_tiny", 6_356_904, 4_608),
        ("ceit_small", 24_204_840, 9_216),
    ],
)
def test_parameter_counts(variant: Variant, parameters: int, lape: int) -> None:
    with torch.device("meta"):
        assert count(build_model(ModelConfig(variant=variant))) == parameters
        assert count(build_model(ModelConfig(variant=variant, join="lape"))) == parameters + lape


def test_hundred_classes() -> None:
    counts = {
        "vit_lite_6_4": 3_213_668,
        "vit_lite_7_4": 3_740_004,
        "cvt_7_4": 3_739_749,
        "cct_7_3x1": 3_783_269,
    }
    for variant, parameters in counts.items():
        assert count(build_model(ModelConfig(variant=variant, num_classes=100))) == parameters  # type: ignore[arg-type]


def test_names_in_the_config_are_the_names_in_the_code() -> None:
    import typing

    from lape_ray import config

    pairs = [
        (config.Variant, VARIANTS),
        (config.Position, [*ABSOLUTES, *CONDITIONALS]),
        (config.Join, JOINS),
        (config.Bias, [*BIASES, *CONTENT_BIASES]),
        (config.BiasJoin, BIAS_JOINS),
        (config.Rotary, ROTARIES),
    ]
    for literal, known in pairs:
        assert typing.get_args(literal) == tuple(known)


def test_no_other_code_of_a_network_knows_an_embedding_by_name() -> None:
    names = {
        *ABSOLUTES,
        *CONDITIONALS,
        *CONTENT_BIASES,
        *JOINS,
        *BIASES,
        *ROTARIES,
        "table_LRH",
        "frequencies_L2HF",
    }
    package = Path(lape_ray.__file__).parent
    files = [*(package / "model").glob("*.py"), *(package / "training").glob("*.py")]
    files = [
        path for path in files if path.name not in ("convert.py", "architecture.py")
    ]  # which tell what others' weights and networks are called here
    assert len(files) > 7
    for path in files:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {
            node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not found & names, path.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_network_keeps_its_interface(variant: Variant) -> None:
    with torch.device("meta"):
        network = build_model(ModelConfig(variant=variant, join="lape", bias="relative2d", bias_join="lape"))
        layers = list(network.layer_positions())
    blocks = [block for stage in network.stages() for block in stage.blocks]
    assert len(layers) == len(blocks) == resolve(ModelConfig(variant=variant)).depth
    parameters = dict(network.named_parameters())
    assert {"pos_embed"} <= network.position_parameters() <= set(parameters)
    for beginning in network.resizers():
        assert any(name.startswith(beginning) for name in parameters), beginning
    assert network.pos_embed is parameters["pos_embed"]


@pytest.mark.parametrize("cell", PAIRED_CELLS, ids=cell_id)
def test_every_cell_trains(cell: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = build_model(tiny(**cell))
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(6):
        loss = F.cross_entropy(model(images), labels)
        assert loss.isfinite()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.isfinite().all(), f"{name} gets a non-finite gradient"
        optimizer.step()
    assert loss.item() < first
    for state in optimizer.state.values():
        assert all(value.isfinite().all() for value in state.values() if isinstance(value, Tensor))
    copy = build_model(tiny(**cell))
    load_weights(copy, model.state_dict())
    torch.testing.assert_close(copy.eval()(images), model.eval()(images))


@pytest.mark.parametrize("join", ["share", "unshare", "lape", "lape_shared"])
def test_no_embedding_takes_no_join(join: str) -> None:
    with pytest.raises(ValueError, match=r"nothing to join.*valid joins of none are basic"):
        build_model(tiny(position="none", join=join))


def test_a_fixed_table_is_not_unshared() -> None:
    with pytest.raises(ValueError, match="valid joins of sincos2d are basic, share, lape, lape_shared"):
        build_model(tiny(position="sincos2d", join="unshare"))


def test_no_bias_takes_no_bias_join() -> None:
    with pytest.raises(ValueError, match="valid bias joins of none are basic"):
        build_model(tiny(bias_join="lape"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 18}, "image_size=18 does not divide by patch_size=4"),
        ({"num_heads": 5}, "embed_dim=32 does not divide by num_heads=5"),
        ({"embed_dim": 30, "position": "sincos2d"}, "embed_dim=30 does not divide by 4"),
        ({"embed_dim": 36, "num_heads": 6, "rotary": "axial"}, "a head is 6 wide"),
        ({"num_heads": 4, "rotary": "spiral"}, "a head is 8 wide, but rotary=spiral needs a multiple of 16"),
        ({"variant": "cct_7_3x1", "patch_size": 4}, "patch_size=4 does not apply to cct_7_3x1"),
    ],
)
def test_sizes_that_do_not_fit(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(**{**TINY, **kwargs}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "variant", ["deit_tiny", "vit_lite_6_4", "cvt_7_4", "cct_7_3x2", "deit_tiny_distilled"]
)
@pytest.mark.parametrize("join", ["basic", "lape"])
def test_every_family_trains_every_parameter(variant: Variant, join: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(variant=variant, image_size=32, join=join, depth=2, drop_path=0.1))  # type: ignore[arg-type]
    output = model(torch.randn(2, 3, 32, 32))
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- parity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "depth"), [("tiny", 12), ("small", 3), ("base", 2)])
@pytest.mark.parametrize("distilled", [False, True])
def test_timm_weights_give_timm_logits(size: str, depth: int, distilled: bool) -> None:
    torch.manual_seed(0)
    name = f"deit_{size}{'_distilled' if distilled else ''}"
    theirs = timm.create_model(f"{name}_patch16_224", num_classes=1000, depth=depth).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too, so that none is left at 0 or 1
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = build_model(ModelConfig(variant=name, depth=depth)).eval()  # type: ignore[arg-type]
    assert load_weights(ours, theirs.state_dict()) == []
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=0)


OFFICIAL = {
    "learnable-basic": {"position": "learnable", "join": "basic"},
    "learnable-LaPE": {"position": "learnable", "join": "lape"},
    "2D_sin-LaPE": {"position": "sincos2d", "join": "lape"},
    "2D_RPE-LN": {"position": "none", "bias": "relative2d", "bias_join": "lape"},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_outputs_and_gradients(name: str) -> None:
    _, sizes = read_reference(name)
    fields = {
        field: sizes[field] for field in ("patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    }
    check_official(name, {"image_size": sizes["img_size"], **fields, **OFFICIAL[name]})


def test_fresh_sincos2d_lape_stays_finite_at_full_depth() -> None:
    """Without the guard the first norms' gradients are infinite here: 1000 to the power of 12."""
    torch.manual_seed(0)
    model = build_model(tiny(depth=12, position="sincos2d", join="lape"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        assert largest < 1e4
        optimizer.step()
    assert all(
        v.isfinite().all() for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)
    )
    model.join.zero_rows = False  # type: ignore[union-attr]
    fresh = build_model(tiny(depth=12, position="sincos2d", join="lape"))
    fresh.join.zero_rows = False  # type: ignore[union-attr]
    F.cross_entropy(fresh(images), labels).backward()
    unguarded = max(p.grad.abs().max() for p in fresh.join.parameters() if p.grad is not None)  # type: ignore[union-attr]
    assert unguarded > 1e15


def test_the_chain_is_the_papers() -> None:
    """w_l = LN_l(w_{l-1}), and attention reads LN_x(x) + w_l while the residual stream stays free of position."""
    torch.manual_seed(0)
    model = build_model(tiny(join="lape"))
    for norm in model.join.norms:  # type: ignore[union-attr]
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    layers = model.join(model.pos_embed)  # type: ignore[misc]
    w = model.pos_embed
    for norm, layer in zip(model.join.norms, layers, strict=True):  # type: ignore[union-attr]
        w = F.layer_norm(w, (32,), norm.weight, norm.bias, 1e-6)
        torch.testing.assert_close(layer.attention_1ND, w)
        assert layer.residual_1ND is None
        assert layer.attention_1ND.shape[0] == 1, "position must not grow with the batch"


def attention_by_hand(attn: Attention, h_BND: Tensor, logits_1HNN: Tensor | float) -> Tensor:
    """MSA as a textbook writes it."""
    qkv = F.linear(h_BND, attn.qkv.weight, attn.qkv.bias).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    q_BHNE, k_BHNE, v_BHNE = qkv.unbind(0)
    weights_BHNN = (q_BHNE @ k_BHNE.mT / 16**0.5 + logits_1HNN).softmax(-1)
    return attn.proj((weights_BHNN @ v_BHNE).transpose(1, 2).flatten(2))


PARTS = ("residual_1ND", "attention_1ND", "logits_1HNN")


@pytest.mark.parametrize("kind", [Block, ResidualNormBlock])
@pytest.mark.parametrize("parts", [(), *[(part,) for part in PARTS], PARTS], ids="+".join)
def test_a_block_is_its_equation(kind: type[Block], parts: tuple[str, ...]) -> None:
    """x = x + MSA(LN(x) + w); x = x + MLP(LN(x)), or with the norm on the stream: x = LN(x); x = x + MLP(x)."""
    torch.manual_seed(0)
    block = kind(embed_dim=32, num_heads=2, mlp_ratio=2, eps=1e-6)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    shapes = dict(zip(PARTS, [(1, 17, 32), (1, 17, 32), (1, 2, 17, 17)], strict=True))
    position = LayerPosition(**{part: torch.randn(shapes[part]) for part in parts})
    residual, w, logits = (0.0 if part is None else part for part in position[:3])
    given = torch.randn(4, 17, 32)

    x = given + residual
    x = x + attention_by_hand(block.attn, block.norm1(x) + w, logits)
    normed = block.norm2(x)
    if kind is ResidualNormBlock:
        x = normed
    x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))

    torch.testing.assert_close(block(given, position), x, rtol=1e-4, atol=1e-4)


def test_batch_does_not_change_the_cost_of_position() -> None:
    model = build_model(tiny(join="lape", bias="relative2d", rotary="mixed"))
    calls: list[int] = []
    for norm in model.join.norms:  # type: ignore[union-attr]
        norm.register_forward_hook(lambda _m, inputs, _o: calls.append(inputs[0].shape[0]))
    model(torch.randn(7, 3, 16, 16))
    assert calls == [1, 1, 1]


# --- properties of the embeddings -----------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", ["axial", "spiral"])
def test_rotary_logits_depend_on_the_offset_only(rotary: str) -> None:
    model = build_model(tiny(position="none", rotary=rotary))
    q, k = torch.randn(1, 1, 1, 16).expand(1, 1, 17, 16), torch.randn(1, 1, 1, 16).expand(1, 1, 17, 16)
    rotation = model.rotary()[0]  # type: ignore[misc]
    logits = (rotate(q, rotation) @ rotate(k, rotation).transpose(-1, -2))[0, 0, 1:, 1:]
    by_offset: dict[tuple[int, int], list[float]] = {}
    for a, b in itertools.product(range(16), repeat=2):
        by_offset.setdefault((a // 4 - b // 4, a % 4 - b % 4), []).append(logits[a, b].item())
    for values in by_offset.values():
        assert max(values) - min(values) < 1e-4
    assert len({round(v[0], 4) for v in by_offset.values()}) > 10
    torch.testing.assert_close(rotate(q, rotation)[0, 0, 0], q[0, 0, 0])  # the class token is not turned


def test_spiral_of_two_directions_is_axial() -> None:
    axial = build_model(tiny(rotary="axial")).rotary.frequencies()  # type: ignore[union-attr]
    spiral = spiral_frequencies(16, directions=2, base=100.0, largest=1.0)
    torch.testing.assert_close(spiral[None, :, None], axial, atol=1e-6, rtol=0)


def test_spiral_turns_by_the_projection_on_its_directions() -> None:
    model = build_model(tiny(position="none", rotary="spiral"))
    cos, sin = model.rotary()[1]  # type: ignore[misc]
    falling = 1.5 * 10_000.0 ** (
        -torch.arange(4) / 4
    )  # E = 16: of 8 pairs of channels, two for each direction
    for pair, (frequency, degrees) in enumerate(
        zip(falling.repeat(2), [0, 0, 45, 45, 90, 90, 135, 135], strict=True)
    ):
        phi = math.radians(degrees)
        for row, column in [(0, 3), (2, 1), (3, 3)]:
            angle = frequency * (column * math.cos(phi) + row * math.sin(phi))
            found = torch.stack((cos[0, 1 + 4 * row + column, pair], sin[0, 1 + 4 * row + column, pair]))
            torch.testing.assert_close(found, torch.stack((angle.cos(), angle.sin())), atol=1e-5, rtol=0)


@pytest.mark.parametrize("degrees", [0, 45, 90, 135])
def test_spiral_sees_no_shift_across_a_direction(degrees: int) -> None:
    """A pair of channels is blind to shifts perpendicular to its direction, and to no others."""
    rotation = build_model(tiny(position="none", rotary="spiral")).rotary()[0]  # type: ignore[misc]
    pair = degrees // 45 * 2
    sin = rotation[1][0, 1:, pair].unflatten(0, (4, 4))
    shifts = {0: (1, 0), 45: (1, -1), 90: (0, 1), 135: (1, 1)}  # rows, columns
    for name, (rows, columns) in shifts.items():
        start, end = sin[1, 1], sin[1 + rows, 1 + columns]
        assert torch.isclose(start, end, atol=1e-5) == (name == degrees)


def test_logit_bias_leaves_prefix_tokens_alone() -> None:
    for bias in ("relative2d", "alibi2d", "log_cpb"):
        model = build_model(tiny(variant="deit_tiny_distilled", bias=bias, bias_join="lape"))
        for norm in model.bias.norms:  # type: ignore[union-attr]
            torch.nn.init.normal_(norm.bias)
        for layer in model.bias():  # type: ignore[misc]
            assert layer.shape == (1, 2, 18, 18)
            assert layer[:, :, :2].abs().max() == 0
            assert layer[..., :2].abs().max() == 0
            assert layer[:, :, 2:, 2:].abs().min() > 0


def test_alibi_falls_with_distance() -> None:
    bias = build_model(tiny(bias="alibi2d")).bias.table(slice(1))[0]  # type: ignore[union-attr]
    assert bias[0, 0, 0] == 0
    torch.testing.assert_close(bias[0, 0, 5], -torch.tensor(2.0).sqrt() * 2.0**-4)
    torch.testing.assert_close(bias[1, 0, 3], torch.tensor(-3.0 * 2.0**-8))


def peg_network(**fields: object) -> VisionTransformer:
    torch.manual_seed(0)
    network = build_model(tiny(position="peg", image_size=32, **fields)).eval()
    assert isinstance(network, VisionTransformer)
    return network


def test_peg_enters_once_after_the_first_block() -> None:
    """x = x + PEG(x), a depthwise convolution of the patches' picture with zeros around; prefix tokens get nothing."""
    network = peg_network(variant="deit_tiny_distilled")
    assert [layer.conditional is not None for layer in network.layer_positions()] == [False, True, False]
    x = network.blocks[0](network._tokens(torch.randn(2, 3, 32, 32)), LayerPosition())
    conv = network.conditional.proj  # type: ignore[union-attr]
    picture = F.pad(x[:, 2:].transpose(1, 2).unflatten(2, (8, 8)), (1, 1, 1, 1))
    added = conv.bias[:, None, None] + sum(
        conv.weight[:, 0, row, column, None, None] * picture[:, :, row : row + 8, column : column + 8]
        for row, column in itertools.product(range(3), repeat=2)
    )
    wanted = x + F.pad(added.flatten(2).transpose(1, 2), (0, 0, 2, 0))
    entered = list(network.layer_positions())[1].enter(x)
    torch.testing.assert_close(entered, wanted, atol=1e-5, rtol=1e-5)
    after = network.blocks[1](wanted, LayerPosition())
    torch.testing.assert_close(network.blocks[1](x, list(network.layer_positions())[1]), after)


def test_peg_is_translation_equivariant_inside_and_knows_the_border() -> None:
    network = peg_network()
    x = torch.zeros(1, 65, 32)
    picture = x[0, 1:].view(8, 8, 32)  # a view: what is written here stands in x
    picture[2:4, 2:5] = torch.randn(2, 3, 32)
    moved = x.clone()
    moved[0, 1:] = picture.roll((2, 1), (0, 1)).flatten(0, 1)
    here, there = (network.conditional(each)[0, 1:].view(8, 8, 32) for each in (x, moved))  # type: ignore[misc]
    torch.testing.assert_close(there, here.roll((2, 1), (0, 1)))
    at_border = x.clone()
    at_border[0, 1:] = picture.roll((-2, 0), (0, 1)).flatten(0, 1)
    border = network.conditional(at_border)[0, 1:].view(8, 8, 32)  # type: ignore[misc]
    torch.testing.assert_close(border[0], here[2])
    same = torch.ones(1, 65, 32)
    flat = network.conditional(same)[0, 1:].view(8, 8, 32)  # type: ignore[misc]
    torch.testing.assert_close(flat[1:-1, 1:-1], flat[1, 1].expand(6, 6, 32))
    assert not torch.isclose(flat[0, 0], flat[1, 1]).any(), "zeros around the grid tell where its border is"


def test_peg_works_at_another_resolution_with_the_same_weights() -> None:
    small, large = build_model(tiny(position="peg")), build_model(tiny(position="peg", image_size=24))
    assert load_weights(large, small.state_dict()) == []
    assert {name for name in small.position_parameters() if "." in name} == {
        "conditional.proj.weight", "conditional.proj.bias"
    }  # fmt: skip


def test_what_is_made_of_tokens_takes_no_join_and_needs_two_blocks() -> None:
    with pytest.raises(
        ValueError, match=r"position=peg is made of the tokens.*valid joins of peg are basic$"
    ):
        build_model(tiny(position="peg", join="lape"))
    with pytest.raises(ValueError, match="depth=1 leaves no block"):
        build_model(tiny(position="peg", depth=1))


@pytest.mark.parametrize("prefix", [1, 2])
def test_pape_by_hand(prefix: int) -> None:
    """A logit gets sum_c [-a_c (p_c - p'_c)^2 + b_c (p_c - p'_c)] / sqrt(E), places from (1, 1), class at (0, 0)."""
    torch.manual_seed(0)
    network = build_model(tiny(variant=["deit_tiny", "deit_tiny_distilled"][prefix - 1], bias="pape"))
    layer, attn = list(network.layer_positions())[1], network.blocks[1].attn  # type: ignore[union-attr]
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    h = torch.randn(2, prefix + 16, 32)
    ab = (h @ layer.channels.weight_XD.T).unflatten(-1, (2, 2, 50))  # type: ignore[union-attr]
    a, b = F.softplus(ab[:, :, 0]), ab[:, :, 1]
    places = torch.tensor(
        [[0, 0]] * prefix + [[column, row] for row in range(1, 5) for column in range(1, 5)]
    )
    p = torch.einsum("nd,hcd->nhc", places.float(), layer.channels.direction_HC2)  # type: ignore[union-attr]
    off = p[:, None] - p[None]
    logits = (-a[:, :, None] * off**2 + b[:, :, None] * off).sum(-1).permute(0, 3, 1, 2) / 4
    torch.testing.assert_close(attn(h, layer), attention_by_hand(attn, h, logits), atol=1e-5, rtol=1e-4)
    assert (attn(h, layer) - attn(h, LayerPosition())).abs().max() > 1e-2


def test_pape_keeps_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits are made; queries and keys are 8 wider, and values for the kernel's sake."""
    network, widths = build_model(tiny(bias="pape")), []
    assert all(layer.logits_1HNN is None for layer in network.layer_positions())
    fused = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **options: object) -> Tensor:
        widths.append((q.shape[-1], k.shape[-1], v.shape[-1], attn_mask))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return fused(q, k, v, attn_mask=attn_mask, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    network(torch.randn(2, 3, 16, 16)).sum().backward()
    assert widths == [(24, 24, 24, None)] * 3


def test_pape_needs_no_resizing_and_weighs_the_same_offsets_alike() -> None:
    small, large = (build_model(tiny(position="none", bias="pape", image_size=size)) for size in (16, 32))
    assert load_weights(large, small.state_dict()) == []
    near, far = (next(iter(network.layer_positions())).channels for network in (small, large))
    made, zero = torch.randn(2, 1, 52), torch.zeros(2, 1, 1)

    def logits(channels: Channels, tokens: int) -> Tensor:
        parts = (part.expand(-1, tokens, -1) for part in (zero, zero, made))
        q, k = channels.extend(*parts)  # the same a and beta for each query
        found = (q @ k.mT)[:, 1:, 1:]
        return found - found.diagonal(dim1=1, dim2=2)[..., None]  # without what is the same for all keys

    inner = logits(far, 65).unflatten(1, (8, 8)).unflatten(3, (8, 8))[:, 3:7, 2:6, 3:7, 2:6]  # type: ignore[arg-type]
    torch.testing.assert_close(inner.flatten(3).flatten(1, 2), logits(near, 17), atol=1e-3, rtol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", CONTENT_BIASES)
def test_a_bias_of_content_takes_no_norm(bias: str) -> None:
    with pytest.raises(
        ValueError, match=rf"bias={bias} depends on the image.*valid bias joins of {bias} are basic$"
    ):
        build_model(tiny(bias=bias, bias_join="lape"))


def test_irpe_buckets_are_the_papers() -> None:
    """49 of patches; offsets up to 1 alone, those of 2 and 3 together, and all others."""
    assert bucket_of(torch.arange(-16, 17)).tolist() == [
        *[-3] * 13, -2, -2, -1, 0, 1, 2, 2, *[3] * 13
    ]  # fmt: skip


@pytest.mark.parametrize("rotary", ["none", "axial"])
def test_irpe_k_by_hand(rotary: str) -> None:
    """A logit gets q . r of the offset's bucket / sqrt(E), with q before a rotation; class tokens have the 50th."""
    torch.manual_seed(0)
    network = build_model(tiny(variant="deit_tiny_distilled", bias="irpe_k", rotary=rotary))
    layer, attn = list(network.layer_positions())[1], network.blocks[1].attn  # type: ignore[union-attr]
    for parameter in [*network.bias.parameters(), *attn.parameters()]:  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter, std=0.3)
    table = layer.contextual.table_EK  # type: ignore[union-attr]
    assert table.shape == (16, 50)
    h = torch.randn(2, 18, 32)
    q = attn.qkv(h)[..., :32].unflatten(-1, (2, 16)).transpose(1, 2)
    added = torch.empty(2, 2, 18, 18)
    for query, key in itertools.product(range(18), repeat=2):
        (y, x), (v, u) = (divmod(token - 2, 4) for token in (query, key))
        near = [max(-2, min(2, offset)) for offset in (y - v, x - u)]  # on this grid 2 and 3 are one bucket
        bucket = 49 if min(query, key) < 2 else 7 * (near[0] + 3) + near[1] + 3
        added[:, :, query, key] = q[:, :, query] @ table[:, bucket] / 4
    fixed = layer._replace(contextual=None, logits_1HNN=added)
    torch.testing.assert_close(attn(h, layer), attn(h, fixed), atol=1e-5, rtol=1e-4)
    assert (attn(h, layer) - attn(h, layer._replace(contextual=None))).abs().max() > 1e-2


def test_irpe_k_begins_as_nothing_and_fits_every_grid() -> None:
    torch.manual_seed(0)
    small, large = (build_model(tiny(position="none", bias="irpe_k", image_size=size)) for size in (16, 32))
    assert load_weights(large, small.state_dict()) == []
    plain, images = build_model(tiny(position="none")), torch.randn(2, 3, 16, 16)
    state = {name: value for name, value in small.state_dict().items() if not name.startswith("bias.")}
    plain.load_state_dict(state)
    torch.testing.assert_close(small(images), plain(images), atol=1e-5, rtol=1e-5)


FUSED = {
    **dict.fromkeys(["none", "alibi2d", "lookhere", "pape"], True),
    **dict.fromkeys(["relative2d", "log_cpb", "irpe_k"], False),  # whose logits need a gradient
}


@pytest.mark.parametrize("bias", [*BIASES, *CONTENT_BIASES])
def test_attention_stays_fused_unless_logits_are_trained(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = build_model(tiny(bias=bias, rotary="spiral")), []
    fused = F.scaled_dot_product_attention

    def watched(*args: Tensor, **options: object) -> Tensor:
        calls.append(1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return fused(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    network(torch.randn(2, 3, 16, 16)).sum().backward()
    assert len(calls) == (3 if FUSED[bias] else 0)
    with torch.inference_mode():
        network(torch.randn(2, 3, 16, 16))
    assert len(calls) == (6 if FUSED[bias] else 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"position": "peg"}, {"rotary": "spiral"}, {"join": "mpvg", "pool": "gap"},
        *({"bias": bias} for bias in (*BIASES, *CONTENT_BIASES) if bias != "none"),
    ],
    ids=lambda fields: "-".join(fields.values()),
)  # fmt: skip
def test_bfloat16_computes_what_float32_does(fields: dict[str, str]) -> None:
    """Up to the rounding of bfloat16, and every gradient is finite."""
    torch.manual_seed(0)
    network = build_model(tiny(**fields))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    images = torch.randn(4, 3, 16, 16)
    wanted = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("bias", ["relative2d", "alibi2d", "log_cpb", "lookhere"])
def test_logits_of_one_layer_exist_at_a_time(bias: str) -> None:
    """Those of all 12 layers of DeiT-B would take 10 GB at 1,024 pixels."""
    network = build_model(tiny(bias=bias, depth=4)).eval()
    seen: list[weakref.ref[Tensor]] = []
    alive = []

    def look(block: torch.nn.Module, received: tuple[Tensor, LayerPosition]) -> None:
        logits = received[1].logits_1HNN
        assert logits is not None
        seen.append(weakref.ref(logits))
        alive.append(sum(one() is not None for one in seen))

    for block in network.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(look)
    with torch.no_grad():
        network(torch.randn(1, 3, 16, 16))
    assert alive == [1] * 4


def test_lookhere_by_hand() -> None:
    """LH-90 of ViT-B's 12 heads: its quadrants, its triangles, then four heads that see all keys."""
    network = build_model(tiny(embed_dim=48, num_heads=12, bias="lookhere"))
    bias_LHPP = network.bias.table(slice(None))  # type: ignore[union-attr]
    sees = [
        lambda y, x: y <= 0 and x <= 0, lambda y, x: y <= 0 <= x, lambda y, x: x <= 0 <= y, lambda y, x: y >= 0 <= x,
        lambda y, x: y <= -abs(x), lambda y, x: y >= abs(x), lambda y, x: x <= -abs(y), lambda y, x: x >= abs(y),
        *[lambda y, x: True] * 4,
    ]  # fmt: skip
    slopes = [*[1 / 2] * 8, 1 / 4, 1 / 16, 1 / 64, 1 / 256]
    for layer, of_layer in enumerate([1.5, 1.0, 0.5]):
        for head, (seen, slope) in enumerate(zip(sees, slopes, strict=True)):
            for query, key in itertools.product(range(16), repeat=2):
                y, x = key // 4 - query // 4, key % 4 - query % 4
                wanted = -2 * of_layer * slope * math.hypot(y, x) if seen(y, x) else -math.inf
                assert bias_LHPP[layer, head, query, key].item() == pytest.approx(wanted)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_lookhere_of_fewer_heads_looks_everywhere_in_time(heads: int) -> None:
    bias = build_model(tiny(embed_dim=48, num_heads=heads, depth=8, bias="lookhere")).bias.table  # type: ignore[union-attr]
    assert bias.view_LH.shape == (8, heads)  # type: ignore[union-attr]
    assert set(bias.view_LH.flatten().tolist()) == {*range(1, 9), *([0] if heads >= 3 else [])}  # type: ignore[union-attr]
    assert bias(slice(None))[:, :, range(16), range(16)].eq(0).all(), "a query sees itself"  # type: ignore[operator]


def test_lookhere_is_the_same_inside_a_larger_grid() -> None:
    networks = (build_model(tiny(bias="lookhere", image_size=size)) for size in (16, 32))
    near, far = (network.bias.table(slice(None)) for network in networks)  # type: ignore[union-attr]
    inner = far.unflatten(2, (8, 8)).unflatten(4, (8, 8))[:, :, 2:6, 2:6, 2:6, 2:6]
    torch.testing.assert_close(inner.flatten(4).flatten(2, 3), near)


def test_lookhere_hides_patches_but_no_prefix_token() -> None:
    network = build_model(tiny(variant="deit_tiny_distilled", bias="lookhere")).eval()
    layer = next(iter(network.layer_positions()))
    weights_BHNN = network.blocks[0].attn.weights(torch.randn(2, 18, 32), layer)  # type: ignore[union-attr, operator]
    hidden_HPP = network.bias.table(slice(1))[0].isneginf()  # type: ignore[union-attr]
    assert hidden_HPP.any()
    assert torch.equal(weights_BHNN[0, :, 2:, 2:] == 0, hidden_HPP)
    assert (weights_BHNN[:, :, :2] > 0).all()
    assert (weights_BHNN[..., :2] > 0).all()


def test_a_bias_that_hides_keys_takes_no_norm_over_them() -> None:
    with pytest.raises(
        ValueError, match=r"bias=lookhere hides keys.*valid bias joins of lookhere are basic$"
    ):
        build_model(tiny(bias="lookhere", bias_join="lape"))


def test_log_cpb_by_hand() -> None:
    bias = build_model(tiny(bias="log_cpb")).bias.table  # type: ignore[union-attr]
    found_LHPP = bias(slice(None))  # type: ignore[operator]
    for query, key in [((0, 0), (3, 1)), ((3, 2), (1, 2)), ((2, 2), (2, 2))]:
        offset = [query[0] - key[0], query[1] - key[1]]
        d = torch.tensor([math.copysign(math.log(1 + abs(each)), each) for each in offset])
        for layer, (first, _, last) in enumerate(bias.mlps):  # type: ignore[arg-type, union-attr]
            by_hand = last.weight @ (first.weight @ d + first.bias).relu()
            found = found_LHPP[layer, :, 4 * query[0] + query[1], 4 * key[0] + key[1]]
            torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-5)


def test_log_cpb_extrapolates_to_a_larger_grid() -> None:
    """The same weights give the same bias at the same offset, and a smooth one beyond; a table has nothing there."""
    torch.manual_seed(0)
    small, large = build_model(tiny(bias="log_cpb")), build_model(tiny(bias="log_cpb", image_size=32))
    for first, _, last in small.bias.table.mlps:  # type: ignore[union-attr, arg-type]
        torch.nn.init.normal_(first.bias)
        torch.nn.init.normal_(last.weight, std=0.1)
    large.bias.load_state_dict(small.bias.state_dict())  # type: ignore[union-attr]
    near, far = (network.bias.table(slice(1))[0, 0] for network in (small, large))  # type: ignore[union-attr]
    inner = far.unflatten(0, (8, 8)).unflatten(2, (8, 8))[:4, :4, :4, :4].flatten(2).flatten(0, 1)
    torch.testing.assert_close(inner, near)
    row = far[0, :8]  # of offsets 0 to 7, of which the small grid has seen 3
    assert row[4:].diff().abs().max() < row[:4].diff().abs().max()


# --- checkpoints of other sizes and other models --------------------------------------------------------------


def test_resizing_keeps_prefix_rows_and_a_smooth_map() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    table = torch.cat((torch.full((1, 2, 2), 9.0), torch.stack((y, x), -1).reshape(1, 64, 2)), dim=1)
    resized = resize_absolute(table, (16, 16), 2)
    assert resized.shape == (1, 258, 2)
    torch.testing.assert_close(resized[:, :2], table[:, :2])
    middle = resized[0, 2:].reshape(16, 16, 2)[4:12, 4:12]
    assert middle[:, :, 0].diff(dim=0).min() > 0
    assert middle[:, :, 1].diff(dim=1).min() > 0
    with pytest.raises(ValueError, match="no square grid"):
        resize_absolute(torch.zeros(1, 13, 2), (4, 4), 1)
    assert resize_relative(torch.zeros(2, 49, 3), (6, 6)).shape == (2, 121, 3)


@pytest.mark.parametrize("cell", PAIRED_CELLS, ids=cell_id)
def test_any_cell_loads_at_another_resolution(cell: dict[str, str]) -> None:
    small, large = build_model(tiny(**cell)), build_model(tiny(**cell, image_size=24))
    notes = load_weights(large, small.state_dict())
    tables = {"pos_embed"} if cell["position"] == "learnable" else set()
    tables |= {"bias.table.table_LRH"} if cell["bias"] == "relative2d" else set()
    assert tables <= {note.split()[0] for note in notes}
    assert large(torch.randn(1, 3, 24, 24)).isfinite().all()


def test_another_model_is_refused_with_the_difference() -> None:
    basic = build_model(tiny()).state_dict()
    with pytest.raises(ValueError, match=r"another model: missing join\.norms\.0\.weight"):
        load_weights(build_model(tiny(join="lape")), basic)
    with pytest.raises(ValueError, match=r"head\.weight has shape \(5, 32\), not \(7, 32\)"):
        load_weights(build_model(tiny(num_classes=7)), basic)
    with pytest.raises(ValueError, match="not the fixed table"):
        load_weights(build_model(tiny(position="sincos2d")), basic)
    assert len(load_weights(build_model(tiny(num_classes=7)), basic, new_head=True)) == 2
    with pytest.raises(ValueError, match="'epoch' is a int, not a tensor"):
        convert_state_dict({"epoch": 3})


def test_official_unshared_and_sincos1d_tables_convert() -> None:
    unshared = convert_state_dict({f"pos_embed{i}": torch.full((1, 17, 8), float(i)) for i in range(12)})
    assert unshared["pos_embed"].shape == (12, 17, 8)
    assert unshared["pos_embed"][:, 0, 0].tolist() == list(range(12))
    assert convert_state_dict({"module.pos_embed": torch.zeros(17, 8)})["pos_embed"].shape == (1, 17, 8)


def test_official_sincos1d_checkpoint_loads() -> None:
    model = build_model(tiny(position="sincos1d", join="share"))
    state = dict(model.state_dict()) | {"pos_embed": model.pos_embed[0].clone()}
    assert load_weights(model, {"model": state}) == []
