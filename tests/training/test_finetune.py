"""Fine-tuning: the learning rate of each layer, and a head that is trained alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.config import ModelConfig, OptimConfig, replace_fields
from lape_ray.model import Network, build_model
from lape_ray.model.convert import HEADS
from lape_ray.recipes import recipe
from lape_ray.training.head_only import HeadOnly
from lape_ray.training.optim import build_optimizer, set_lr
from lape_ray.training.preflight import check_other_weights

SMALL: dict[str, Any] = {"image_size": 32, "embed_dim": 32, "num_heads": 2, "num_classes": 7, "join": "lape"}
MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny": {"depth": 3, "patch_size": 8, "bias": "relative2d", "bias_join": "lape", "rotary": "mixed"},
    "deit_tiny_distilled": {"depth": 3, "patch_size": 8},
    "cct_7_3x1": {"depth": 3},
    "t2t_vit_7": {"depth": 3},
    "ceit_tiny": {"depth": 3},
    "swin_tiny": {"depths": (2, 1, 3, 1), "patch_size": 2, "window_size": 4, "bias": "relative2d"},
}
SWIN_FIRST = {0: 1, 1: 3, 2: 4, 3: 7}
"""Number of the first block of each stage, from 1."""


def small(variant: str) -> Network:
    torch.manual_seed(0)
    return build_model(ModelConfig(variant=variant, **{**SMALL, **MODELS[variant]}))  # type: ignore[arg-type]


def exponent(variant: str, name: str) -> int:
    """Return how often the learning rate is decayed for a parameter: written down, not looked up in stages."""
    depth = 7 if variant == "swin_tiny" else 3
    if name.startswith(("head", "pool.")):
        return 0
    if name.startswith(("norm.", "lca.")):
        return 1
    if variant == "swin_tiny":
        if match := re.match(r"layers\.(\d)\.(?:blocks|join\.norms)\.(\d)\.", name):
            return depth + 1 - (SWIN_FIRST[int(match[1])] + int(match[2]))
        if match := re.match(r"layers\.(\d)\.downsample", name):
            return depth + 1 - SWIN_FIRST[int(match[1]) + 1]
        if match := re.match(r"layers\.(\d)\.bias\.table", name):
            return depth + 1 - SWIN_FIRST[int(match[1])]
    elif match := re.match(r"(?:blocks|join\.norms|bias\.norms)\.(\d)\.", name):
        return depth + 1 - (int(match[1]) + 1)
    assert re.match(r"patch_embed\.|cls_token|dist_token|pos_embed|bias\.table|rotary\.", name), name
    return depth + 1


@pytest.mark.parametrize("in_tensor", [False, True])
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
@pytest.mark.parametrize("variant", MODELS)
def test_each_layer_has_its_learning_rate(variant: str, algorithm: str, in_tensor: bool) -> None:
    network = small(variant)
    config = OptimConfig(algorithm=algorithm, layer_decay=0.65, weight_decay=0.05)  # type: ignore[arg-type]
    exempt = network.position_parameters()
    optimizer = build_optimizer(
        network, config, exempt=exempt, layer_of=network.layer_of, lr=torch.zeros(()) if in_tensor else None
    )
    set_lr(optimizer, 2e-3)
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = {
        names[parameter]: (float(group["lr"]), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert all(isinstance(group["lr"], Tensor) == in_tensor for group in optimizer.param_groups)
    for name, parameter in network.named_parameters():
        lr, decay = found[name]
        assert lr == pytest.approx(2e-3 * 0.65 ** exponent(variant, name), rel=1e-6), name
        assert decay == (0.0 if parameter.ndim == 1 or name in exempt else 0.05), name


def test_without_decay_the_groups_are_what_they_were() -> None:
    """So that optimizers of older checkpoints still fit."""
    network = small("deit_tiny")
    for algorithm, groups in (("adamw", 2), ("muon", 4)):
        config = OptimConfig(algorithm=algorithm)  # type: ignore[arg-type]
        optimizer = build_optimizer(network, config, exempt=set(), layer_of=network.layer_of)
        assert len(optimizer.param_groups) == groups
        assert [bool(group["weight_decay"]) for group in optimizer.param_groups] == [True] * (groups - 1) + [
            False
        ]
        assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}


def timms(variant: str) -> nn.Module:
    """Build timm's network of the same sizes."""
    if variant == "swin_tiny":
        from timm.models.swin_transformer import SwinTransformer

        swin: nn.Module = SwinTransformer(
            img_size=32, patch_size=2, embed_dim=32, depths=(2, 1, 3, 1), num_heads=(2, 4, 8, 16),
            window_size=4, num_classes=7,
        )  # fmt: skip
        return swin
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    cls = VisionTransformerDistilled if "distilled" in variant else VisionTransformer
    vit: nn.Module = cls(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7)
    return vit


