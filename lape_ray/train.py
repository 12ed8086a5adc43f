"""The training loop. Knows torch.distributed; knows no Ray, no tracker and no storage.

Shapes: B images of one worker's micro-batch, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lape_ray import checkpoint
from lape_ray.acceleration import compiled, data_parallel
from lape_ray.config import TrainConfig
from lape_ray.data.augment import Augment, AugmentSpec, build_augment
from lape_ray.data.loader import Loader, build_loader
from lape_ray.data.mixup import Mixer
from lape_ray.data.parallel import usable_cpus
from lape_ray.distill import load_teacher, training_loss
from lape_ray.metrics import EvalCounts, Speed, Waited, duration
from lape_ray.model import VisionTransformer, build_model, resolve
from lape_ray.model.convert import load_weights
from lape_ray.model.normalize import Normalize
from lape_ray.optim import Ema, build_optimizer, lr_at
from lape_ray.signals import News, Signals

NOTHING_DONE = checkpoint.Progress()
_AUGMENTED_PIXELS = (
    2**21
)  # together on a GPU: 16 batches of 128 images of 32 x 32, but one of 256 of 224 x 224
Take = Callable[[Mapping[str, Any]], Callable[[Path], None]]
"""Copies the state as it is now, with notes of whoever keeps it; what is returned writes the copy into a folder."""


class EndedError(RuntimeError):
    """The training ends early, on all workers at the same step."""


class DivergedError(EndedError):
    """The loss is no finite number any more."""

    exit_code = 1


class StoppedError(EndedError):
    """The run was asked to end early, and left a checkpoint."""

    exit_code = 143  # of a process that SIGTERM ended


class Batches(Protocol):
    """What the loop asks of a loader: an epoch's batches, uint8 images (B, 3, H, W) and int64 labels (B,)."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]: ...


class Reporter(Protocol):
    """What the loop tells the world. Called on every worker, at the same points."""

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        """After a log step. `metrics` are means over all workers; those that end in `_s` are this worker's seconds."""

    def epoch(self, metrics: dict[str, float], *, step: int, take: Take) -> None:
        """After an epoch: begin to store a checkpoint, and wait for the one before if that is not stored yet."""

    def checkpoint(self, metrics: dict[str, float], *, step: int, take: Take) -> None:
        """Within an epoch, where a checkpoint is due: as after one, but nothing was evaluated, and nothing waits."""

    def stored(self) -> None:
        """Wait until the last checkpoint is stored, and make it the one to go on from; nothing where there is none."""

    def leaving(self) -> bool:
        """Whether a machine of this run is about to go, so that a checkpoint is due; asked on log steps, of all."""

    def news(self) -> News:
        """What this worker has to tell the others; asked at every step, and must not wait for anything."""

    def line(self, text: str) -> None:
        """One line of progress for people."""


@dataclass(frozen=True)
class World:
    """This worker's place among all of them."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> World:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all workers. Synchronises with the device."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any worker."""
        return self.mean(torch.tensor(float(flag), device=self.device)) > 0

    def answers_within(self, seconds: float) -> None:
        """From now on a worker that hangs is an error of all others after `seconds`."""
        if self.size > 1:
            # torch 2.11 has it under another name
            set_timeout = (
                getattr(dist.distributed_c10d, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            )
            set_timeout(timedelta(seconds=seconds), None)


@dataclass(kw_only=True)
class TrainState:
    """Everything that changes while a run goes on, and what it needs to go on."""

    config: TrainConfig
    world: World
    signals: Signals
    network: VisionTransformer
    model: nn.Module
    """The network as the training step calls it: compiled, and data parallel where there are several workers."""
    ema: Ema | None
    optimizer: torch.optim.Optimizer
    train_loader: Batches
    val_loader: Batches
    augment: Augment
    mixer: Mixer
    normalize: Normalize
    teacher: nn.Module | None
    autocast: Callable[[], AbstractContextManager[None]]
    classes: tuple[str, ...] | None = None
    """Name of each label, where the loaders are those of the config's data."""
    notes: tuple[str, ...] = ()
    """What a person should know of how this state was built."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def micro_batches(self) -> range:
        """Which of a step's micro-batches this worker computes: every worker has one, some may have one more."""
        return range(self.world.rank, self.config.micro_batches, self.world.size)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader) // len(self.micro_batches)


