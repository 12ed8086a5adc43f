"""Small networks of every family, and what each of them is held to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from lape_ray.config import ModelConfig
from lape_ray.model import Network, build_model
from lape_ray.model.convert import convert_state_dict, load_weights
from lape_ray.model.position import (
    ABSOLUTES,
    BIASES,
    CONDITIONALS,
    CONTENT_BIASES,
    JOINS,
    ROTARIES,
    valid_bias_joins,
    valid_joins,
)
from lape_ray.training.loss import training_loss
from lape_ray.training.recompute import optimise_blocks

REFERENCE = Path(__file__).parent.parent / "data" / "reference"
GRADIENT_VALUES = 256  # of a parameter whose gradient has more, every k-th value, k odd
GOLDEN = Path(__file__).parent.parent / "golden" / "network_logits.json"
WHOLE_JOINS = {name: join for name, join in JOINS.items() if not (join.partial or join.pooled)}
POSITIONS = (*ABSOLUTES, *CONDITIONALS)
BIAS_NAMES = (*BIASES, *CONTENT_BIASES)
CELLS = [
    {"position": position, "join": join, "bias": bias, "bias_join": bias_join, "rotary": rotary}
    for position in POSITIONS
    for join in valid_joins(position, WHOLE_JOINS)
    for bias in BIAS_NAMES
    for bias_join in valid_bias_joins(bias)
    for rotary in ROTARIES
]


def _places(cell: dict[str, str]) -> tuple[int, int]:
    """Return the places of a cell's embedding with its join, and of its bias with its join, in lists of all of them."""
    joins = [(position, join) for position in POSITIONS for join in valid_joins(position)]
    biases = [(bias, join) for bias in BIAS_NAMES for join in valid_bias_joins(bias)]
    join = joins.index((cell.get("position", "learnable"), cell["join"]))
    return join, biases.index((cell["bias"], cell["bias_join"]))


def paired(cells: Iterable[dict[str, str]]) -> list[Any]:
    """Mark cells as slow, but for enough that every embedding with its join meets every bias and every rotation.

    So does every bias every rotation; all threes are slow.
    """
    return _slow_but(cells, lambda cell: list(ROTARIES)[sum(_places(cell)) % len(ROTARIES)] == cell["rotary"])


def thin(cells: Iterable[dict[str, str]]) -> list[Any]:
    """Mark cells as slow, but for one with each embedding and its join; these have every bias and every rotation."""
    count = sum(len(valid_bias_joins(bias)) for bias in BIAS_NAMES)

    def is_of_the_few(cell: dict[str, str]) -> bool:
        join, bias = _places(cell)
        return join % count == bias and list(ROTARIES)[join % len(ROTARIES)] == cell["rotary"]

    return _slow_but(cells, is_of_the_few)


def _slow_but(cells: Iterable[dict[str, str]], keep: Callable[[dict[str, str]], bool]) -> list[Any]:
    return [cell if keep(cell) else pytest.param(cell, marks=pytest.mark.slow) for cell in cells]


def cell_id(cell: dict[str, str]) -> str:
    return "-".join(cell.values())


PAIRED_CELLS = paired(CELLS)
THIN_CELLS = thin(CELLS)

FAMILIES: dict[str, dict[str, object]] = {
    "t2t_vit_7": {"model__variant": "t2t_vit_7", "model__patch_size": None},
    "ceit_tiny": {"model__variant": "ceit_tiny", "model__patch_size": None},
    "swin_tiny": {
        "model__variant": "swin_tiny", "model__patch_size": 2, "model__window_size": 4, "model__depth": None,
        "model__depths": (2, 1, 1, 1), "model__bias": "relative2d",
    },
    "deit3_small": {
        "model__variant": "deit3_small", "model__layer_scale": 0.1, "optim__algorithm": "lamb", "optim__loss": "bce",
        "optim__label_smoothing": 0.0,
    },
}  # fmt: skip
"""Changes of the recipe `smoke` that make its network one of another family."""


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


def read_reference(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `tests/data/reference`: tensors by name, and the sizes of its network.

    Gradients come at full size, with NaN where the file has no value.
    """
    with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    assert metadata["mode"] == "eval"
    if "input_seed" in metadata:
        generator = torch.Generator().manual_seed(int(metadata["input_seed"]))
        tensors["input"] = torch.randn(json.loads(metadata["input_shape"]), generator=generator)
    for key in [key for key in tensors if key.startswith("grad.")]:
        whole = torch.full_like(tensors[f"state.{key.removeprefix('grad.')}"], math.nan)
        whole.view(-1)[:: -(-whole.numel() // GRADIENT_VALUES) | 1] = tensors[key]
        tensors[key] = whole
    return tensors, json.loads(metadata["config"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def check_official(name: str, fields: dict[str, Any], *, optimised: bool = False) -> None:
    """Compare logits, loss and every gradient with those of the official code, with its weights."""
    tensors, _ = read_reference(name)
    network = build_model(ModelConfig(**fields))
    assert load_weights(network, {"model": part(tensors, "state.")}) == []
    if optimised:
        optimise_blocks(network)
    logits = network.eval()(tensors["input"])
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-5, rtol=0)
    loss = F.cross_entropy(logits, tensors["target"])
    torch.testing.assert_close(loss, tensors["loss"], atol=1e-5, rtol=0)
    loss.backward()
    expected = convert_state_dict(part(tensors, "grad."))
    found = {key: p.grad for key, p in network.named_parameters()}
    assert set(found) == set(expected)
    total = tensors["grad_norm"]
    norms = [gradient.norm() for gradient in found.values() if gradient is not None]
    torch.testing.assert_close(torch.stack(norms).norm(), total, atol=0, rtol=1e-5)
    for key, gradient in found.items():
        assert gradient is not None
        known = ~expected[key].isnan()
        assert known.sum() >= min(gradient.numel(), GRADIENT_VALUES // 2), key
        # Root mean squares; a gradient that is zero but for rounding is measured by the whole one.
        error = (gradient - expected[key])[known].square().mean().sqrt()
        size = expected[key][known].square().mean().sqrt()
        least = 1e-4 * total / math.sqrt(gradient.numel())
        assert error < 1e-4 * torch.maximum(size, least), f"{key}: error {error:.1e} of {size:.1e}"


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


def check_cell(config: ModelConfig) -> Network:
    """Train two steps: every loss, gradient and moment is finite, and the state dict makes the same network.

    Returns the network with its last gradients.
    """
    torch.manual_seed(0)
    network, size = build_model(config), config.image_size
    assert size is not None
    images, targets = torch.randn(4, 3, size, size), torch.eye(4, network.head.out_features)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(2):
        loss = training_loss(network(images), targets)
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
    return network
