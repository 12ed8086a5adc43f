"""One page of a finished run: curves, worst classes, sample predictions, speed and cost, config and command.

Shapes: N validation images, K classes, S side of an image in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lape_ray.config import TrainConfig, dump
from lape_ray.data.ready import Normalized
from lape_ray.inference.evaluate import choose_device, evaluation_loader
from lape_ray.inference.predict import load_network
from lape_ray.inference.samples import evenly_spaced, images_at
from lape_ray.report import figures, outcome
from lape_ray.report.goodput import Division
from lape_ray.report.outcome import ClassScore, Predictions, by_epoch
from lape_ray.report.page import Page
from lape_ray.tracking import RunFacts
from lape_ray.training.checkpoint import read_metadata
from lape_ray.training.state import autocast_for

HTML = "summary.html"
METRICS = (
    "epoch", "train/epoch_loss", "train/images_per_s", "train/lr", "train/workers",
    "val/loss", "val/acc1", "val/acc5", "val_ema/loss", "val_ema/acc1", "val_ema/acc5",
)  # fmt: skip
WORST = 10
SAMPLES = 12
PICTURE_PX = 112


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that a page of a run shows."""

    config: TrainConfig
    run: RunFacts
    predictions: Predictions
    epoch: int
    """The epoch after which the best checkpoint was made."""
    classes: Sequence[str]
    samples: Sequence[tuple[int, Tensor]]
    """Index in the validation set and uint8 picture (3, S, S)."""
    unit: str
    """The kind of device that a worker computes on: GPU or CPU."""
    per_worker: int
    """Units of a worker."""
    time: Division
    """What the run's wall time went into."""


def write_run_summary(
    config: TrainConfig, checkpoint: Path, run: RunFacts, folder: Path, *, time: Division
) -> Path:
    """Evaluate the checkpoint on `data.val` and write the page and its figures into `folder`; returns the page.

    Raises ValueError and OSError where the validation data or the checkpoint cannot be read.
    """
    device = choose_device(config)
    loader = evaluation_loader(config, device)
    network = load_network(str(checkpoint), config).to(device)
    with autocast_for(config, device)():
        predictions = outcome.predict_all(network, Normalized(loader, config.data, device))
    chosen = _chosen(predictions)
    results = Results(
        config=config,
        run=run,
        predictions=predictions,
        epoch=read_metadata(checkpoint).epochs_done,
        classes=loader.info.classes,
        samples=list(zip(chosen.tolist(), images_at(config, chosen), strict=True)),
        unit="GPU" if device.type == "cuda" else "CPU",
        per_worker=1 if device.type == "cuda" else config.run.cpus_per_worker,
        time=time,
    )
    return write_page(results, folder)


def _chosen(predictions: Predictions) -> np.ndarray:
    """Choose images to show: some spread over all, and some spread over the wrong ones."""
    some_N = evenly_spaced(len(predictions.labels_N), SAMPLES)
    wrong_N = predictions.wrong
    wrong_N = wrong_N[evenly_spaced(len(wrong_N), SAMPLES)] if len(wrong_N) else wrong_N
    return np.concatenate([some_N, wrong_N[~np.isin(wrong_N, some_N)]])


