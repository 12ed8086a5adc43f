"""The content of the files that a run learns from, which belongs to what the run is: their names alone do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from lape_ray.config import TrainConfig
from lape_ray.data.split import read_split_info
from lape_ray.storage import local
from lape_ray.training.checkpoint import weights_sha256
from lape_ray.training.loss import split_teacher

CLASSES = "names of classes"


def input_digests(config: TrainConfig) -> dict[str, str]:
    """Return the sha256 of each file that the run learns from, by its option, and of the names of its classes.

    A folder of images, which the torchvision backend reads, has none.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    train, val = read_split_info(config.data, "train"), read_split_info(config.data, "val")
    found = {"data.train": train.sha256, "data.val": val.sha256, CLASSES: classes_digest(train.classes)}
    if (path := config.training.init_from) is not None:
        found["training.init_from"] = weights_sha256(local(path))
    if (source := config.optim.teacher) is not None:
        found["optim.teacher"] = weights_sha256(local(split_teacher(source)[1]))
    return {name: digest for name, digest in found.items() if digest is not None}


def dataset_digests(config: TrainConfig, inputs: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return path and sha256 of the data of each split that has one, from what `input_digests` found."""
    paths = {"train": config.data.train, "val": config.data.val}
    return {
        split: (path, inputs[f"data.{split}"]) for split, path in paths.items() if f"data.{split}" in inputs
    }


def classes_digest(classes: Sequence[str]) -> str:
    """Return the sha256 of names of classes in their order."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()


def changed_inputs(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """List what is another file than before, or has other classes; what an older record does not know is let pass."""
    return [
        f"{name} had sha256 {old[name][:12]} and has {new[name][:12]}"
        for name in new
        if name in old and old[name] != new[name]
    ]
