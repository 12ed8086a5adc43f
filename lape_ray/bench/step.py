"""`jobs/benchmark.py step`: our training step against the ceilings of the device it runs on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lape_ray.bench import ceilings, counts, isolated
from lape_ray.bench.clock import Window, first_step_s, interleaved
from lape_ray.bench.goals import step_targets
from lape_ray.bench.record import begin, finish, spread
from lape_ray.bench.synthetic import Stepper, synthetic_state, training_config
from lape_ray.bench.targets import judge
from lape_ray.config import Compile, TrainConfig, replace_fields
from lape_ray.model import resolve
from lape_ray.optim import Ema
from lape_ray.state import TrainState
from lape_ray.step_graph import WARM_UP

GATE_STEPS = 20
# Of what the steps changed. Sums on a GPU may differ in their last bits, and then more with each step; a learning rate
# that stays that of the capture comes to 0.7, seeds that do to 0.6.
GATE_DISTANCE = 0.2
LAUNCH_BOUND = ("vit_lite", "deit_tiny", "toy")
Note = Callable[[str], None]
Row = dict[str, Any]
Save = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; fields that are None take what suits the device.

    Attributes:
        models: names of `synthetic.MODELS` with the batch size of each
        sweep: batch sizes that are measured of `sweep_model` beside its own, compiled
        steps: of a window; a round is two windows
        threads: of a CPU's arithmetic
        minutes: after which nothing new is begun
    """

    device: str = "cpu"
    join: str = "lape"
    models: tuple[tuple[str, int], ...] | None = None
    compile: Compile = "default"
    sweep_model: str = "deit_small"
    sweep: tuple[int, ...] | None = None
    rounds: int = 3
    steps: int | None = None
    warmup_steps: int | None = None
    threads: int = 1
    minutes: float = 60.0
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "warmup_steps", "threads", "minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        if not self.device.startswith(("cpu", "cuda")):
            raise ValueError(f"device={self.device!r} is not known; choose cpu or cuda")

    def filled(self) -> Settings:
        """The same with every field set."""
        gpu = self.device.startswith("cuda")
        real = (("deit_small", 256), ("deit_tiny", 256), ("deit_base", 256), ("vit_lite", 128))
        small = (("deit_tiny", 8), ("vit_lite", 64))
        filled = dataclasses.replace(
            self,
            models=self.models or (real if gpu else small),
            sweep=self.sweep if self.sweep is not None else ((128, 512, 1024) if gpu else ()),
            steps=self.steps or (50 if gpu else 1),
            warmup_steps=self.warmup_steps or (20 if gpu else 1),
        )
        if not self.quick:
            return filled
        return dataclasses.replace(
            filled, models=self.models or (("toy", 4),), sweep=(), rounds=1, steps=1, warmup_steps=1
        )


class Deadline:
    """Says when nothing new may be begun."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._end = time.monotonic() + 60 * minutes

    def over(self) -> str | None:
        """Why something is not begun; None while there is time."""
        return f"not run: {self.minutes:g} minutes were over" if time.monotonic() > self._end else None


def prepared(device: str, threads: int) -> torch.device:
    """The device, with a CPU's threads set; a ValueError where it is not there."""
    where = torch.device(device)
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={device} is not there: torch finds no GPU; use --device cpu")
        where = torch.device("cuda", where.index or 0)
    else:
        torch.set_num_threads(threads)
    return where


def run(settings: Settings, note: Note, save: Save = lambda record: None) -> Row:
    """The record of a whole run; `save` gets it after each row, so that nothing measured is lost."""
    settings = settings.filled()
    device = prepared(settings.device, settings.threads)
    record = begin("step", dataclasses.asdict(settings), device=settings.device)
    deadline = Deadline(settings.minutes)
    sections = record["sections"] = {"ceilings": [], "step": []}
    note("ceilings")
    sections["ceilings"] = [ceilings.measured_peaks(device, rounds=settings.rounds, quick=settings.quick)]
    for entry in entries(settings):
        note(f"{entry.model}, batch {entry.batch_size}, {entry.mode}")
        if missing := deadline.over():
            row: Row = {**entry._asdict(), "missing": missing}
        else:
            # A fresh process each: memory, graphs and allocators of one tell nothing about the next.
            checked = {}
            if entry.cuda_graph:
                checked["from_plain"] = isolated.call(replayed_from_plain, settings, entry)
            row = isolated.call(measured, settings, entry, sections["ceilings"][0]) | checked
        sections["step"].append(row)
        record["targets"] = judge(sections, step_targets(settings.device))
        finish(record)
        save(record)
    return record


class Entry(NamedTuple):
    """Which step a row is of; with `cuda_graph` it is launched as a whole."""

    model: str
    batch_size: int
    compile: Compile
    cuda_graph: bool = False

    @property
    def mode(self) -> str:
        """For people."""
        return ("eager" if self.compile == "off" else "compiled") + (", one graph" if self.cuda_graph else "")


def entries(settings: Settings) -> list[Entry]:
    """Every row: compiled, then as one CUDA graph where launches may cost more than kernels, eager, and the sweep."""
    assert settings.models is not None and settings.sweep is not None
    found = []
    if settings.compile != "off":
        found += [Entry(model, size, settings.compile) for model, size in settings.models]
        if settings.device.startswith("cuda"):
            found += [Entry(*entry[:3], cuda_graph=True) for entry in found if entry.model in LAUNCH_BOUND]
    found += [Entry(model, size, "off") for model, size in settings.models]
    if settings.sweep_model in dict(settings.models):
        own = dict(settings.models)[settings.sweep_model]
        found += [
            Entry(settings.sweep_model, size, settings.compile) for size in settings.sweep if size != own
        ]
    return found


