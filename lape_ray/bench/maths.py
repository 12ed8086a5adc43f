"""Before anything is timed: every contender computes the same logits and gradients from the same weights.

The reference is our network in float64, where attention takes PyTorch's plain path. Stochastic depth is off (its draws
differ between eager and compiled code), and compiled networks are checked with their first two blocks, which are
compiled in seconds and hold everything that twelve do.

Shapes: B images, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lape_ray.acceleration import compiled
from lape_ray.bench.peers import LAPE, Arm
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.distill import training_loss
from lape_ray.model import resolve
from lape_ray.state import autocast_for

IMAGES = 4
SHORT = 2  # blocks of a network that is compiled for the check
# Relative distance (of the 2-norms) of logits and of the worst gradient.
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 5e-2)}

Outcome = tuple[Tensor, dict[str, Tensor]]


class WrongMathsError(ValueError):
    """A contender computes something else; nothing was timed."""


def gate(arms: list[Arm], base: TrainConfig, device: torch.device) -> list[dict[str, Any]]:
    """A row for each arm: its distance from float64, in the precision that is timed.

    Raises:
        WrongMathsError: a distance is above its tolerance.
    """
    rows = []
    references: dict[tuple[bool, bool], Outcome] = {}
    for arm in arms:
        short = arm.compile != "off"
        config = replace_fields(base, {"model.depth": SHORT}) if short else base
        config = replace_fields(config, {"model.drop_path": 0.0})
        key = (arm.kind == LAPE, short)
        if key not in references:
            source = Arm(LAPE if arm.kind == LAPE else "lape_ray basic")
            references[key] = _outcome(source.network(config).double(), source, config, device)
        try:
            network = arm.network(config).to(device)
        except ImportError as error:
            rows.append({"name": arm.name, "missing": f"not installed: {error}"})
            continue
        autocast = autocast_for(config, device)
        precision = "bf16" if device.type == "cuda" or config.run.precision == "bf16" else "fp32"
        with autocast():
            model, _ = compiled(network, arm.config(config).run, device)
            found = _outcome(network, arm, config, device, model=model)
        rows.append({"name": arm.name, "precision": precision, **_distances(arm, found, references[key])})
        _check(rows[-1], *TOLERANCE[precision])
    return rows


def _outcome(
    network: nn.Module, arm: Arm, config: TrainConfig, device: torch.device, *, model: nn.Module | None = None
) -> Outcome:
    """Logits and gradients of `network`, as `model` computes them, for images and targets that are always the same."""
    network = network.to(device).eval()
    kind = next(network.parameters()).dtype
    spec = resolve(config.model)
    draws = torch.Generator().manual_seed(1)
    side = spec.image_size
    images_BCHW = torch.randn(IMAGES, 3, side, side, generator=draws, dtype=torch.float64).to(device, kind)
    targets_BK = torch.rand(IMAGES, spec.num_classes, generator=draws, dtype=torch.float64).softmax(1)
    with _exact_convolutions():
        logits_BK = (network if model is None else model)(images_BCHW)
        if kind == torch.float64:
            loss = -(targets_BK.to(device) * logits_BK.log_softmax(1)).sum(1).mean()
        else:
            loss = training_loss(logits_BK, targets_BK.to(device).float())
        loss.backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    if missing:
        raise WrongMathsError(f"{arm.name}: {', '.join(missing)} got no gradient; nothing was timed")
    return logits_BK.detach().double(), {name: g.double() for name, g in found.items() if g is not None}


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """cuDNN's default for float32 convolutions is TF32, which only peers with a convolution would meet."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _distances(arm: Arm, found: Outcome, reference: Outcome) -> dict[str, Any]:
    gradients = {
        name: _distance(found[1][arm.parameter_name(name)], wanted) for name, wanted in reference[1].items()
    }
    worst = max(gradients, key=lambda name: gradients[name])
    return {
        "logits": _distance(found[0], reference[0]),
        "gradient": gradients[worst],
        "worst": worst,
        "parameters": len(gradients),
    }


def _distance(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted.view_as(value)).norm() / wanted.norm().clamp_min(1e-30))


def _check(row: dict[str, Any], logits: float, gradient: float) -> None:
    # Written so that a NaN fails.
    if not (row["logits"] <= logits and row["gradient"] <= gradient):
        raise WrongMathsError(
            f"{row['name']} computes something else than our network in float64: logits differ by "
            f"{row['logits']:.1e} (at most {logits:.0e}), the gradient of {row['worst']} by {row['gradient']:.1e} "
            f"(at most {gradient:.0e}), relative; nothing was timed. Compare the versions of torch and of the peer "
            "in the record with those of a machine where this passes"
        )
