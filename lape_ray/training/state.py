"""The state of a training on one worker, and how a fresh one is built. Knows torch.distributed; knows no Ray.

Shapes: B images of one worker's micro-batch, H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lape_ray.config import TrainConfig
from lape_ray.data.augment import Augment, build_augment
from lape_ray.data.batch import Batches, TrainBatches
from lape_ray.data.loader import Loader, build_loader
from lape_ray.data.mixup import Mixer
from lape_ray.data.processes import usable_cpus
from lape_ray.data.ready import Augmented, Normalized
from lape_ray.model import Network, build_model, resolve
from lape_ray.model.convert import load_weights
from lape_ray.training.cuda_graph import CudaRecorder, StepGraph
from lape_ray.training.distributed import World, forget_training
from lape_ray.training.flags import RankFlags
from lape_ray.training.head_only import HeadOnly
from lape_ray.training.host_copies import HostCopies
from lape_ray.training.loss import check_loss, load_teacher
from lape_ray.training.optim import Ema, build_optimizer
from lape_ray.training.parallelize import compiled, data_parallel, missing_compiler
from lape_ray.training.recompute import optimise_blocks
from lape_ray.training.statistics import RunningStatistics
from lape_ray.training.times import Times


@dataclass(kw_only=True)
class TrainState:
    """Everything that changes while a run goes on, and what it needs to go on."""

    config: TrainConfig
    world: World
    flags: RankFlags
    network: Network
    model: nn.Module
    """The network as the training step calls it: compiled, and data parallel where the run has several workers.

    Its modules are in training mode where they are trained."""
    ema: Ema | None
    optimizer: torch.optim.Optimizer
    train_loader: Augmented
    val_loader: Normalized
    mixer: Mixer
    teacher: nn.Module | None
    statistics: RunningStatistics
    autocast: Callable[[], AbstractContextManager[None]]
    copies: HostCopies
    """Makes the checkpoints' copies of the state."""
    graph: StepGraph | None = None
    """Runs the whole step, where `run.cuda_graph` asks for it."""
    classes: tuple[str, ...] | None = None
    """Name of each label, where the loaders are those of the config's data."""
    notes: tuple[str, ...] = ()
    """Notes for people on how this state was built."""
    times: Times = field(default_factory=Times)
    """What this process spends its time on."""

    @property
    def saved_parts(self) -> dict[str, Any]:
        """The parts that a checkpoint holds: `model`, `ema` and `optimizer`."""
        ema = None if self.ema is None else self.ema.model
        return {"model": self.network, "ema": ema, "optimizer": self.optimizer}

    @property
    def micro_batches(self) -> range:
        """The micro-batches of a step that this worker computes."""
        return own_micro_batches(self.config, self.world)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader) // len(self.micro_batches)


