"""Checks before any worker starts, so that bad input costs seconds and one clear line."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from lape_ray import storage
from lape_ray.config import TrainConfig, flatten, replace_fields
from lape_ray.data.split import SplitInfo, read_split_info
from lape_ray.model import build_model, resolve
from lape_ray.training.classes import checkpoint_classes, match_classes
from lape_ray.training.initial import load_initial
from lape_ray.training.loss import load_teacher

log = logging.getLogger(__name__)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Make paths absolute.

    Workers run in other directories, so that a relative path would mean another file there.

    Raises:
        ValueError: see `storage.absolute_store`.
    """
    flat = flatten(config)
    names = ("data.train", "data.val", "run.storage", "training.init_from", "tracking.tensorboard")
    paths = {name: storage.absolute(flat[name]) for name in names if flat[name]}
    if flat["tracking.uri"]:
        paths["tracking.uri"] = storage.absolute_store(flat["tracking.uri"])
    if flat["optim.teacher"]:
        kind, name, file = ["", "", *flat["optim.teacher"].split(":", 2)][
            -3:
        ]  # torchvision:NAME:FILE, or a path
        paths["optim.teacher"] = ":".join(filter(None, (kind, name, storage.absolute(file))))
    return replace_fields(config, paths)


def check_before_start(config: TrainConfig, *, storage_root: str) -> None:
    """Check data, model, initial weights and storage; an OSError or ValueError says what is wrong."""
    with torch.device("meta"):
        model = build_model(config.model)
    check_data(config)
    check_other_weights(config)
    storage.check_writable(storage_root)
    check_space(config, storage_root, sum(parameter.numel() for parameter in model.parameters()))


def check_other_weights(config: TrainConfig) -> None:
    """Check that the weights which the run starts from, and its teacher, fit its network and its classes."""
    source = config.optim.teacher
    if config.training.init_from is None and source is None:
        return
    train = read_split_info(config.data, "train")
    if config.training.init_from is not None:
        load_initial(build_model(config.model), config.training.init_from, config.data, train.classes)
    if source is not None:
        spec = resolve(config.model)
        sizes = {"num_classes": spec.num_classes, "image_size": spec.image_size}
        load_teacher(source, **sizes, classes=train.classes, data=config.data)
        known = None if source.startswith("torchvision:") else checkpoint_classes(source)
        _, note = match_classes(train.classes, known, of=f"the teacher {source}", path=train.path)
        if note:
            log.warning("%s", note)


def check_space(config: TrainConfig, storage_root: str, parameters: int) -> None:
    """Check that the storage has space for the checkpoints that are kept and two more.

    One of these two is being written and one is about to be deleted.
    """
    free = storage.free_bytes(storage_root)
    each = 4 * parameters * (4 if config.optim.ema_decay else 3)  # weights, their average, Adam's two moments
    need = each * (config.run.keep_checkpoints + 2)
    if free is not None and free < need:
        raise ValueError(
            f"storage {storage_root!r} has {free / 1e9:.1f} GB left, but {config.run.keep_checkpoints} checkpoints of "
            f"{each / 1e6:,.0f} MB, and two more while one is replaced, need {need / 1e9:.1f} GB: free space, choose "
            "another --run.storage, or lower --run.keep_checkpoints"
        )


def check_data(config: TrainConfig) -> None:
    """Check that both files are whole, agree with each other and with the model, and fill at least one step."""
    train, val = check_split(config, "train"), check_split(config, "val")
    if train.classes != val.classes:
        raise ValueError(
            f"{config.data.train} and {config.data.val} do not have the same classes; write both from the same source, "
            "and with the same --class-names"
        )
    if train.num_samples < config.data.batch_size:
        raise ValueError(
            f"{config.data.train} holds {train.num_samples} images, less than one step of "
            f"data.batch_size={config.data.batch_size}; lower it"
        )


def check_split(config: TrainConfig, split: Literal["train", "val"], *, subset: bool = False) -> SplitInfo:
    """Check that one split is whole and fits the model's classes and image size.

    Args:
        subset: whether the split may have fewer classes, which were found among the model's.
    """
    info, spec = read_split_info(config.data, split), resolve(config.model)
    if len(info.classes) != spec.num_classes and not subset:
        raise ValueError(
            f"{info.path} has {len(info.classes)} classes, the model {spec.num_classes}: "
            f"set --model.num_classes {len(info.classes)}"
        )
    largest = info.largest_side
    if largest is not None and largest < spec.image_size and not config.data.upscale:
        raise ValueError(
            f"{info.path} has images of at most {largest} px, but the model reads {spec.image_size}: "
            f"set --model.image_size {largest}, or --data.upscale true to enlarge them"
        )
    return info
