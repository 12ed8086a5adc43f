"""The training loop: epochs, evaluation, checkpoints. Knows no Ray, no tracker and no storage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from lape_ray.config import TrainConfig
from lape_ray.data.batch import Batches
from lape_ray.model import resolve
from lape_ray.training import checkpoint
from lape_ray.training.checkpoint import EpochProgress, Metadata, Snapshot
from lape_ray.training.flags import Flags
from lape_ray.training.initial import load_initial
from lape_ray.training.metrics import EvalCounts, LogWindow, Waited, duration
from lape_ray.training.optim import lr_at
from lape_ray.training.state import TrainState, build_state, resize_state
from lape_ray.training.step import optimizer_step
from lape_ray.training.times import CHECKPOINT, EVALUATION, FIRST_STEP, IDLE, STEPS, Times

NOTHING_DONE = EpochProgress()


class EndedError(RuntimeError):
    """The training ends early, on all workers at the same step."""


class DivergedError(EndedError):
    """The loss is no finite number any more."""

    exit_code = 1


class StoppedError(EndedError):
    """The run was asked to end early, and left a checkpoint."""

    exit_code = 143  # of a process that SIGTERM ended


class Reporter(Protocol):
    """The listener that the loop reports to. It is called on every worker, at the same points."""

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        """Report a log step. `metrics` are means over all workers; those that end in `_s` are this worker's seconds."""

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Begin to store the checkpoint of an epoch's end, or leave it out where the one before is not stored yet.

        The last one of the training is always stored. `snapshot` copies the state as it is now, and must be called
        before this returns.
        """

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Begin to store a checkpoint that is due within an epoch. Nothing was evaluated, and nothing waits."""

    def checkpoint_stored(self) -> None:
        """Take note, on all ranks, that the checkpoint is stored which rank 0 raised `Flags.SAVED` for."""

    def wait_until_saved(self) -> None:
        """Wait until the last checkpoint is stored, so that a restart begins there; do nothing without one."""

    def node_leaving(self) -> bool:
        """Tell whether a machine of this run is about to go, so that a checkpoint is due; asked on log steps of all."""

    def poll_flags(self) -> Flags:
        """Return this worker's flags. It is asked at every step, and must not wait for anything."""

    def line(self, text: str) -> None:
        """Show one line of progress to people."""


def train(
    config: TrainConfig,
    *,
    device: torch.device,
    reporter: Reporter,
    resume_from: Path | None = None,
    times: Times | None = None,
) -> dict[str, float]:
    """Train to the end of the schedule, or to `run.stop_after_epochs`; returns the last epoch's metrics.

    `resume_from` is a checkpoint folder of this run: training continues after the epochs it has done, and the
    losses are those of a run that was never interrupted. `times` learns what the time goes into.

    Raises:
        DivergedError: the loss is no finite number.
        StoppedError: the reporter's flags asked for the end.
    """
    training = Training.begin(config, device=device, reporter=reporter, resume_from=resume_from)
    training.state.times = times = times or training.state.times
    times.enter(FIRST_STEP)
    try:
        while training.epochs_done < training.last_epoch:
            metrics = training.epoch()
            with times.within(CHECKPOINT):
                reporter.epoch(metrics, step=training.steps_done, snapshot=training.snapshot)
    except EndedError:
        times.enter(IDLE)
        training.close()  # a process that trains again would keep the group
        raise
    with times.within(CHECKPOINT):
        reporter.wait_until_saved()
    times.enter(IDLE)
    training.close()
    return training.metrics