def measured(settings: Settings, entry: Entry, peaks: Row) -> Row:
    """One row: rates, shares of the peaks, memory and counts of one network at one batch size."""
    device = prepared(settings.device, settings.threads)
    model, batch_size, compile, cuda_graph = entry
    config = _config(settings, entry)
    row: Row = {"join": settings.join, **entry._asdict()}
    try:
        state = synthetic_state(config, device)
        stepper = Stepper(state)
        first_s = first_step_s(stepper.run, device)
        assert settings.warmup_steps is not None and settings.steps is not None
        stepper.run(max(settings.warmup_steps, WARM_UP) if cuda_graph else settings.warmup_steps)
        warm = counts.graphs()
        windows = interleaved(
            {"step": stepper.run}, rounds=settings.rounds, steps=settings.steps, device=device
        )["step"]
    except torch.OutOfMemoryError as error:
        return row | {"missing": f"cannot run: {str(error).splitlines()[0]}"}
    after = counts.graphs()
    if compile != "off" and (after["graph_breaks"] or after["graphs"] != 1 or after != warm):
        raise RuntimeError(
            f"{model}: the compiler made {after['graphs']} graphs with {after['graph_breaks']} breaks, and "
            f"{after['graphs'] - warm['graphs']} of them after the warm-up, where one graph is expected"
        )
    row |= {
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "notes": list(state.notes),
        "parameters": sum(parameter.numel() for parameter in state.network.parameters()),
        "first_step_s": None if cuda_graph else first_s,  # what it needs was compiled for the check
        "graphs": after["graphs"] if compile != "off" else 0,
        **rates(windows, batch_size, ceilings.training_flops(resolve(config.model)), peaks, device),
    }
    if device.type == "cuda":
        row |= counts.kernels(stepper.run, device)
    if compile == "off":
        row["operators"] = counts.operators(stepper.run)
    # A graph's memory is its own, and nothing is allocated when it is replayed.
    row["peak_bytes"] = None if cuda_graph else peak_bytes(stepper, device)
    return row | {"loss": stepper.mean_loss()}


def replayed_from_plain(settings: Settings, entry: Entry) -> float:
    """How far steps with `run.cuda_graph`, most of them replayed, take the weights from where plain steps do.

    Returns:
        The norm of the difference over that of what plain steps changed.

    Raises:
        RuntimeError: they do not learn the same, so that their time means nothing.
    """
    device = prepared(settings.device, settings.threads)
    found = []
    for cuda_graph in (False, True):
        stepper = Stepper(synthetic_state(_config(settings, entry._replace(cuda_graph=cuda_graph)), device))
        start = nn.utils.parameters_to_vector(stepper.state.network.parameters()).clone()
        stepper.run(WARM_UP + GATE_STEPS)
        found.append(nn.utils.parameters_to_vector(stepper.state.network.parameters()).detach())
    plain, replayed = found
    distance = ((replayed - plain).norm() / (plain - start).norm()).item()
    if not distance < GATE_DISTANCE:
        raise RuntimeError(
            f"{entry.model}: replayed steps end {distance:.2f} of the way from where plain ones do"
        )
    return distance


def _config(settings: Settings, entry: Entry) -> TrainConfig:
    model, batch_size, compile, cuda_graph = entry
    config = training_config(model, join=settings.join, batch_size=batch_size, compile=compile)
    return replace_fields(config, {"run.cuda_graph": cuda_graph})


def rates(
    windows: list[Window], batch_size: int, flops: int, peaks: Row, device: torch.device
) -> dict[str, Any]:
    """Times of a step and what they come to.

    Returns:
        step_s, cpu_s: seconds of a step, of the device (a CPU: by the clock) and of CPU time
        images_per_second; train_flops: of an image
        mfu_measured, mfu_datasheet: median share of the measured matmul and of the data sheet, None: not known
    """
    step_s = spread([each.step_s for each in windows])
    reached = flops * batch_size / step_s["median"]
    sheet = ceilings.datasheet_peak(device)
    return {
        "step_s": step_s,
        "cpu_s": spread([each.cpu_s for each in windows]),
        "images_per_second": spread([batch_size / each.step_s for each in windows]),
        "train_flops": flops,
        "mfu_measured": reached / peaks["matmul_flops"]["median"],
        "mfu_datasheet": None if sheet is None else reached / sheet,
    }


def peak_bytes(stepper: Stepper, device: torch.device) -> int:
    """The most that tensors hold during a step of `stepper`: weights, moments, average, activations, gradients."""
    stepper.state.optimizer.zero_grad(set_to_none=True)
    return counts.peak_bytes(stepper.run, device, kept=kept_bytes(stepper.state))


def kept_bytes(state: TrainState) -> int:
    """What a state holds between steps without gradients, its synthetic batches left out."""
    held = [*state.network.parameters(), *state.network.buffers()]
    if isinstance(state.ema, Ema):
        held += [*state.ema.model.parameters(), *state.ema.model.buffers()]
    for values in state.optimizer.state.values():
        held += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in held)