def build_state(
    config: TrainConfig,
    device: torch.device,
    *,
    epoch: int = 0,
    loaders: tuple[TrainBatches, Batches] | None = None,
) -> TrainState:
    """Build the state of a fresh run on this worker, for images of the size that they have in `epoch`.

    `loaders` stand in for those of the config's data: they are those of training and validation, and yield uint8
    images of that size.

    Raises:
        ValueError: the config asks for what the device does not have, or its image sizes contradict each other.
    """
    graph, spec = config.run.cuda_graph, resolve(config.model)
    if graph and device.type != "cuda":
        raise ValueError(
            f"run.cuda_graph needs a GPU, and this run is on {device}; set --run.cuda_graph false"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are those of the current one
    check_loss(config)
    image_sizes(config)
    world = World.current(device)
    sized = config.at_epoch(epoch)
    network, model, note = _build_networks(sized, world)
    fused, slower = _fused(config, device)
    classes = None
    if loaders is None:
        loaders = _build_loader(sized, "train", world), _build_loader(sized, "val", world)
        classes = loaders[0].info.classes
    return TrainState(
        config=config,
        world=world,
        flags=RankFlags(config.run.timeout_s),
        train_loader=Augmented(loaders[0], _build_augment(sized, fused)),
        val_loader=Normalized(loaders[1], config.data, device),
        mixer=Mixer(config.data, num_classes=spec.num_classes, label_smoothing=config.optim.label_smoothing),
        teacher=_build_teacher(config, device, classes),
        autocast=autocast_for(config, device),
        classes=classes,
        notes=tuple(filter(None, (note, slower))),
        **_around(network, model, sized, world),
    )


def resize_state(state: TrainState, epoch: int) -> tuple[TrainState, list[str]]:
    """Make the state of a run go on with images of the size that they have in `epoch`; returns lines for people too.

    The weights are the same, but for those whose size depends on the resolution, which are resized as those of a
    checkpoint are. The optimizer goes on, and begins anew for these.
    """
    # The copies of a checkpoint may still be on their way: from the old network's memory, and from tensors of the
    # optimizer that go on.
    state.copies.fence()
    forget_training(state.world.device)
    sized = state.config.at_epoch(epoch)
    network, model, _ = _build_networks(sized, state.world)
    notes = load_weights(network, state.network.state_dict())
    parts = _around(network, model, sized, state.world)
    if state.ema is not None:
        load_weights(parts["ema"].model, state.ema.model.state_dict())
    _continue_optimizer(parts["optimizer"], state.optimizer)
    loader, side = state.train_loader.loader, resolve(sized.model).image_size
    for one in (loader, state.val_loader.loader):
        if not isinstance(one, Loader):
            raise ValueError(f"{type(one).__name__} cannot change the size of its images")
        one.resize(side)
    augment = _build_augment(sized, state.train_loader.augment.fused)
    return replace(state, train_loader=Augmented(loader, augment), **parts), notes


def _around(network: Network, model: nn.Module, config: TrainConfig, world: World) -> dict[str, Any]:
    """Make the parts of a state that hold a network's tensors."""
    graph = config.run.cuda_graph
    return {
        "network": network,
        "model": model,
        "ema": Ema(network, config.optim.ema_decay) if config.optim.ema_decay else None,
        "optimizer": build_optimizer(
            network,
            config.optim,
            exempt=network.position_parameters(),
            layer_of=network.layer_of,
            lr=torch.zeros((), device=world.device) if graph else None,
        ),
        "statistics": RunningStatistics(
            network, world, micro_batches=config.micro_batches, own=len(own_micro_batches(config, world))
        ),
        "copies": HostCopies(world.device, network),
        "graph": StepGraph(CudaRecorder()) if graph else None,
    }


def _continue_optimizer(optimizer: torch.optim.Optimizer, before: torch.optim.Optimizer) -> None:
    """Take over what the optimizer `before` knows of each parameter that has the same shape there."""
    shapes = [
        [parameter.shape for group in one.param_groups for parameter in group["params"]]
        for one in (before, optimizer)
    ]
    state = before.state_dict()
    kept = {index: known for index, known in state["state"].items() if shapes[0][index] == shapes[1][index]}
    optimizer.load_state_dict({**state, "state": kept})


def _build_augment(config: TrainConfig, fused: bool) -> Augment:
    side = resolve(config.model).image_size
    return build_augment(config.data, image_size=side, seed=config.training.seed, fused=fused)


def own_micro_batches(config: TrainConfig, world: World) -> range:
    """Return the micro-batches of a step that a worker computes: every worker has one, some may have one more."""
    return range(world.rank, config.micro_batches, world.size)


def _build_networks(config: TrainConfig, world: World) -> tuple[Network, nn.Module, str]:
    """Build the network, and what the training step calls of it; returns also a line on its compilation."""
    torch.manual_seed(config.training.seed)
    network = optimise_blocks(build_model(config.model)).to(world.device)
    trained: nn.Module = network if config.optim.train == "all" else HeadOnly(network)
    model, note = compiled(trained, config.run.compile, world.device)
    if world.size > 1:
        equal = world.size == config.micro_batches
        model = data_parallel(model, config.training.compression, world.device, one_micro_batch=equal)
    return network, model, note


def _build_loader(config: TrainConfig, split: Literal["train", "val"], world: World) -> Loader:
    return build_loader(
        config.data,
        split,
        image_size=resolve(config.model).image_size,
        batch_size=config.micro_batch_size if split == "train" else config.data.eval_batch_size,
        micro_batches=config.micro_batches,
        rank=world.rank,
        world_size=world.size,
        seed=config.training.seed,
        device=world.device,
        threads=config.data.threads or available_cpus(),
    )


def _build_teacher(
    config: TrainConfig, device: torch.device, classes: tuple[str, ...] | None
) -> nn.Module | None:
    spec = resolve(config.model)
    if (
        config.optim.teacher is None or spec.num_prefix < 2
    ):  # without a distillation token nothing reads its answers
        return None
    teacher = load_teacher(
        config.optim.teacher,
        num_classes=spec.num_classes,
        image_sizes=image_sizes(config),
        classes=classes,
        data=config.data,
    )
    return teacher.to(device)


def image_sizes(config: TrainConfig) -> tuple[int, ...]:
    """List the sides of the images that the training reads, in pixels, in their order.

    Raises:
        ValueError: the schedule does not end with the model's size.
    """
    side = resolve(config.model).image_size
    sizes = tuple(phase.side for phase in config.data.image_sizes) or (side,)
    if sizes[-1] != side:
        raise ValueError(
            f"data.image_size_schedule={config.data.image_size_schedule} ends with {sizes[-1]} px, but the model reads "
            f"{side}: set --model.image_size {sizes[-1]}, or end with {side}"
        )
    return sizes


def _fused(config: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Tell whether augmentation runs as fused kernels, and why not where it was to."""
    if not (config.data.fused and device.type == "cuda"):
        return False, ""
    if missing := missing_compiler(device):
        return False, f"augmentation is not fused, and slower for it: {missing} is missing"
    return True, ""


def autocast_for(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Make the context in which the network runs: bfloat16 where the config, or a GPU by default, says so."""
    bf16 = config.training.precision == "bf16" or (
        config.training.precision == "auto" and device.type == "cuda"
    )
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)


def available_cpus() -> int:
    """Return the CPUs this process may use: Ray's or torchrun's thread limit, else what `usable_cpus` finds."""
    return int(os.environ.get("OMP_NUM_THREADS") or usable_cpus())
