"""Exact counts over a whole validation set, and the loss and speed of training.

Shapes: B images, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lape_ray.training.checkpoint import EpochProgress
from lape_ray.training.distributed import World
from lape_ray.training.times import DATA, Times

T = TypeVar("T")


class EvalCounts:
    """Sums of loss and hits, kept on the device and added over the workers once, at the end."""

    def __init__(self, device: torch.device) -> None:
        # float64 counts every image of any data set exactly, and one tensor needs one reduction
        self._sums = torch.zeros(
            4, dtype=torch.float64, device=device
        )  # images, loss, top-1 hits, top-5 hits

    @torch.no_grad()
    def add(self, logits_BK: Tensor, labels_B: Tensor) -> None:
        logits_BK = logits_BK.float()
        loss = F.cross_entropy(logits_BK, labels_B, reduction="sum")
        best = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels_B.unsqueeze(1)
        count = torch.full((), float(labels_B.numel()), device=labels_B.device)
        self._sums += torch.stack((count, loss, best[:, 0].sum(), best.sum())).double()

    def result(self) -> dict[str, float]:
        """Return `images`, mean `loss`, and `acc1`, `acc5` in percent, over all workers."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)
        images, loss, hits1, hits5 = self._sums.tolist()
        if images == 0:
            raise ValueError("the validation set gave no image")
        return {
            "images": images,
            "loss": loss / images,
            "acc1": 100 * hits1 / images,
            "acc5": 100 * hits5 / images,
        }


class Speed:
    """Images per second since the last reading, and since the start."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._images = 0

    def read(self, images: int) -> float:
        """Return the images per second, from the `images` that were trained since the last call."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self._images += images
        return images / max(elapsed, 1e-9)

    def mean(self) -> float:
        return self._images / max(self._last - self._start, 1e-9)


class LogWindow:
    """The loss and speed of an epoch so far, and of the steps since the last log step.

    The loss is summed on the device, which is waited for where it is read.

    Args:
        start: the progress that the epoch begins with.
        batch_size: images of one optimizer step, over all workers.
    """

    def __init__(self, world: World, start: EpochProgress, *, batch_size: int) -> None:
        self._world, self._batch_size = world, batch_size
        self._sums = torch.tensor([start.loss, start.window_loss], device=world.device)
        self._epoch_loss, self._window_loss = self._sums.unbind()
        self._logged, self._first = start.logged, start.step
        self._speed = Speed()

    def add(self, loss: Tensor) -> None:
        """Add a step's loss, a scalar on the device."""
        self._window_loss += loss

    def read(self, step: int, waited_s: float) -> dict[str, float]:
        """Return the metrics of the steps since the last log step, and begin the next window.

        Args:
            step: the last step of the window, from 0.
            waited_s: seconds that this worker waited for data in it.
        """
        loss = self._world.mean(self._window_loss / (step + 1 - self._logged))
        since = step + 1 - max(self._logged, self._first)
        rate = self._speed.read(since * self._batch_size)
        self._epoch_loss += self._window_loss
        self._window_loss.zero_()
        self._logged = step + 1
        return {
            "train/loss": loss,
            "train/step_s": self._batch_size / rate,
            "train/data_wait_s": waited_s / since,
        }

    @property
    def mean_rate(self) -> float:
        """Images per second since the start, up to the last log step."""
        return self._speed.mean()

    def progress(self, step: int) -> EpochProgress:
        """Return the progress after `step`.

        The means over the workers take the place of each one's sums, as they do where a run continues from here.
        """
        loss, window_loss = self._world.mean(self._epoch_loss), self._world.mean(self._window_loss)
        self._sums.copy_(torch.tensor([loss, window_loss]))
        return EpochProgress(step=step + 1, logged=self._logged, loss=loss, window_loss=window_loss)

    def epoch_loss(self, steps: int) -> float:
        """Return the mean loss of the epoch's `steps`, over all workers."""
        return self._world.mean(self._epoch_loss / steps)


class Waited(Iterator[T]):
    """The items of another iterator, and how long they were waited for.

    A GPU that still has work when an item comes has waited for nothing.

    Args:
        times: of this process, in which the waiting is a part.
        device: the device that the items are for.
    """

    def __init__(self, items: Iterator[T], times: Times, device: torch.device) -> None:
        self._items, self._times = items, times
        self._work = torch.cuda.Event() if device.type == "cuda" else None
        self._seconds = 0.0

    def __next__(self) -> T:
        began = time.perf_counter()
        if self._work is not None:
            self._work.record()
        try:
            return next(self._items)
        finally:
            waited = time.perf_counter() - began
            if self._work is None or self._work.query():
                self._seconds += waited
                self._times.move(waited, DATA)

    def read(self) -> float:
        """Return the seconds that were waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def duration(seconds: float) -> str:
    """Format seconds as `h:mm:ss`."""
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}"