def seed_draws(*key: int) -> None:
    """Seed torch's generators from a key, so that dropout depends on nothing else."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def build_state(
    config: TrainConfig, device: torch.device, *, loaders: tuple[Batches, Batches] | None = None
) -> TrainState:
    """The state of a fresh run on this worker; `loaders` (train, val) stand in for those of the config's data."""
    world = World.current(device)
    spec = resolve(config.model)
    torch.manual_seed(config.run.seed)
    network = build_model(config.model).to(device)
    model, note = compiled(network, config.run, device)
    if world.size > 1:
        equal = world.size == config.micro_batches
        model = data_parallel(model, config.run, device, one_micro_batch=equal)
    teacher = None
    if config.optim.teacher is not None:
        teacher = load_teacher(config.optim.teacher, num_classes=spec.num_classes, image_size=spec.image_size)
        teacher.to(device)

    def loader(split: Literal["train", "val"], batch_size: int) -> Loader:
        return build_loader(
            config.data,
            split,
            image_size=spec.image_size,
            batch_size=batch_size,
            micro_batches=config.micro_batches,
            rank=world.rank,
            world_size=world.size,
            seed=config.run.seed,
            device=device,
            threads=config.data.threads or available_cpus(),
        )

    classes = None
    if loaders is None:
        train_loader = loader("train", config.micro_batch_size)
        classes = train_loader.facts.classes
        loaders = train_loader, loader("val", config.data.eval_batch_size)
    return TrainState(
        config=config,
        world=world,
        signals=Signals(config.run.timeout_s),
        network=network,
        model=model,
        ema=Ema(network, config.optim.ema_decay) if config.optim.ema_decay else None,
        optimizer=build_optimizer(network, config.optim, exempt=network.position_parameters()),
        train_loader=loaders[0],
        val_loader=loaders[1],
        augment=build_augment(
            AugmentSpec(
                rand_augment=config.data.rand_augment,
                three_augment=config.data.three_augment,
                color_jitter=config.data.color_jitter,
                erase_prob=config.data.erase_prob,
                interpolation=config.data.interpolation,
            ),
            image_size=spec.image_size,
            mean=config.data.mean,
            std=config.data.std,
            seed=config.run.seed,
        ),
        mixer=Mixer(config.data, num_classes=spec.num_classes, label_smoothing=config.optim.label_smoothing),
        normalize=Normalize(config.data).to(device),
        teacher=teacher,
        autocast=autocast_for(config, device),
        classes=classes,
        notes=(note,) if note else (),
    )


