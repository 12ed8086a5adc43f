"""The outcome of a finished run in numbers: predictions on the validation set, worst classes, hours. No figures.

Shapes: N validation images in the file's order, B images of a batch, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lape_ray.data.batch import Batches

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Truth and best class of every validation image (N,), and the best class's probability."""

    labels_N: np.ndarray
    best_N: np.ndarray
    probability_N: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        """Indices (W,) of the images whose best class is not the truth."""
        return np.flatnonzero(self.labels_N != self.best_N)


def predict_all(network: nn.Module, loader: Batches) -> Predictions:
    """Predict the loader's validation set in one pass, on the network's device."""
    network.eval()
    labels, best, probability = [], [], []
    with torch.inference_mode(), contextlib.closing(loader.epoch(0)) as batches:
        for images_BCHW, labels_B, _ in batches:
            logits_BK = network(images_BCHW)
            top = logits_BK.float().softmax(-1).max(-1)
            labels.append(labels_B.cpu())
            best.append(top.indices.cpu())
            probability.append(top.values.cpu())
    return Predictions(
        labels_N=torch.cat(labels).numpy(),
        best_N=torch.cat(best).numpy(),
        probability_N=torch.cat(probability).numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class: its images, how many of them are right, and what the others are taken for, most frequent first."""

    label: int
    images: int
    right: int
    taken_for: tuple[tuple[int, int], ...]

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * self.right / self.images


def confusion(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Count images (K, K) by truth (row) and best class (column)."""
    cells = predictions.labels_N * num_classes + predictions.best_N
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def worst_classes(confusion_KK: np.ndarray, count: int) -> list[ClassScore]:
    """Find the classes of lowest accuracy among those that have images, worst first; ties by number."""
    scores = []
    for label, row_K in enumerate(confusion_KK):
        if row_K.sum() == 0:
            continue
        others = sorted(
            ((int(n), k) for k, n in enumerate(row_K) if n and k != label), key=lambda x: (-x[0], x[1])
        )
        taken_for = tuple((k, n) for n, k in others[:3])
        scores.append(
            ClassScore(label=label, images=int(row_K.sum()), right=int(row_K[label]), taken_for=taken_for)
        )
    return sorted(scores, key=lambda score: (score.accuracy, score.label))[:count]


def by_epoch(history: Mapping[str, Sequence[tuple[int, float]]], name: str) -> Points:
    """List (epoch, value) of a metric that is logged once an epoch; empty where it was not logged."""
    epoch_of = dict(history.get("epoch", ()))
    return [(epoch_of[step], value) for step, value in history.get(name, ()) if step in epoch_of]


def worker_hours(history: Mapping[str, Sequence[tuple[int, float]]], batch_size: int, workers: int) -> float:
    """Add up the hours in which workers trained, over all parts of an interrupted run.

    Each epoch's are its images over its images/s, times its workers: those that were logged, else `workers`. Neither
    evaluation nor start-up is in it.
    """
    logged = dict(history.get("train/workers", ()))
    seconds, before = 0.0, 0
    for step, images_per_s in history.get("train/images_per_s", ()):
        seconds += (step - before) * batch_size / images_per_s * logged.get(step, workers)
        before = step
    return seconds / 3600