def write_page(results: Results, folder: Path) -> Path:
    """Write the page and its figures of the results; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    config, run = results.config, results.run
    model = config.model
    embedding = f"position {model.position}, join {model.join}, bias {model.bias}, rotary {model.rotary}"
    page = Page(
        run.name,
        f"{config.recipe or model.variant}: {model.variant}, {embedding}; seed {config.training.seed}",
    )
    page.facts(_headline(results))
    page.heading("Curves")
    page.figure(figures.save(_curves(results), folder, "curves"), "By epoch.")
    if results.time.wall_s > 0:
        page.heading("Wall time")
        page.figure(
            figures.save(figures.time_figure(results.time), folder, "time"),
            "From the first submission to this page, over all restarts; docs/operations.md defines the parts.",
        )
    page.heading("Worst classes")
    _classes(page, results, folder)
    page.heading("Sample predictions")
    page.note(
        "Framed green where the best class is the truth, red where it is not; spread over the validation set."
    )
    page.pictures(_cards(results))
    page.heading("Repeat it")
    page.code(run.tags.get("command", "the command was not recorded"))
    known = [(name, run.tags[name]) for name in sorted(run.tags) if not name.startswith("mlflow.")]
    page.table(("tag", "value"), [(name, value) for name, value in known if name != "command"])
    page.heading("Config")
    page.code(dump(config))
    target = folder / HTML
    target.write_text(page.html())
    return target


def _headline(results: Results) -> list[tuple[str, str]]:
    history, config = results.run.history, results.config
    right = 100 - 100 * len(results.predictions.wrong) / len(results.predictions.labels_N)
    speeds = [value for _, value in history.get("train/images_per_s", ())]
    cards = [
        ("top-1 of the best checkpoint", f"{right:.2f} %"),
        ("validation images", f"{len(results.predictions.labels_N):,}"),
    ]
    if epochs := history.get("epoch"):
        cards.append(("epochs, the best one", f"{epochs[-1][1]:.0f}, {results.epoch}"))
    if results.time.wall_s > 0:
        cards.append(("goodput: steps that count", f"{results.time.metrics()['goodput']:.1f} % of the time"))
    if speeds:
        cards.append(("training speed", f"{sum(speeds) / len(speeds):,.0f} images/s"))
        hours = outcome.worker_hours(history, config.data.batch_size, config.run.workers.high)
        count = _count(
            results.per_worker * config.run.workers.low, results.per_worker * config.run.workers.high
        )
        cards.append(
            (
                f"{results.unit}-hours of training",
                f"{hours * results.per_worker:.3g} on {count} {results.unit}",
            )
        )
    return cards


def _count(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _curves(results: Results) -> Figure:
    def lines(*names: tuple[str, str]) -> list[tuple[str, list[float], list[float]]]:
        found = [(label, by_epoch(results.run.history, name)) for label, name in names]
        return [(label, [e for e, _ in points], [v for _, v in points]) for label, points in found if points]

    training = lines(("training", "train/epoch_loss"))
    validation = lines(("validation", "val/loss"), ("moving average", "val_ema/loss"))
    if results.config.optim.loss == "cross_entropy":
        losses = [("Loss", "epoch", "cross-entropy", training + validation)]
    else:  # on two scales
        losses = [
            ("Training loss", "epoch", results.config.optim.loss, training),
            ("Validation loss", "epoch", "cross-entropy", validation),
        ]
    accuracy = lines(("top-1", "val/acc1"), ("top-5", "val/acc5"), ("top-1, moving average", "val_ema/acc1"))
    speed = lines(("images/s", "train/images_per_s"))
    return figures.curves_figure(
        [
            *losses,
            ("Validation accuracy", "epoch", "%", accuracy),
            ("Training speed", "epoch", "images/s", speed),
        ]
    )


def _classes(page: Page, results: Results, folder: Path) -> None:
    names = results.classes
    confusion_KK = outcome.confusion(results.predictions, len(names))
    worst = [score for score in outcome.worst_classes(confusion_KK, WORST) if score.right < score.images]
    if not worst:
        page.text("Every image of every class is right.")
        return
    shown = _confused(worst)
    labels = [names[k] for k in shown]
    figure = figures.confusion_figure(confusion_KK[np.ix_(shown, shown)], confusion_KK.sum(1)[shown], labels)
    page.figure(
        figures.save(figure, folder, "confusion"),
        "The worst classes and what they are taken for: share of a class's images, in percent.",
    )
    page.table(
        ("class", "images", "right, %", "taken for"),
        [
            (
                names[score.label],
                score.images,
                f"{score.accuracy:.1f}",
                ", ".join(f"{names[k]} ({n})" for k, n in score.taken_for) or "–",
            )
            for score in worst
        ],
    )


def _confused(worst: Sequence[ClassScore]) -> list[int]:
    """List the worst classes and the class that each is taken for most often, in order of number."""
    return sorted(
        {score.label for score in worst} | {score.taken_for[0][0] for score in worst if score.taken_for}
    )


def _cards(results: Results) -> list[tuple[bytes, str, bool]]:
    cards = []
    for index, image_CSS in results.samples:
        truth, best = int(results.predictions.labels_N[index]), int(results.predictions.best_N[index])
        said = f"{results.classes[best]} · {100 * results.predictions.probability_N[index]:.0f} %"
        text = said if truth == best else f"{said}; is {results.classes[truth]}"
        cards.append((_png(image_CSS), text, truth == best))
    return cards


def _png(image_CSS: Tensor) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(image_CSS.permute(1, 2, 0).to(torch.uint8).numpy()))
    if image.width > PICTURE_PX:
        image = image.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