def autocast_for(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Makes the context in which the network runs: bfloat16 where the config, or a GPU by default, says so."""
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and device.type == "cuda")
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)


def available_cpus() -> int:
    """CPUs this process may use: Ray's or torchrun's thread limit, else what `usable_cpus` finds."""
    return int(os.environ.get("OMP_NUM_THREADS") or usable_cpus())


def augmented(
    state: TrainState,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    epoch: int,
    step: int = 0,
    at_once: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's micro-batches of this worker from `step` on: images uint8 (B, 3, H, W) made normalised floats.

    What is drawn for an image depends on its place alone. So `at_once` micro-batches can be augmented together: by
    default as many as a GPU needs for small images, whose kernels would else take less time than their launches.
    """
    total, size = state.config.micro_batches, state.config.micro_batch_size
    if at_once is None and state.world.device.type == "cuda":
        at_once = max(1, _AUGMENTED_PIXELS // (size * math.prod(state.augment.image_size)))
    places = ((at, micro) for at in itertools.count(step) for micro in state.micro_batches)
    while group := list(itertools.islice(batches, at_once or 1)):
        # in the epoch's order over all micro-batches; see lape_ray.data.order.train_places
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


def micro_step(
    state: TrainState, images_BCHW: Tensor, labels_B: Tensor, *, key: tuple[int, int, int]
) -> Tensor:
    """This micro-batch's share of the step's loss, with its gradient accumulated; `key` is (epoch, step, micro-batch).

    All that is drawn depends on the seed and the key, and so on no number of workers. Images come augmented.
    """
    epoch, step, micro = key
    total, seed = state.config.micro_batches, state.config.run.seed
    images_BCHW, targets_BK = state.mixer(
        images_BCHW, labels_B, generator_key=(seed, epoch, step * total + micro)
    )
    seed_draws(seed, *key)
    with state.autocast():
        teacher = None if state.teacher is None else state.teacher(images_BCHW)
        logits = state.model(images_BCHW)
    # The workers' gradients are averaged, whatever the number of micro-batches that each of them adds up.
    loss = training_loss(logits, targets_BK, teacher) * (state.world.size / total)
    loss.backward()
    return loss.detach()


def train_epoch(
    state: TrainState,
    epoch: int,
    reporter: Reporter,
    *,
    start: checkpoint.Progress = NOTHING_DONE,
    save: Callable[[checkpoint.Progress], None],
) -> dict[str, float]:
    """One epoch of optimizer steps, from `start` on. Synchronises with the device on log and checkpoint steps only.

    `save` is called where a checkpoint is due within the epoch. What follows does not depend on whether the run was
    interrupted there: order, crops and all draws are functions of the epoch and the step.

    Raises:
        DivergedError: the loss is no finite number; what is saved never has such a loss behind it.
        StoppedError: the run is to end, and its state was saved.
    """
    config, world, steps = state.config, state.world, state.steps_per_epoch
    state.model.train()
    sums = torch.tensor([start.loss, start.window_loss], device=world.device)
    epoch_loss, window_loss = sums.unbind()
    speed, logged = Speed(), start.logged
    lr = (
        lr_at(epoch * steps + start.step - 1, config=config.optim, steps_per_epoch=steps)
        if start.step
        else 0.0
    )
    clock = time.monotonic()
    start_batch = start.step * len(state.micro_batches)
    with contextlib.closing(state.train_loader.epoch(epoch, start=start_batch)) as loaded:
        batches = Waited(augmented(state, loaded, epoch=epoch, step=start.step))
        for step in range(start.step, steps):
            lr = lr_at(epoch * steps + step, config=config.optim, steps_per_epoch=steps)
            window_loss += optimizer_step(state, batches, epoch=epoch, step=step, lr=lr)
            if step == start.step:
                world.answers_within(config.run.timeout_s)  # the first step may take longer: it compiles
            due = config.run.checkpoint_steps is not None and (step + 1) % config.run.checkpoint_steps == 0
            news = reporter.news()
            if (step + 1) % config.run.log_steps == 0 or step + 1 == steps:
                loss = world.mean(window_loss / (step + 1 - logged))
                _refuse_divergence(loss, epoch, step)
                since = step + 1 - max(logged, start.step)
                rate = speed.read(since * config.data.batch_size)
                times = {
                    "train/step_s": config.data.batch_size / rate,
                    "train/data_wait_s": batches.read() / since,
                }
                reporter.step({"train/loss": loss, "train/lr": lr, **times}, step=epoch * steps + step + 1)
                reporter.line(_progress(state, epoch, step, loss, lr, rate, speed.mean()))
                epoch_loss += window_loss
                window_loss.zero_()
                logged = step + 1
                minutes = config.run.checkpoint_minutes
                late = minutes > 0 and time.monotonic() - clock > 60 * minutes
                news |= News.SAVE if reporter.leaving() or late else News.NONE
            heard = state.signals.exchange(news)
            if News.STORED in heard:
                reporter.stored()
            stop = News.STOP in heard
            if stop or ((due or News.SAVE in heard) and step + 1 < steps):
                # The means take the sums' place on every worker, as they do where a run goes on from here.
                done = checkpoint.Progress(
                    step=step + 1,
                    logged=logged,
                    loss=world.mean(epoch_loss),
                    window_loss=world.mean(window_loss),
                )
                _refuse_divergence(done.loss + done.window_loss, epoch, step)
                sums.copy_(torch.tensor([done.loss, done.window_loss]))
                if stop:
                    reporter.stored()
                save(done)
                clock = time.monotonic()
            if stop:
                reporter.stored()
                raise StoppedError(
                    f"stopped after epoch {epoch} and step {step + 1} of {steps}, with a checkpoint"
                )
    return {
        "train/epoch_loss": world.mean(epoch_loss / steps),
        "train/lr": lr,
        "train/images_per_s": speed.mean(),
    }


def optimizer_step(
    state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], *, epoch: int, step: int, lr: float
) -> Tensor:
    """One step over this worker's micro-batches; returns their loss, a scalar on the device."""
    config = state.config
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=state.world.device)
    for micro in state.micro_batches:
        with _gradients_stay_local(state.model, micro != state.micro_batches[-1]):
            loss += micro_step(state, *next(batches), key=(epoch, step, micro))
    if config.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(state.network.parameters(), config.optim.clip_norm)
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update()
    return loss


