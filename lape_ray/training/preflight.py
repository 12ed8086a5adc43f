"""Checks before any worker starts, so that bad input costs seconds and one clear line."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

import torch

from lape_ray import storage
from lape_ray.config import TrainConfig, flatten, replace_fields
from lape_ray.data.installed import check_backend
from lape_ray.data.split import SplitInfo, read_split_info
from lape_ray.model import Network, build_model, resolve
from lape_ray.model.convert import load_weights
from lape_ray.model.plugin import dry_device
from lape_ray.training.classes import checkpoint_classes, match_classes
from lape_ray.training.initial import load_initial
from lape_ray.training.loss import check_loss, load_teacher, split_teacher
from lape_ray.training.state import image_sizes

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
        kind, file = split_teacher(flat["optim.teacher"])
        paths["optim.teacher"] = kind + storage.absolute(file)
    return replace_fields(config, paths)


def check_before_start(config: TrainConfig, *, storage_root: str) -> None:
    """Check data, model, initial weights and storage; an OSError or ValueError says what is wrong."""
    model = dry_network(config)
    check_backend(config.data.backend)
    check_loss(config)
    check_data(config)
    check_other_weights(config)
    storage.check_writable(storage_root)
    check_space(config, storage_root, sum(parameter.numel() for parameter in model.parameters()))


def dry_network(config: TrainConfig) -> Network:
    """Build the network without memory, at each size of its images in turn; returns the last.

    Raises:
        ValueError: it cannot be built, or does not take the weights of the size before.
    """
    network = None
    for side in image_sizes(config):
        try:
            before = network
            with torch.device(dry_device(config.model)):
                network = build_model(dataclasses.replace(config.model, image_size=side))
            if before is not None:
                load_weights(network, before.state_dict())
        except ValueError as error:
            where = f"data.image_size_schedule, {side} px: " if config.data.image_sizes else ""
            raise ValueError(f"{where}{error}") from None
    assert network is not None
    return network


def check_other_weights(config: TrainConfig) -> None:
    """Check that the weights which the run starts from, and its teacher, fit its network and its classes."""
    source = config.optim.teacher
    if config.optim.train == "head" and config.training.init_from is None:
        raise ValueError(
            "optim.train=head trains the classifier of a network that has learned something: give its checkpoint with "
            "--training.init_from, or set --optim.train all"
        )
    if config.training.init_from is None and source is None:
        return
    train = read_split_info(config.data, "train")
    if config.training.init_from is not None:
        load_initial(build_model(config.model), config.training.init_from, config.data, train.classes)
    if source is not None:
        spec = resolve(config.model)
        load_teacher(
            source,
            num_classes=spec.num_classes,
            image_sizes=image_sizes(config),
            classes=train.classes,
            data=config.data,
        )
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
    train, val = read_split_info(config.data, "train"), read_split_info(config.data, "val")
    if train.classes != val.classes:
        raise ValueError(
            f"{config.data.train} and {config.data.val} do not have the same classes"
            f"{_difference(train.classes, val.classes)}; "
            f"write the second again with --classes-of {config.data.train}, or both with the same --class-names"
        )
    for info in (train, val):  # after the above, which says more of classes than their number does
        _check_fits(config, info)
        _check_schedule_fits(config, info)
    if train.num_samples < config.data.batch_size:
        raise ValueError(
            f"{config.data.train} holds {train.num_samples} images, less than one step of "
            f"data.batch_size={config.data.batch_size}; lower it"
        )


def _difference(train: tuple[str, ...], val: tuple[str, ...]) -> str:
    only = sorted(set(train) ^ set(val))
    where = f"only in the {'first' if only and only[0] in train else 'second'}"
    return f": {only[0]!r} is {where}" if only else ", but the same in another order"


def check_split(config: TrainConfig, split: Literal["train", "val"], *, subset: bool = False) -> SplitInfo:
    """Check that one split is whole and fits the model's classes and image size.

    Args:
        subset: whether the split may have fewer classes, which were found among the model's.
    """
    check_backend(config.data.backend)
    info = read_split_info(config.data, split)
    _check_fits(config, info, subset=subset)
    return info


def _check_fits(config: TrainConfig, info: SplitInfo, *, subset: bool = False) -> None:
    spec = resolve(config.model)
    if len(info.classes) != spec.num_classes and not subset:
        raise ValueError(
            f"{info.path} has {len(info.classes)} classes, the model {spec.num_classes}: "
            f"set --model.num_classes {len(info.classes)}"
        )
    for what, count in info.source.left_out.items() if info.source else ():
        log.warning("%s: %s x %s is left out", info.path, f"{count:,}", what)
    largest = info.largest_side
    if largest is not None and largest < spec.image_size and not config.data.upscale:
        raise ValueError(
            f"{info.path} has images of at most {largest} px, but the model reads {spec.image_size}: "
            f"set --model.image_size {largest}, or --data.upscale true to enlarge them"
        )


def _check_schedule_fits(config: TrainConfig, info: SplitInfo) -> None:
    largest, side = info.largest_side, max(image_sizes(config))
    if largest is not None and largest < side and not config.data.upscale:
        raise ValueError(
            f"{info.path} has images of at most {largest} px, but data.image_size_schedule="
            f"{config.data.image_size_schedule} has {side} px: lower it, or set --data.upscale true to enlarge them"
        )
