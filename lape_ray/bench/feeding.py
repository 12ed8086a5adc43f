"""The device's side of the input pipeline: what augmentation takes there, and whether the loader keeps training fed.

Everything runs on a CPU too; on a GPU only how time is taken differs (`_device_seconds`, `_wait`).

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lape_ray.acceleration import missing_compiler
from lape_ray.bench.inputs import Stored
from lape_ray.bench.record import ratio, spread
from lape_ray.config import DataConfig, TrainConfig, replace_fields
from lape_ray.data.augment import Augment, AugmentSpec, build_augment
from lape_ray.data.loader import build_loader
from lape_ray.recipes import recipe
from lape_ray.state import TrainState, build_state
from lape_ray.step import augmented, optimizer_step

MODELS = ("deit_tiny", "deit_small", "deit_base")
JOIN = "lape"
LEVEL, MAY_DIFFER = 0.02, 0.01  # more than one of 256, normalised; share of all pixels
CALLS = 20  # of the augmentation, for one round
LEAD_STEPS = 4  # not timed: the loader's queue is full before them and has been used up after them
CLOCK_HZ = 2e9  # about a GPU's; for how long to keep it waiting


def augmentation(stored: Stored, *, side: int, batch_size: int, device: str, rounds: int) -> dict[str, Any]:
    """Time of an image in the augmentation of DeiT's recipe, in microseconds, as spreads.

    Returns:
        fused: whether the GPU ran kernels of our own; the figures of PyTorch's operators are `operators_us` then
        device_us: on the device alone (on a CPU: by the clock)
        host_us: CPU time of the host, which draws the parameters and queues the kernels
    """
    data, seed = recipe(f"deit_tiny_{JOIN}").data, 0
    where = torch.device(device)
    fused = where.type == "cuda" and missing_compiler(where) is None
    spec = AugmentSpec(
        rand_augment=data.rand_augment, erase_prob=data.erase_prob, interpolation=data.interpolation
    )
    augments = {
        kernels: build_augment(spec, image_size=side, mean=data.mean, std=data.std, seed=seed, fused=kernels)
        for kernels in ((True, False) if fused else (False,))
    }
    loader = build_loader(
        DataConfig(train=stored.beton), "train", image_size=side, batch_size=batch_size, device=where
    )
    with contextlib.closing(loader.epoch(0)) as batches:
        images_BCHW = next(batches)[0].clone()

    if fused:
        _refuse_other_images(augments, images_BCHW)

    def run(augment: Augment, call: int) -> None:
        augment(images_BCHW, epoch=0, positions=np.arange(call * batch_size, (call + 1) * batch_size))

    device_us: dict[bool, list[float]] = {kernels: [] for kernels in augments}
    host_us: dict[bool, list[float]] = {kernels: [] for kernels in augments}
    for number in range(-1, rounds):  # the first warms up
        for kernels, augment in augments.items():
            on_device, on_host = _device_seconds(partial(run, augment), CALLS, where)
            if number >= 0:
                device_us[kernels].append(1e6 * on_device / (CALLS * batch_size))
                host_us[kernels].append(1e6 * on_host / (CALLS * batch_size))
    return {
        "name": "augmentation",
        "batch_size": batch_size,
        "fused": fused,
        "device_us": spread(device_us[fused]),
        "host_us": spread(host_us[fused]),
        **({"operators_us": spread(device_us[False])} if fused else {}),
    }


def _refuse_other_images(augments: Mapping[bool, Augment], images_BCHW: Tensor) -> None:
    """A RuntimeError where kernels of our own (True) give other images than PyTorch's operators (False).

    They may differ in rotations, by a few levels, and in what comes after one in the same image.
    """
    fused_BCHW, plain_BCHW = (
        augments[kernels](images_BCHW, epoch=0, positions=np.arange(len(images_BCHW)))
        for kernels in (True, False)
    )
    share = ((fused_BCHW - plain_BCHW).abs() > LEVEL).float().mean().item()
    if not share <= MAY_DIFFER:
        raise RuntimeError(
            f"{share:.1%} of the pixels of the fused augmentation are not those of the operators"
        )


def _device_seconds(run: Callable[[int], None], calls: int, device: torch.device) -> tuple[float, float]:
    """Seconds that `calls` calls take on the device, and of CPU time on the host."""
    if device.type != "cuda":
        clock, cpu = time.perf_counter(), time.process_time()
        for call in range(calls):
            run(call)
        return time.perf_counter() - clock, time.process_time() - cpu
    cpu = time.process_time()
    clock = time.perf_counter()
    for call in range(calls):
        run(call)
    queueing = time.perf_counter() - clock
    cpu = time.process_time() - cpu
    torch.cuda.synchronize(device)
    # The GPU waits until everything is queued, so that it never waits for the host between the two events.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(1.5 * queueing * CLOCK_HZ))
    start.record()
    for call in range(calls):
        run(call)
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3, cpu


def training_config(model: str, stored: Stored, *, side: int, batch_size: int, threads: int) -> TrainConfig:
    """DeiT's whole recipe of `model` with LaPE on one device, without its repeats, which only change the order."""
    return replace_fields(
        recipe(f"{model}_{JOIN}"),
        {
            "data.train": stored.beton,
            "data.val": stored.beton,
            "data.batch_size": batch_size,
            "data.threads": threads,
            "model.image_size": side,
        },
    )


