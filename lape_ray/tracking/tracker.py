"""The interface of a tracker, and rank 0's own: MLflow, with TensorBoard's event files beside it on request."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lape_ray.config import TrackingConfig
from lape_ray.tracking.mlflow.tracker import MlflowTracker
from lape_ray.tracking.tensorboard import TensorBoardTracker, check_tensorboard


class Tracker(Protocol):
    """The way of a run's metrics and files to where people look at them.

    Only `save_unsent` raises: tracking never ends a training, and no checkpoint is whole before its values are stored
    or kept.
    """

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Take the values of a step, at once; a step that is stored already is not stored twice."""

    def files(self, folder: Path, to: str) -> None:
        """Keep every file of `folder` below the name `to`; a failure is a warning."""

    def save_unsent(self) -> None:
        """Keep what is not stored yet in the run's folder; it is called before a checkpoint is published.

        Raises:
            OSError: that folder cannot be written.
        """

    def close(self, timeout_s: float = 60) -> None:
        """Wait until all is stored, for `timeout_s` at most, and keep the rest in the run's folder."""


class _All:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        for tracker in self._trackers:
            tracker.metrics(values, step=step)

    def files(self, folder: Path, to: str) -> None:
        for tracker in self._trackers:
            tracker.files(folder, to)

    def save_unsent(self) -> None:
        for tracker in self._trackers:
            tracker.save_unsent()

    def close(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        for tracker in self._trackers:
            tracker.close(max(1.0, deadline - time.monotonic()))


def check_trackers(config: TrackingConfig) -> None:
    """Check, before a run begins, what the trackers beside MLflow need; a ValueError says what is missing."""
    check_tensorboard(config.tensorboard)


def open_tracker(
    config: TrackingConfig,
    uri: str,
    run_id: str,
    folder: str,
    *,
    check: Callable[[], None] = lambda: None,
) -> Tracker:
    """Open rank 0's tracker of a run, which first sends what an earlier one has left unsent.

    Args:
        config: says which trackers there are beside MLflow.
        uri: of MLflow, where the driver has made the run `run_id`.
        folder: address of the run's folder, for what is not sent yet.
        check: is called before something is written into the run's folder; what it raises is raised (its lease).

    Raises:
        OSError: the run's folder cannot be read.
    """
    mlflow = MlflowTracker(uri, run_id, folder, check)
    if config.tensorboard is None:
        return mlflow
    return _All([mlflow, TensorBoardTracker(config.tensorboard, run_id, folder, check)])