@dataclass
class Training:
    """A training on this worker, epoch by epoch.

    Attributes:
        epochs_done: complete epochs
        progress: that of the epoch after them
        metrics: those of the last complete epoch
    """

    state: TrainState
    reporter: Reporter
    epochs_done: int = 0
    progress: EpochProgress = NOTHING_DONE
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, config: TrainConfig, *, device: torch.device, reporter: Reporter, resume_from: Path | None = None
    ) -> Training:
        """Build a fresh training, or the one that a checkpoint folder of the same run holds.

        Raises:
            DamagedError: the checkpoint is torn or changed.
            ValueError: it is of another config, or the config asks for what the device does not have.
        """
        epoch = 0 if resume_from is None else _epoch_of(resume_from)
        training = cls(build_state(config, device, epoch=epoch), reporter)
        for note in training.state.notes:
            reporter.line(note)
        if resume_from is not None:
            training._restore(resume_from)
        elif config.training.init_from is not None:
            for note in load_initial_weights(training.state, config.training.init_from):
                reporter.line(f"init_from: {note}")
        training.state.world.set_timeout(config.run.start_timeout_s)
        return training

    def _restore(self, folder: Path) -> None:
        state = self.state
        metadata = checkpoint.restore(folder, state.config, **state.saved_parts)
        self.epochs_done, self.progress = metadata.epochs_done, metadata.progress
        self.metrics = dict(metadata.metrics)
        within = f" and step {self.progress.step} of {state.steps_per_epoch}" if self.progress.step else ""
        self.reporter.line(
            f"continuing after epoch {self.epochs_done} of {state.config.optim.total_epochs}{within}"
        )

    @property
    def last_epoch(self) -> int:
        """The number of epochs to train, those included that are done."""
        return self.state.config.last_epoch

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the beginning of the run."""
        return self.epochs_done * self.state.steps_per_epoch + self.progress.step

    def epoch(self) -> dict[str, float]:
        """Train the next epoch, or what is left of it, and evaluate where that is due; returns its metrics.

        Raises:
            DivergedError: the loss is no finite number; what is saved never has such a loss behind it.
            StoppedError: the run is to end, and its state was saved.
        """
        self._resize()
        trained = train_epoch(
            self.state, self.epochs_done, self.reporter, start=self.progress, save=self._save
        )
        self.epochs_done, self.progress = self.epochs_done + 1, NOTHING_DONE
        self.metrics = {"epoch": float(self.epochs_done), **trained}
        if self.state.config.data.image_sizes:
            self.metrics["train/image_size"] = float(self._side(self.epochs_done - 1))
        if self.epochs_done % self.state.config.run.eval_epochs == 0 or self.epochs_done == self.last_epoch:
            with self.state.times.within(EVALUATION):
                self.metrics |= _validate(self.state)
            self.reporter.line(_epoch_line(self.state, self.metrics))
        return self.metrics

    def _resize(self) -> None:
        """Go on with images of another size where `data.image_size_schedule` says so."""
        side = self._side(self.epochs_done)
        if self.progress.step or side == self._side(max(0, self.epochs_done - 1)):
            return
        self.state.times.enter(FIRST_STEP)
        # The first step compiles again.
        self.state.world.set_timeout(self.state.config.run.start_timeout_s)
        self.state, notes = resize_state(self.state, self.epochs_done)
        self.reporter.line(
            "; ".join([f"epoch {self.epochs_done + 1}: images of {side} px from here on", *notes])
        )

    def _side(self, epoch: int) -> int:
        return resolve(self.state.config.at_epoch(epoch).model).image_size

    def _save(self, progress: EpochProgress) -> None:
        """Hand out a checkpoint within the epoch."""
        self.progress = progress
        epochs = self.steps_done / self.state.steps_per_epoch
        self.reporter.checkpoint({"epoch": epochs}, step=self.steps_done, snapshot=self.snapshot)

    def snapshot(self) -> Snapshot:
        """Copy the state to host memory, with the facts of where the training is."""
        metadata = Metadata(
            epochs_done=self.epochs_done,
            steps_done=self.steps_done,
            progress=self.progress,
            config=self.state.config,
            metrics=self.metrics,
            world_size=self.state.world.size,
            classes=self.state.classes,
        )
        return checkpoint.snapshot(**self.state.saved_parts, metadata=metadata, copies=self.state.copies)

    def close(self) -> None:
        """Give back the process group that a process which trains again would keep."""
        self.state.flags.close()


def _epoch_of(folder: Path) -> int:
    """Return the epoch, from 0, that the weights of a checkpoint were last trained in."""
    metadata = checkpoint.read_metadata(folder)
    return metadata.epochs_done - (metadata.epochs_done > 0 and metadata.progress.step == 0)


def train_epoch(
    state: TrainState,
    epoch: int,
    reporter: Reporter,
    *,
    start: EpochProgress = NOTHING_DONE,
    save: Callable[[EpochProgress], None],
) -> dict[str, float]:
    """Train one epoch, from `start` on. Synchronises with the device on log and checkpoint steps only.

    `save` is called where a checkpoint is due within the epoch. What follows does not depend on whether the run was
    interrupted there: order, crops and all draws are functions of the epoch and the step.

    Raises:
        DivergedError: the loss is no finite number; what is saved never has such a loss behind it.
        StoppedError: the run is to end, and its state was saved.
    """
    config, steps = state.config, state.steps_per_epoch
    state.model.train()
    window = LogWindow(state.world, start, batch_size=config.data.batch_size)
    saving = _Saving(state, epoch, reporter, window, save)
    lr = _lr(state, epoch, start.step - 1) if start.step else 0.0
    shown = time.monotonic()
    first_batch = start.step * len(state.micro_batches)
    with contextlib.closing(state.train_loader.epoch(epoch, start=first_batch)) as ready:
        batches = Waited(ready, state.times, state.world.device)
        for step in range(start.step, steps):
            lr = _lr(state, epoch, step)
            window.add(optimizer_step(state, batches, epoch=epoch, step=step, lr=lr))
            if step == start.step:  # it may take longer: it compiles
                state.times.enter(STEPS)
                state.world.set_timeout(config.run.timeout_s)
            flags = reporter.poll_flags()
            if (step + 1) % config.run.log_steps == 0 or step + 1 == steps:
                metrics = window.read(step, batches.read())
                _refuse_divergence(metrics["train/loss"], epoch, step)
                reporter.step({**metrics, "train/lr": lr}, step=epoch * steps + step + 1)
                if time.monotonic() - shown >= config.run.progress_s:
                    shown = time.monotonic()
                    reporter.line(
                        _progress_line(state, epoch, step, {**metrics, "train/lr": lr}, window.mean_rate)
                    )
                flags |= saving.due_by_clock()
            saving.act(state.flags.all_reduce(flags), step)
    return {
        "train/epoch_loss": window.epoch_loss(steps),
        "train/lr": lr,
        "train/images_per_s": window.mean_rate,
    }


def _lr(state: TrainState, epoch: int, step: int) -> float:
    steps = state.steps_per_epoch
    return lr_at(epoch * steps + step, config=state.config.optim, steps_per_epoch=steps)


@dataclass
class _Saving:
    """The checkpoints within an epoch: when they are due, and what a worker does then."""

    state: TrainState
    epoch: int
    reporter: Reporter
    window: LogWindow
    save: Callable[[EpochProgress], None]
    clock: float = field(default_factory=time.monotonic)

    def due_by_clock(self) -> Flags:
        """Ask for a checkpoint where the last one is old, or where a machine is about to go.

        With the interval `auto` the reporter asks.
        """
        minutes = self.state.config.run.checkpoint_minutes
        late = minutes != "auto" and minutes > 0 and time.monotonic() - self.clock > 60 * minutes
        return Flags.SAVE if self.reporter.node_leaving() or late else Flags.NONE

    def act(self, flags: Flags, step: int) -> None:
        """Do what the flags of all ranks ask for after `step`; StoppedError: the run is to end."""
        every, steps = self.state.config.run.checkpoint_steps, self.state.steps_per_epoch
        stop = Flags.STOP in flags
        due = Flags.SAVE in flags or (every is not None and (step + 1) % every == 0)
        with self.state.times.within(CHECKPOINT):
            if Flags.UNSAVED in flags or stop:
                self.reporter.wait_until_saved()
            elif Flags.SAVED in flags:
                self.reporter.checkpoint_stored()
        if stop or (due and step + 1 < steps):
            done = self.window.progress(step)
            _refuse_divergence(done.loss + done.window_loss, self.epoch, step)
            with self.state.times.within(CHECKPOINT):
                self.save(done)
            self.clock = time.monotonic()
        if stop:
            with self.state.times.within(CHECKPOINT):
                self.reporter.wait_until_saved()
            raise StoppedError(
                f"stopped after epoch {self.epoch} and step {step + 1} of {steps}, with a checkpoint"
            )


def _refuse_divergence(loss: float, epoch: int, step: int) -> None:
    if loss != loss or abs(loss) == float("inf"):
        raise DivergedError(
            f"the loss is {loss} at epoch {epoch + 1}, step {step + 1}: lower optim.lr, "
            "lengthen optim.warmup_epochs or set optim.clip_norm=1, and continue under a new run.name"
        )


def _progress_line(
    state: TrainState, epoch: int, step: int, metrics: dict[str, float], mean_rate: float
) -> str:
    epochs, steps, batch = (
        state.config.optim.total_epochs,
        state.steps_per_epoch,
        state.config.data.batch_size,
    )
    left = (epochs * steps - epoch * steps - step - 1) * batch
    return (
        f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}  step {step + 1:>{len(str(steps))}}/{steps}"
        f"  loss {metrics['train/loss']:.4f}  lr {metrics['train/lr']:.2e}"
        f"  {batch / metrics['train/step_s']:,.0f} images/s  ETA {duration(left / mean_rate)}"
    )


def evaluate(model: nn.Module, loader: Batches) -> dict[str, float]:
    """Compute exact loss, top-1 and top-5 over the whole validation set, on the model's device.

    Every image counts once, on any number of workers. The model runs in the precision that the caller's autocast gives.
    """
    model.eval()
    counts = EvalCounts(next(model.parameters()).device)
    with torch.inference_mode(), contextlib.closing(loader.epoch(0)) as batches:
        for images_BCHW, labels_B, _ in batches:
            counts.add(model(images_BCHW), labels_B)
    return counts.result()


def _validate(state: TrainState) -> dict[str, float]:
    networks: dict[str, nn.Module] = {"val": state.network}
    if state.ema is not None:
        networks["val_ema"] = state.ema.model
    metrics: dict[str, float] = {}
    for name, network in networks.items():
        with state.autocast():
            result = evaluate(network, state.val_loader)
        metrics |= {f"{name}/{key}": result[key] for key in ("loss", "acc1", "acc5")}
    return metrics


def load_initial_weights(state: TrainState, path: str) -> list[str]:
    """Start from another run's weights; a head for other classes is left fresh."""
    notes = load_initial(state.network, path, state.config.data, state.classes)
    if state.ema is not None:
        state.ema.model.load_state_dict(state.network.state_dict())
    return notes


def _epoch_line(state: TrainState, metrics: dict[str, float]) -> str:
    ema = f"  ema {metrics['val_ema/acc1']:.2f}" if "val_ema/acc1" in metrics else ""
    return (
        f"epoch {metrics['epoch']:.0f}/{state.config.optim.total_epochs} done"
        f"  val loss {metrics['val/loss']:.4f}  top-1 {metrics['val/acc1']:.2f}{ema}"
        f"  top-5 {metrics['val/acc5']:.2f}  {metrics['train/images_per_s']:,.0f} images/s"
    )