def _gradients_stay_local(model: nn.Module, yes: bool) -> AbstractContextManager[None]:
    if yes and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _refuse_divergence(loss: float, epoch: int, step: int) -> None:
    if loss != loss or abs(loss) == float("inf"):
        raise DivergedError(
            f"the loss is {loss} at epoch {epoch + 1}, step {step + 1}: lower optim.lr, "
            "lengthen optim.warmup_epochs or set optim.clip_norm=1, and continue under a new run.name"
        )


def _progress(
    state: TrainState, epoch: int, step: int, loss: float, lr: float, rate: float, mean: float
) -> str:
    epochs, steps = state.config.optim.total_epochs, state.steps_per_epoch
    left = (epochs * steps - epoch * steps - step - 1) * state.config.data.batch_size
    return (
        f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}  step {step + 1:>{len(str(steps))}}/{steps}"
        f"  loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} images/s  ETA {duration(left / mean)}"
    )


def evaluate(
    model: nn.Module,
    loader: Batches,
    normalize: Normalize,
    autocast: Callable[[], AbstractContextManager[None]],
    device: torch.device,
) -> dict[str, float]:
    """Exact loss, top-1 and top-5 over the whole validation set: every image counts once, on any number of workers."""
    model.eval()
    counts = EvalCounts(device)
    with torch.inference_mode(), contextlib.closing(loader.epoch(0)) as batches:
        for images_BCHW, labels_B in batches:
            with autocast():
                logits_BK = model(normalize(images_BCHW))
            counts.add(logits_BK, labels_B)
    return counts.result()


def _validate(state: TrainState) -> dict[str, float]:
    networks: dict[str, nn.Module] = {"val": state.network}
    if state.ema is not None:
        networks["val_ema"] = state.ema.model
    metrics: dict[str, float] = {}
    for name, network in networks.items():
        result = evaluate(network, state.val_loader, state.normalize, state.autocast, state.world.device)
        metrics |= {f"{name}/{key}": result[key] for key in ("loss", "acc1", "acc5")}
    return metrics


