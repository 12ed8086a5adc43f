"""`jobs/benchmark.py checkpoint`: how long training waits for a checkpoint, its size, and how long a restore takes."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lape_ray import checkpoint
from lape_ray.bench.record import begin, finish, spread
from lape_ray.bench.step import Note, Row, Save, prepared
from lape_ray.bench.synthetic import Stepper, synthetic_state, training_config
from lape_ray.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; `models` None: the sizes that suit the device."""

    device: str = "cpu"
    models: tuple[str, ...] | None = None
    folder: str | None = None
    threads: int = 1
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in ("threads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ValueError(
                f"folder={self.folder} is no folder; make it, or leave it out for a temporary one"
            )

    def filled(self) -> Settings:
        gpu = self.device.startswith("cuda")
        return dataclasses.replace(
            self, models=self.models or (("deit_tiny", "deit_small", "deit_base") if gpu else ("deit_tiny",))
        )

    def quick(self) -> Settings:
        """The same in seconds, for tests: its times mean nothing."""
        return dataclasses.replace(self, models=("toy",), rounds=1)


def run(settings: Settings, note: Note, save: Save = lambda record: None) -> Row:
    """The record of a whole run.

    Raises:
        RuntimeError: what came back is not what was saved.
    """
    settings = settings.filled()
    device = prepared(settings.device, settings.threads)
    record = begin("checkpoint", dataclasses.asdict(settings), device=settings.device)
    rows = record["sections"]["checkpoint"] = []
    for model in settings.models or ():
        note(model)
        rows.append(saving(model, device, settings))
        finish(record)
        save(record)
    return record


def saving(model: str, device: torch.device, settings: Settings) -> Row:
    """Sizes in bytes and times in seconds of `model` after a step, when the optimizer has its state.

    Returns:
        copy_s: what training waits for, the copy to host memory; save_s: until it is on the disk, the copy included;
        restore_s: into a state that is there
    """
    # Two images: weights and moments are what is saved, whatever the batch.
    config = training_config(model, join="lape", batch_size=2)
    state, other = synthetic_state(config, device), synthetic_state(config, device)
    Stepper(state).run(1)
    meta = checkpoint.Meta(epochs_done=1, steps_done=1, config=config, metrics={}, world_size=1)
    copied, saved, restored = [], [], []
    size = 0
    for number in range(settings.rounds + 1):  # the first is not counted
        with tempfile.TemporaryDirectory(prefix="lape_ray-benchmark-", dir=settings.folder) as name:
            folder = Path(name)
            _wait(device)
            wall = time.perf_counter()
            copy = checkpoint.snapshot(**_parts(state))
            copy_s = time.perf_counter() - wall
            checkpoint.save(folder, copy, meta)
            save_s = time.perf_counter() - wall
            restore_s = _seconds(partial(checkpoint.restore, folder, config, **_parts(other)), device)
            size = sum(file.stat().st_size for file in folder.iterdir())
        if number:
            copied.append(copy_s)
            saved.append(save_s)
            restored.append(restore_s)
    _check_same(state, other, model)
    return {
        "model": model,
        "bytes": size,
        "copy_s": spread(copied),
        "save_s": spread(saved),
        "restore_s": spread(restored),
    }


def _parts(state: TrainState) -> dict[str, Any]:
    return {
        "model": state.network,
        "ema": state.ema.model if state.ema else None,
        "optimizer": state.optimizer,
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    wall = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - wall


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    yield from state.network.state_dict().items()
    if state.ema is not None:
        yield from ((f"average of {name}", value) for name, value in state.ema.model.state_dict().items())
    for number, parameter in enumerate(state.network.parameters()):
        for name, value in state.optimizer.state[parameter].items():
            yield f"{name} of parameter {number}", value


def _check_same(state: TrainState, other: TrainState, model: str) -> None:
    for (name, value), (_, back) in zip(_tensors(state), _tensors(other), strict=True):
        if not torch.equal(value, back):
            raise RuntimeError(f"{model}: {name} came back from the checkpoint with other values")
