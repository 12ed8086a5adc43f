"""The example is what it says: this package's network in one file, without this package, and it learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lape_ray.config import ModelConfig
from lape_ray.model import build_model
from lape_ray.model.convert import load_weights

FILE = Path(__file__).parent.parent / "examples" / "lape_in_one_file.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lape_in_one_file", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its weights under timm's names; the official code's `pe_norm` is known to `load_weights`."""
    renames = {"patch_embed.": "patch_embed.proj.", ".mlp.0.": ".mlp.fc1.", ".mlp.2.": ".mlp.fc2."}
    renamed = {}
    for name, value in state.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        renamed[name] = value
    weight_D1HW = renamed["patch_embed.proj.weight"]
    renamed["patch_embed.proj.weight"] = (
        weight_D1HW.expand(-1, 3, -1, -1) / 3
    )  # ours reads three equal channels
    return renamed


def test_it_computes_what_the_package_does(example: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = example.LapeVit().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10}
    ours = build_model(ModelConfig(variant="deit_tiny", join="lape", **sizes)).eval()  # type: ignore[arg-type]
    assert load_weights(ours, our_names(theirs.state_dict())) == []
    images_B1HW = torch.randn(5, 1, 8, 8)
    theirs_BK, ours_BK = theirs(images_B1HW), ours(images_B1HW.expand(-1, 3, -1, -1))
    assert theirs_BK.std() > 0.1
    torch.testing.assert_close(theirs_BK, ours_BK, atol=1e-5, rtol=0)
    for network, logits_BK in ((theirs, theirs_BK), (ours, ours_BK)):
        logits_BK.square().mean().backward()
        assert network.pos_embed.grad.norm() > 0
    torch.testing.assert_close(theirs.pos_embed.grad, ours.pos_embed.grad, atol=1e-5, rtol=1e-4)


def test_it_learns(example: ModuleType) -> None:
    torch.manual_seed(0)
    assert example.train(example.LapeVit(dim=32, depth=2), epochs=6) > 0.85


def test_it_stands_alone() -> None:
    text = FILE.read_text()
    assert "lape_ray" not in text
    assert len(text.splitlines()) <= 100
