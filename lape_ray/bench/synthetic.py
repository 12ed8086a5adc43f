"""The loop's own training step on images that are on the device already.

What runs is `lape_ray.step.optimizer_step`: normalisation, mixing with soft targets, forward, backward, fused AdamW
and the moving average of the weights, with stochastic depth 0.1. Only the loader is replaced, and the augmentation,
which `loader` measures, is off.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from lape_ray.config import Compile, TrainConfig, replace_fields
from lape_ray.model import resolve
from lape_ray.optim import lr_at
from lape_ray.recipes import recipe
from lape_ray.state import TrainState, build_state
from lape_ray.step import augmented, optimizer_step

BATCHES = 4  # distinct ones, in rotation: the same pixels again and again would flatter caches and power
STEPS_PER_EPOCH = 1251  # of ImageNet in batches of 1024: the schedule's place is that of the first epoch
MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny": {"variant": "deit_tiny"},
    "deit_small": {"variant": "deit_small"},
    "deit_base": {"variant": "deit_base"},
    # The sizes of ViT-Lite-7/4 in DeiT's block, which peers have too; its own has a norm on the residual stream.
    "vit_lite": {"variant": "deit_tiny", "image_size": 32, "patch_size": 4, "embed_dim": 256, "depth": 7,
                 "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 10},
    "toy": {"variant": "deit_tiny", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2,
            "num_heads": 2, "num_classes": 10},
}  # fmt: skip


class Synthetic:
    """Stands in for a loader: random uint8 images, channels last in memory as a loader gives them, and labels."""

    def __init__(self, *, batch_size: int, side: int, num_classes: int, device: torch.device) -> None:
        draws = torch.Generator().manual_seed(0)
        self.pairs = []
        for _ in range(BATCHES):
            images_BHWC = torch.randint(256, (batch_size, side, side, 3), dtype=torch.uint8, generator=draws)
            labels_B = torch.randint(num_classes, (batch_size,), generator=draws)
            self.pairs.append((images_BHWC.to(device).permute(0, 3, 1, 2), labels_B.to(device)))

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        yield from itertools.islice(itertools.cycle(self.pairs), start, len(self))


def training_config(
    model: str, *, join: str, batch_size: int, compile: Compile = "off", workers: int = 1, **fields: Any
) -> TrainConfig:
    """DeiT's recipe for one of `MODELS` without augmentation; `batch_size` images of each worker."""
    if model not in MODELS:
        raise ValueError(f"model={model!r} is not known; choose one of {', '.join(MODELS)}")
    values = {f"model.{name}": value for name, value in {**MODELS[model], "join": join, **fields}.items()}
    values |= {
        "data.rand_augment": None,
        "data.erase_prob": 0.0,
        "data.repeats": 1,
        "data.batch_size": batch_size * workers,
        "run.num_workers": workers,
        "run.compile": compile,
    }
    return replace_fields(recipe("deit_tiny_lape"), values)


def synthetic_state(config: TrainConfig, device: torch.device) -> TrainState:
    """`build_state` of `config` over synthetic batches; several workers where there is a process group."""
    spec = resolve(config.model)
    batches = Synthetic(
        batch_size=config.micro_batch_size,
        side=spec.image_size,
        num_classes=spec.num_classes,
        device=device,
    )
    return build_state(config, device, loaders=(batches, batches))


class Stepper:
    """Runs optimizer steps of a state, one after the other."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.done = 0
        self._loss_sum = torch.zeros((), device=state.world.device)
        batches = itertools.chain.from_iterable(
            state.train_loader.epoch(epoch) for epoch in itertools.count()
        )
        self._batches = augmented(state, batches, epoch=0)
        state.model.train()

    def run(self, steps: int) -> None:
        """`steps` more of them; on a GPU they are queued, not waited for."""
        optim, epoch_steps = self.state.config.optim, self.state.steps_per_epoch
        for _ in range(steps):
            lr = lr_at(self.done, config=optim, steps_per_epoch=epoch_steps)
            place = self.done % epoch_steps
            self._loss_sum += optimizer_step(self.state, self._batches, epoch=0, step=place, lr=lr)
            self.done += 1

    def mean_loss(self) -> float:
        """Of all steps so far. Waits for the device."""
        return self._loss_sum.item() / max(1, self.done)