def train(
    config: TrainConfig,
    *,
    device: torch.device,
    reporter: Reporter,
    resume_from: Path | None = None,
    mlflow_run_id: str | None = None,
) -> dict[str, float]:
    """Train to the end of the schedule, or to `run.stop_after_epochs`; returns the last epoch's metrics.

    `resume_from` is a checkpoint folder of this run: training goes on after the epochs it has done, and the
    losses are those of a run that was never interrupted.

    Raises:
        DivergedError: the loss is no finite number.
        StoppedError: the reporter's news asked for the end.
    """
    state = build_state(config, device)
    for note in state.notes:
        reporter.line(note)
    done, progress = 0, NOTHING_DONE
    if resume_from is not None:
        meta = checkpoint.restore(
            resume_from,
            config,
            model=state.network,
            ema=state.ema.model if state.ema else None,
            optimizer=state.optimizer,
        )
        done, progress, state.metrics = meta.epochs_done, meta.progress, dict(meta.metrics)
        within = f" and step {progress.step} of {state.steps_per_epoch}" if progress.step else ""
        reporter.line(f"continuing after epoch {done} of {config.optim.total_epochs}{within}")
    elif config.run.init_from is not None:
        for note in load_initial_weights(state, config.run.init_from):
            reporter.line(f"init_from: {note}")
    state.world.answers_within(config.run.start_timeout_s)
    last = min(config.optim.total_epochs, config.run.stop_after_epochs or config.optim.total_epochs)
    try:
        _epochs(state, reporter, range(done, last), progress, mlflow_run_id)
    except EndedError:
        state.signals.close()  # a process that trains again would keep the group
        raise
    reporter.stored()
    state.signals.close()
    return state.metrics


def _epochs(
    state: TrainState,
    reporter: Reporter,
    epochs: range,
    progress: checkpoint.Progress,
    mlflow_run_id: str | None,
) -> None:
    """Train `epochs`, the first of them from `progress` on, evaluate and hand out checkpoints."""
    config = state.config
    for epoch in epochs:

        def save(within: checkpoint.Progress, epoch: int = epoch) -> None:
            steps = epoch * state.steps_per_epoch + within.step
            reporter.checkpoint(
                {"epoch": steps / state.steps_per_epoch},
                step=steps,
                take=partial(_take, state, epoch, within, mlflow_run_id),
            )

        trained = train_epoch(state, epoch, reporter, start=progress, save=save)
        progress = NOTHING_DONE
        state.metrics = {"epoch": epoch + 1.0, **trained}
        if (epoch + 1) % config.run.eval_epochs == 0 or epoch + 1 == epochs.stop:
            state.metrics |= _validate(state)
            reporter.line(_epoch_line(state))
        reporter.epoch(
            state.metrics,
            step=(epoch + 1) * state.steps_per_epoch,
            take=partial(_take, state, epoch + 1, NOTHING_DONE, mlflow_run_id),
        )


def _take(
    state: TrainState,
    epochs_done: int,
    progress: checkpoint.Progress,
    mlflow_run_id: str | None,
    notes: Mapping[str, Any],
) -> Callable[[Path], None]:
    copy = checkpoint.snapshot(
        model=state.network, ema=state.ema.model if state.ema else None, optimizer=state.optimizer
    )
    meta = checkpoint.Meta(
        epochs_done=epochs_done,
        steps_done=epochs_done * state.steps_per_epoch + progress.step,
        progress=progress,
        config=state.config,
        metrics=state.metrics,
        world_size=state.world.size,
        classes=state.classes,
        mlflow_run_id=mlflow_run_id,
        notes=notes,
    )
    return partial(checkpoint.save, state=copy, meta=meta)


def load_initial_weights(state: TrainState, path: str) -> list[str]:
    """Start from another run's weights; a head for other classes is left fresh."""
    weights, _ = checkpoint.read_weights(path)
    notes = load_weights(state.network, weights, new_head=True)
    if state.ema is not None:
        state.ema.model.load_state_dict(state.network.state_dict())
    return notes


def _epoch_line(state: TrainState) -> str:
    values = state.metrics
    ema = f"  ema {values['val_ema/acc1']:.2f}" if "val_ema/acc1" in values else ""
    return (
        f"epoch {values['epoch']:.0f}/{state.config.optim.total_epochs} done"
        f"  val loss {values['val/loss']:.4f}  top-1 {values['val/acc1']:.2f}{ema}  top-5 {values['val/acc5']:.2f}"
        f"  {values['train/images_per_s']:,.0f} images/s"
    )
