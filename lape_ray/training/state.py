"""The state of a training on one worker, and how a fresh one is built. Knows torch.distributed; knows no Ray.

Shapes: B images of one worker's micro-batch, H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lape_ray.config import TrainConfig
from lape_ray.data.augment import build_augment
from lape_ray.data.batch import Batches, TrainBatches
from lape_ray.data.loader import Loader, build_loader
from lape_ray.data.mixup import Mixer
from lape_ray.data.processes import usable_cpus
from lape_ray.data.ready import Augmented, Normalized
from lape_ray.model import VisionTransformer, build_model, resolve
from lape_ray.training.cuda_graph import CudaRecorder, StepGraph
from lape_ray.training.flags import Signals
from lape_ray.training.loss import load_teacher
from lape_ray.training.optim import Ema, build_optimizer
from lape_ray.training.parallelize import compiled, data_parallel, missing_compiler
from lape_ray.training.recompute import optimise_blocks


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
        """Compute the mean of a scalar over all workers. Synchronises with the device."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is up on any worker. Synchronises with the device."""
        return self.mean(torch.tensor(float(flag), device=self.device)) > 0

    def answers_within(self, seconds: float) -> None:
        """Make a worker that hangs an error of all others after `seconds`, from now on."""
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
    """The network as the training step calls it: compiled, and data parallel where the run has several workers."""
    ema: Ema | None
    optimizer: torch.optim.Optimizer
    train_loader: Augmented
    val_loader: Normalized
    mixer: Mixer
    teacher: nn.Module | None
    autocast: Callable[[], AbstractContextManager[None]]
    graph: StepGraph | None = None
    """Runs the whole step, where `run.cuda_graph` asks for it."""
    classes: tuple[str, ...] | None = None
    """Name of each label, where the loaders are those of the config's data."""
    notes: tuple[str, ...] = ()
    """Notes for people on how this state was built."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def micro_batches(self) -> range:
        """The micro-batches of a step that this worker computes: every worker has one, some may have one more."""
        return range(self.world.rank, self.config.micro_batches, self.world.size)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader) // len(self.micro_batches)


def build_state(
    config: TrainConfig, device: torch.device, *, loaders: tuple[TrainBatches, Batches] | None = None
) -> TrainState:
    """Build the state of a fresh run on this worker; `loaders` stand in for those of the config's data.

    They are those of training and validation, and yield uint8 images.

    Raises:
        ValueError: the config asks for what the device does not have.
    """
    world = World.current(device)
    graph = config.run.cuda_graph
    if graph and device.type != "cuda":
        raise ValueError(
            f"run.cuda_graph needs a GPU, and this run is on {device}; set --run.cuda_graph false"
        )
    spec = resolve(config.model)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are those of the current one
    torch.manual_seed(config.run.seed)
    network = optimise_blocks(build_model(config.model)).to(device)
    model, note = compiled(network, config.run, device)
    if world.size > 1:
        equal = world.size == config.micro_batches
        model = data_parallel(model, config.run, device, one_micro_batch=equal)
    notes = [note] if note else []
    fused = config.data.fused and device.type == "cuda"
    if fused and (missing := missing_compiler(device)):
        fused = False
        notes.append(f"augmentation is not fused, and slower for it: {missing} is missing")
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

    augment = build_augment(config.data, image_size=spec.image_size, seed=config.run.seed, fused=fused)
    classes = None
    if loaders is None:
        train_loader = loader("train", config.micro_batch_size)
        classes = train_loader.info.classes
        loaders = train_loader, loader("val", config.data.eval_batch_size)
    return TrainState(
        config=config,
        world=world,
        signals=Signals(config.run.timeout_s),
        network=network,
        model=model,
        ema=Ema(network, config.optim.ema_decay) if config.optim.ema_decay else None,
        optimizer=build_optimizer(
            network,
            config.optim,
            exempt=network.position_parameters(),
            lr=torch.zeros((), device=device) if graph else None,
        ),
        train_loader=Augmented(loaders[0], augment),
        val_loader=Normalized(loaders[1], config.data, device),
        mixer=Mixer(config.data, num_classes=spec.num_classes, label_smoothing=config.optim.label_smoothing),
        teacher=teacher,
        autocast=autocast_for(config, device),
        graph=StepGraph(CudaRecorder()) if graph else None,
        classes=classes,
        notes=tuple(notes),
    )


def autocast_for(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Make the context in which the network runs: bfloat16 where the config, or a GPU by default, says so."""
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and device.type == "cuda")
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)


def available_cpus() -> int:
    """Return the CPUs this process may use: Ray's or torchrun's thread limit, else what `usable_cpus` finds."""
    return int(os.environ.get("OMP_NUM_THREADS") or usable_cpus())
