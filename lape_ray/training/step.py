"""One optimizer step over this worker's micro-batches, from the loader's images to new weights.

All that is drawn depends on the seed and the step's place in the epoch, and so on no number of workers.

Shapes: B images of one worker's micro-batch, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lape_ray.training.loss import training_loss
from lape_ray.training.state import TrainState

_AUGMENTED_PIXELS = 2**21
"""Together on a GPU: 16 batches of 128 images of 32 x 32, but one of 256 of 224 x 224."""


def seed_draws(*key: int) -> None:
    """Seed torch's generators from a key, so that dropout depends on nothing else."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def augmented(
    state: TrainState,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    epoch: int,
    step: int = 0,
    at_once: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's micro-batches of this worker from `step` on: uint8 (B, 3, H, W) made normalised floats.

    What is drawn for an image depends on its place alone. So `at_once` micro-batches can be augmented together: by
    default as many as a GPU needs for small images, whose kernels would else take less time than their launches.
    """
    total, size = state.config.micro_batches, state.config.micro_batch_size
    if at_once is None and state.world.device.type == "cuda":
        at_once = max(1, _AUGMENTED_PIXELS // (size * math.prod(state.augment.image_size)))
    places = ((at, micro) for at in itertools.count(step) for micro in state.micro_batches)
    while group := list(itertools.islice(batches, at_once or 1)):
        # in the epoch's order over all micro-batches; see lape_ray.data.sampler.train_places
        positions = np.concatenate(
            [
                (at * size + np.arange(size)) * total + micro
                for at, micro in itertools.islice(places, len(group))
            ]
        )
        images = group[0][0] if len(group) == 1 else torch.cat([images_BCHW for images_BCHW, _ in group])
        floats = state.augment(images, epoch=epoch, positions=positions)
        for floats_BCHW, (_, labels_B) in zip(floats.split(size), group, strict=True):
            yield floats_BCHW, labels_B


def optimizer_step(
    state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], *, epoch: int, step: int, lr: float
) -> Tensor:
    """Make one optimizer step over this worker's micro-batches, which come augmented.

    Returns:
        Their loss, a scalar on the device, which may be overwritten by the next step.
    """
    for group in state.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    if state.graph is not None:
        (micro,) = state.micro_batches
        return state.graph(
            partial(_whole_step, state), *_drawn(state, *next(batches), key=(epoch, step, micro))
        )
    state.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=state.world.device)
    for micro in state.micro_batches:
        mixed = _drawn(state, *next(batches), key=(epoch, step, micro))
        with _gradients_stay_local(state.model, micro != state.micro_batches[-1]):
            loss += _gradients(state, *mixed)
    _update(state)
    return loss


def _drawn(
    state: TrainState, images_BCHW: Tensor, labels_B: Tensor, *, key: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Mix a micro-batch with its targets (B, K), and seed torch's generators for its way through the network.

    Args:
        key: epoch, step and micro-batch, which with the seed decide all that is drawn.
    """
    epoch, step, micro = key
    seed = state.config.run.seed
    place = step * state.config.micro_batches + micro
    mixed = state.mixer(images_BCHW, labels_B, generator_key=(seed, epoch, place))
    seed_draws(seed, *key)
    return mixed


def _gradients(state: TrainState, images_BCHW: Tensor, targets_BK: Tensor) -> Tensor:
    """Accumulate the gradient of this micro-batch's share of the step's loss; returns that share."""
    with state.autocast():
        teacher = None if state.teacher is None else state.teacher(images_BCHW)
        logits = state.model(images_BCHW)
    # The workers' gradients are averaged, whatever the number of micro-batches that each of them adds up.
    share = state.world.size / state.config.micro_batches
    loss = training_loss(logits, targets_BK, teacher) * share
    loss.backward()
    return loss.detach()


def _update(state: TrainState) -> None:
    """Update the weights, and their moving average, from the gradients."""
    clip_norm = state.config.optim.clip_norm
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(state.network.parameters(), clip_norm)
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update()


def _whole_step(state: TrainState, images_BCHW: Tensor, targets_BK: Tensor) -> Tensor:
    """Make the step of a worker with one micro-batch, in which nothing depends on the host."""
    state.optimizer.zero_grad(set_to_none=True)
    loss = _gradients(state, images_BCHW, targets_BK)
    _update(state)
    return loss


def _gradients_stay_local(model: nn.Module, yes: bool) -> AbstractContextManager[None]:
    if yes and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
