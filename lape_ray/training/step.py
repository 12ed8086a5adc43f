"""One optimizer step over this worker's micro-batches, from the loader's batches to new weights.

All that is drawn depends on the seed and the step's place in the epoch, and so on no number of workers.

Shapes: B images of one worker's micro-batch, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lape_ray.data.batch import Batch
from lape_ray.training.loss import training_loss
from lape_ray.training.optim import set_lr
from lape_ray.training.state import TrainState


def seed_draws(*key: int) -> None:
    """Seed torch's generators from a key, so that dropout depends on nothing else."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def optimizer_step(
    state: TrainState, batches: Iterator[Batch], *, epoch: int, step: int, lr: float
) -> Tensor:
    """Make one optimizer step over this worker's micro-batches, which come ready for the network.

    Returns:
        Their loss, a scalar on the device, which may be overwritten by the next step.
    """
    if state.graph is not None or state.copies.forward_changes:
        state.copies.fence()
    set_lr(state.optimizer, lr)
    if state.graph is not None:
        (micro,) = state.micro_batches
        return state.graph(
            partial(_whole_step, state), *_drawn(state, next(batches), key=(epoch, step, micro))
        )
    state.optimizer.zero_grad(set_to_none=True)
    state.statistics.begin()
    loss = torch.zeros((), device=state.world.device)
    for micro in state.micro_batches:
        mixed = _drawn(state, next(batches), key=(epoch, step, micro))
        with _gradients_stay_local(state.model, micro != state.micro_batches[-1]):
            loss += _gradients(state, *mixed)
    _update(state)
    return loss


def _drawn(state: TrainState, batch: Batch, *, key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Mix a micro-batch with its targets (B, K), and seed torch's generators for its way through the network.

    Args:
        key: epoch, step and micro-batch, which with the seed decide all that is drawn.
    """
    epoch, step, micro = key
    seed = state.config.training.seed
    place = step * state.config.micro_batches + micro
    mixed = state.mixer(batch.images, batch.labels, generator_key=(seed, epoch, place))
    seed_draws(seed, *key)
    return mixed


def _gradients(state: TrainState, images_BCHW: Tensor, targets_BK: Tensor) -> Tensor:
    """Accumulate the gradient of this micro-batch's share of the step's loss; returns that share."""
    with state.autocast():
        teacher = None if state.teacher is None else state.teacher(images_BCHW)
        logits = state.model(images_BCHW)
    # The workers' gradients are averaged, whatever the number of micro-batches that each of them adds up.
    share = state.world.size / state.config.micro_batches
    loss = training_loss(logits, targets_BK, teacher, state.config.optim.loss) * share
    loss.backward()
    state.statistics.end_micro_batch()
    return loss.detach()


def _update(state: TrainState) -> None:
    """Update the weights from the gradients, the statistics from the micro-batches, and the moving average of both.

    A checkpoint's copies of them may still be on their way until here.
    """
    state.copies.fence()
    clip_norm = state.config.optim.clip_norm
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(state.network.parameters(), clip_norm)
    state.optimizer.step()
    state.statistics.end()
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