@pytest.mark.parametrize("variant", ["deit_tiny", "deit_tiny_distilled", "swin_tiny"])
def test_timms_groups_have_the_same_learning_rates(variant: str) -> None:
    """All parameters that timm has too, by name; its Swin merges at the beginning of a stage, ours at the end."""
    optim = pytest.importorskip("timm.optim")
    peer, network = timms(variant), small(variant)
    groups = optim.param_groups_layer_decay(peer, layer_decay=0.65)
    names = {parameter: name for name, parameter in peer.named_parameters()}
    wanted = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    own = build_optimizer(network, OptimConfig(layer_decay=0.65), exempt=set(), layer_of=network.layer_of)
    ours = {parameter: name for name, parameter in network.named_parameters()}
    compared = 0
    for group in own.param_groups:
        for parameter in group["params"]:
            name = ours[parameter].replace("head.", "head.fc.") if variant == "swin_tiny" else ours[parameter]
            name = re.sub(r"layers\.(\d)\.down", lambda match: f"layers.{int(match[1]) + 1}.down", name)
            if name in wanted:
                assert group["lr_scale"] == pytest.approx(wanted[name]), name
                compared += 1
    assert compared > 30
    left = [name for name in wanted if "relative_position" not in name]
    assert compared == len(left)


@pytest.mark.parametrize("value", [0.0, 1.1])
def test_a_decay_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"layer_decay=.* must be above 0, and 1 at most"):
        OptimConfig(layer_decay=value)


@pytest.mark.parametrize("variant", MODELS)
def test_the_head_alone_learns_as_a_classifier_of_features_does(variant: str) -> None:
    """The output is that of evaluation's features, whatever the network drops, and nothing else has a gradient."""
    torch.manual_seed(0)
    fields = {**SMALL, **MODELS[variant], "drop_path": 0.5, "attention_dropout": 0.5}
    network = build_model(ModelConfig(variant=variant, **fields))  # type: ignore[arg-type]
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        features = network.eval().features(images)
    two = features.ndim == 3
    parts = [network.head, network.head_dist] if two else [network.head]
    logits = [part(features[:, index] if two else features) for index, part in enumerate(parts)]
    wanted = torch.stack(logits, dim=1) if two else logits[0]

    model = HeadOnly(network).train()
    found = model(images)
    assert torch.equal(found, wanted)
    F.cross_entropy(found.flatten(0, -2), labels.repeat_interleave(len(parts))).backward()
    have = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert have == {name for name in HEADS if name in dict(network.named_parameters())}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.eval()
    assert torch.equal(model(images), torch.stack(logits).mean(0))


def test_a_head_that_is_trained_alone_is_compiled_as_one_graph() -> None:
    model, images = HeadOnly(small("deit_tiny")).train(), torch.randn(2, 3, 32, 32)
    found = torch.compile(model, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(found, model(images))
    found.sum().backward()
    assert model.network.head.weight.grad is not None  # type: ignore[union-attr]


def test_a_head_of_a_fresh_network_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"optim\.train=head .* give its checkpoint with --training\.init_from"
    ):
        check_other_weights(replace_fields(recipe("smoke"), {"optim.train": "head"}))