def fed_training(
    config: TrainConfig, *, device: str, rounds: int, round_s: float, note: Callable[[str], None]
) -> dict[str, Any]:
    """Training steps fed by the loader beside the same steps on one batch that stays on the device.

    Both run the whole step: augmentation, mixing, forward, backward, optimizer and moving average.

    Args:
        round_s: about how long each kind of step runs in a round, in seconds.

    Returns:
        fed, synthetic, again: images/s as spreads; `again` is `synthetic` once more, for what ratios are uncertain by
        fed_over_synthetic, again_over_synthetic: ratios as spreads
    """
    where = torch.device(device)
    state = build_state(config, where)
    state.model.train()
    with contextlib.closing(_endless(state)) as batches:
        images_BCHW, labels_B = (tensor.clone() for tensor in next(batches))

        def same() -> Generator[tuple[Tensor, Tensor], None, None]:
            while True:
                yield images_BCHW, labels_B

        counter = iter(range(2**31))
        sources: Mapping[str, Generator[tuple[Tensor, Tensor], None, None]] = {
            "fed": batches,
            "synthetic": same(),
            "again": same(),
        }
        _seconds(state, sources["fed"], LEAD_STEPS, counter)  # kernels are chosen and memory is taken
        step_s = _seconds(state, sources["synthetic"], LEAD_STEPS, counter) / LEAD_STEPS
        steps = max(2, round(round_s / step_s))
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for number in range(1, rounds + 1):
            note(f"{config.recipe}: round {number} of {rounds}, {steps} steps each")
            for name, source in sources.items():
                _seconds(state, source, LEAD_STEPS, counter)
                seconds = _seconds(state, source, steps, counter)
                rates[name].append(steps * len(images_BCHW) / seconds)
    row: dict[str, Any] = {name: spread(values) for name, values in rates.items()}
    return {
        "name": config.recipe,
        "batch_size": len(images_BCHW),
        "steps": steps,
        "precision": _precision(state),
        **row,
        "fed_over_synthetic": ratio(row["fed"], row["synthetic"]),
        "again_over_synthetic": ratio(row["again"], row["synthetic"]),
    }


def _precision(state: TrainState) -> str:
    with state.autocast():
        return "bf16" if torch.is_autocast_enabled(state.world.device.type) else "fp32"


def _endless(state: TrainState) -> Generator[tuple[Tensor, Tensor], None, None]:
    epoch = 0
    while True:
        with contextlib.closing(state.train_loader.epoch(epoch)) as batches:
            yield from batches
        epoch += 1


def _seconds(
    state: TrainState, batches: Generator[tuple[Tensor, Tensor], None, None], steps: int, counter: Any
) -> float:
    """Seconds that `steps` optimizer steps take, by the clock."""
    ready = augmented(state, batches, epoch=0)
    _wait(state.world.device)
    clock = time.perf_counter()
    for _ in range(steps):
        optimizer_step(state, ready, epoch=0, step=next(counter), lr=state.config.optim.lr)
    _wait(state.world.device)
    return time.perf_counter() - clock


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
