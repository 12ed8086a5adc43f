"""What can be checked before any worker starts, so that bad input costs seconds and one clear line."""

from __future__ import annotations

from typing import Literal

import torch

from lape_ray import storage, tracking
from lape_ray.checkpoint import read_weights
from lape_ray.config import TrainConfig
from lape_ray.data.facts import SplitFacts, split_facts
from lape_ray.model import build_model, resolve
from lape_ray.model.convert import load_weights


def check_before_start(config: TrainConfig, *, storage_root: str, tracking_uri: str) -> None:
    """Data, model, initial weights, storage and tracking server: an OSError or ValueError says what is wrong."""
    with torch.device("meta"):
        build_model(config.model)
    check_data(config)
    if config.run.init_from is not None:
        weights, _ = read_weights(config.run.init_from)
        load_weights(build_model(config.model), weights, new_head=True)
    storage.check_writable(storage_root)
    tracking.check_reachable(tracking_uri)


def check_data(config: TrainConfig) -> None:
    """Both files are whole, agree with each other and with the model, and fill at least one step."""
    train, val = check_split(config, "train"), check_split(config, "val")
    if train.classes != val.classes:
        raise ValueError(
            f"{config.data.train} and {config.data.val} do not have the same classes; write both from the same source"
        )
    if train.num_samples < config.data.batch_size:
        raise ValueError(
            f"{config.data.train} holds {train.num_samples} images, less than one step of "
            f"data.batch_size={config.data.batch_size}; lower it"
        )


def check_split(config: TrainConfig, split: Literal["train", "val"]) -> SplitFacts:
    """One split is whole and fits the model's classes and image size."""
    facts, spec = split_facts(config.data, split), resolve(config.model)
    if len(facts.classes) != spec.num_classes:
        raise ValueError(
            f"{facts.path} has {len(facts.classes)} classes, the model {spec.num_classes}: "
            f"set --model.num_classes {len(facts.classes)}"
        )
    largest = facts.largest_side
    if largest is not None and largest < spec.image_size and not config.data.upscale:
        raise ValueError(
            f"{facts.path} has images of at most {largest} px, but the model reads {spec.image_size}: "
            f"set --model.image_size {largest}, or --data.upscale true to enlarge them"
        )
    return facts
