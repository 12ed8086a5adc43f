"""The training loop: epochs, evaluation, checkpoints. Knows no Ray, no tracker and no storage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lape_ray.config import TrainConfig
from lape_ray.data.batch import Batches
from lape_ray.model.convert import load_weights
from lape_ray.training import checkpoint
from lape_ray.training.flags import News
from lape_ray.training.metrics import EvalCounts, Speed, Waited, duration
from lape_ray.training.optim import lr_at
from lape_ray.training.state import TrainState, build_state
from lape_ray.training.step import optimizer_step

NOTHING_DONE = checkpoint.Progress()
Take = Callable[[Mapping[str, Any]], Callable[[Path], None]]
"""Copies the state as it is now, with its keeper's notes; what is returned writes the copy into a folder."""


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

    def epoch(self, metrics: dict[str, float], *, step: int, take: Take) -> None:
        """Begin to store the checkpoint of an epoch's end; first wait for the one before if that is not stored yet."""

    def checkpoint(self, metrics: dict[str, float], *, step: int, take: Take) -> None:
        """Begin to store a checkpoint that is due within an epoch. Nothing was evaluated, and nothing waits."""

    def stored(self) -> None:
        """Wait until the last checkpoint is stored, and make it the one to go on from; do nothing without one."""

    def leaving(self) -> bool:
        """Tell whether a machine of this run is about to go, so that a checkpoint is due; asked on log steps of all."""

    def news(self) -> News:
        """Return what this worker has to tell the others. It is asked at every step, and must not wait for anything."""

    def line(self, text: str) -> None:
        """Show one line of progress to people."""


def train_epoch(
    state: TrainState,
    epoch: int,
    reporter: Reporter,
    *,
    start: checkpoint.Progress = NOTHING_DONE,
    save: Callable[[checkpoint.Progress], None],
) -> dict[str, float]:
    """Train one epoch, from `start` on. Synchronises with the device on log and checkpoint steps only.

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
    with contextlib.closing(state.train_loader.epoch(epoch, start=start_batch)) as ready:
        batches = Waited(ready)
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
    elif config.training.init_from is not None:
        for note in load_initial_weights(state, config.training.init_from):
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
