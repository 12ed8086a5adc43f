"""A training step that nobody keeps, on a worker that stands by."""

from __future__ import annotations

import contextlib

import torch

from lape_ray.config import TrainConfig, replace_fields
from lape_ray.training.distributed import forget_training
from lape_ray.training.state import build_state
from lape_ray.training.step import optimizer_step


def rehearse(config: TrainConfig, device: torch.device) -> None:
    """Make an optimizer step of one micro-batch, so that a training of this process begins at once.

    What takes its time is then imported, compiled, and read from disk.
    """
    try:
        _step(config, device)
    finally:  # also of a step that did not fit
        forget_training(device)


def _step(config: TrainConfig, device: torch.device) -> None:
    alone = {"run.num_workers": 1, "optim.accumulate": 1, "data.batch_size": config.micro_batch_size}
    state = build_state(replace_fields(config, alone), device)
    with contextlib.closing(state.train_loader.epoch(0)) as batches:
        optimizer_step(state, batches, epoch=0, step=0, lr=0.0)
