"""Small networks of every family, and what each of them is held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from lape_ray.config import ModelConfig
from lape_ray.model import Network, build_model
from lape_ray.model.convert import convert_state_dict, load_weights
from lape_ray.model.position import ABSOLUTES, BIASES, ROTARIES, valid_bias_joins, valid_joins
from lape_ray.training.recompute import optimise_blocks

GOLDEN = Path(__file__).parent.parent / "golden" / "network_logits.json"
CELLS = [
    {"position": position, "join": join, "bias": bias, "bias_join": bias_join, "rotary": rotary}
    for position in ABSOLUTES
    for join in valid_joins(position)
    for bias in BIASES
    for bias_join in valid_bias_joins(bias)
    for rotary in ROTARIES
]


def cell_id(cell: dict[str, str]) -> str:
    return "-".join(cell.values())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def perturbed(config: ModelConfig) -> Network:
    """Build a network none of whose norms, biases, tables and statistics is at its neutral start."""
    torch.manual_seed(0)
    network = build_model(config)
    with torch.no_grad():
        for name, value in sorted(network.state_dict().items()):
            if name.endswith("running_var"):
                value.add_(torch.rand_like(value))
            elif value.is_floating_point() and not name.endswith(".w"):
                value.add_(torch.randn_like(value) * 0.1)
    return network


def check_official(path: Path, fields: dict[str, Any], *, optimised: bool) -> None:
    """Compare logits, loss and every gradient with those of the official code, with its weights."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    assert metadata["mode"] == "eval"
    network = build_model(ModelConfig(**fields))
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    assert load_weights(network, {"model": state}) == []
    if optimised:
        optimise_blocks(network)
    logits = network.eval()(tensors["input"])
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-5, rtol=0)
    loss = F.cross_entropy(logits, tensors["target"])
    torch.testing.assert_close(loss, tensors["loss"], atol=1e-5, rtol=0)
    loss.backward()
    expected = convert_state_dict(
        {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    )
    found = {name: p.grad for name, p in network.named_parameters()}
    assert set(found) == set(expected)
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in found.items():
        assert gradient is not None
        # A gradient that is zero but for rounding is measured by the whole one.
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-4 * total)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def check_golden(name: str, config: ModelConfig) -> None:
    """Compare logits with those that this code gave when it equalled the official code's to 1e-5.

    UPDATE_GOLDEN=1 writes them again.
    """
    import os

    size = config.image_size
    assert size is not None
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = perturbed(config).eval()(images)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        golden[name] = logits.tolist()
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    torch.testing.assert_close(logits, torch.tensor(golden[name]), atol=1e-4, rtol=1e-4)


def check_cell(config: ModelConfig) -> None:
    """Train two steps: every loss, gradient and moment is finite, and the state dict makes the same network."""
    torch.manual_seed(0)
    network, size = build_model(config), config.image_size
    assert size is not None
    images, labels = torch.randn(4, 3, size, size), torch.arange(4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(2):
        loss = F.cross_entropy(network(images), labels)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.isfinite().all(), f"{name} gets a non-finite gradient"
            # or DDP copies it into its bucket, and warns of that
            assert parameter.grad.stride() == parameter.stride(), f"{name}'s gradient has another layout"
        optimizer.step()
    for state in optimizer.state.values():
        assert all(value.isfinite().all() for value in state.values() if isinstance(value, Tensor))
    torch.manual_seed(7)
    copy = build_model(config)
    load_weights(copy, network.state_dict())
    torch.testing.assert_close(copy.eval()(images), network.eval()(images))
