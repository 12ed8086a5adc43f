"""Exact accuracy of a checkpoint of any origin, on this machine's device, without Ray and without a tracker."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lape_ray.config import TrainConfig, flatten, replace_fields
from lape_ray.data.batch import Batch, Batches
from lape_ray.data.loader import Loader, build_loader
from lape_ray.data.ready import Normalized
from lape_ray.data.split import read_split_info
from lape_ray.inference.predict import load_network
from lape_ray.model import resolve
from lape_ray.recipes import recipe as recipe_of
from lape_ray.storage import local
from lape_ray.training.architecture import timm_network
from lape_ray.training.checkpoint import about, read_metadata
from lape_ray.training.classes import checkpoint_classes, match_classes
from lape_ray.training.loop import evaluate
from lape_ray.training.preflight import check_split, with_absolute_paths
from lape_ray.training.preprocessing import timm_fields
from lape_ray.training.state import autocast_for, available_cpus
from lape_ray.values.plugin import Plugin, trusted

log = logging.getLogger(__name__)


def config_for(checkpoint: str, recipe_name: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Choose the config by which a checkpoint is evaluated.

    It is the named recipe, else the checkpoint's own config, else the defaults; then come what timm's config.json next
    to the file says of its images, and without a recipe or variant of its network, with a warning, and the `overrides`.
    """
    if recipe_name is not None:
        base = recipe_of(recipe_name)
    elif Path(checkpoint).is_dir():
        base = read_metadata(Path(checkpoint)).config
    else:
        base = TrainConfig()
    if Path(checkpoint).is_dir():
        overrides = _with_plugin(checkpoint, base.model.plugin, overrides)
        return with_absolute_paths(replace_fields(base, overrides))
    chosen = recipe_name is not None or "model.variant" in overrides
    network = {} if chosen else timm_network(Path(checkpoint))
    overrides = _with_plugin(checkpoint, network.get("model.plugin"), overrides)
    made = with_absolute_paths(replace_fields(base, {**network, **overrides}))
    spec = resolve(made.model)
    here = flatten(made) | {"model.image_size": spec.image_size, "model.num_classes": spec.num_classes}
    images = {name: value for name, value in timm_fields(Path(checkpoint)).items() if here[name] != value}
    taken = {name: value for name, value in {**network, **images}.items() if name not in overrides}
    if taken:
        fields = " ".join(f"--{name} {_shown(value)}" for name, value in taken.items())
        log.warning("%s: its config.json is followed, as by %s; options come before it", checkpoint, fields)
    return replace_fields(made, taken)


def _with_plugin(checkpoint: str, stored: Plugin | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides with the plugin that the checkpoint's network may be built with."""
    with about(checkpoint):
        return {**overrides, "model.plugin": trusted(stored, overrides.get("model.plugin"))}


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def choose_device(config: TrainConfig) -> torch.device:
    """Choose this machine's GPU where the config asks for it, or leaves it open and the machine has one."""
    gpu = config.run.device == "gpu" or (config.run.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def evaluation(
    checkpoint: str, *, overrides: Mapping[str, Any], recipe: str | None = None, ema: bool = False
) -> str:
    """Evaluate the checkpoint at an address by the config of `config_for`, and say the result in a line."""
    path = str(local(checkpoint))
    config = config_for(path, recipe, overrides)
    result = evaluate_checkpoint(path, config, ema=ema)
    line = "{images:.0f} images  top-1 {acc1:.3f}  top-5 {acc5:.3f}  loss {loss:.4f}".format(**result)
    return f"{line}  ({seen_as(config)})"


def seen_as(config: TrainConfig) -> str:
    """Say in a few words what evaluation sees of an image."""
    data, size = config.data, resolve(config.model).image_size
    kind = "bilinear" if data.interpolation == "bilinear" else "bicubic"
    return f"{size} px, crop {data.eval_crop:g} of the shorter side, {kind}"


def evaluate_checkpoint(checkpoint: str, config: TrainConfig, *, ema: bool = False) -> dict[str, float]:
    """Evaluate `config.model` with the checkpoint's weights on `data.val`.

    Returns:
        `images`, `loss`, `acc1` and `acc5` (percent).
    """
    device = choose_device(config)
    network = load_network(checkpoint, config, ema=ema)
    places_K = val_places(checkpoint, config)
    loader = Normalized(evaluation_loader(config, device), config.data, device)
    with autocast_for(config, device)():
        return evaluate(network.to(device), by_name(loader, places_K))


def evaluation_loader(config: TrainConfig, device: torch.device, *, image_size: int | None = None) -> Loader:
    """Build the loader of `data.val` as evaluation sees it, at the network's image size or another."""
    return build_loader(
        config.data,
        "val",
        image_size=image_size or resolve(config.model).image_size,
        batch_size=config.data.eval_batch_size,
        device=device,
        threads=config.data.threads or available_cpus(),
    )


def val_places(checkpoint: str, config: TrainConfig) -> list[int] | None:
    """Find the checkpoint's output for each class (K) of `data.val`, by name, with a warning where they differ.

    None: they are as they stand.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, or has other classes or too small images.
    """
    info = read_split_info(config.data, "val")
    known = checkpoint_classes(checkpoint)
    places_K, note = match_classes(info.classes, known, of=checkpoint, path=info.path)
    if note:
        log.warning("%s", note)
    check_split(config, "val", subset=places_K is not None)
    return places_K


def by_name(loader: Batches, places_K: Sequence[int] | None) -> Batches:
    """Give a loader the labels of a checkpoint's outputs, as `val_places` finds them."""
    return loader if places_K is None else _Relabelled(loader, torch.tensor(places_K))


@dataclass(frozen=True)
class _Relabelled:
    """A loader whose labels are the places of a checkpoint's classes."""

    loader: Batches
    places_K: Tensor

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        with contextlib.closing(self.loader.epoch(epoch)) as batches:
            for batch in batches:
                yield batch._replace(labels=self.places_K.to(batch.labels.device)[batch.labels])
