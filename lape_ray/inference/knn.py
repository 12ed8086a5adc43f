"""k-NN classification by a network's features, which trains nothing: as DINO does (arXiv 2104.14294, eval_knn.py).

The similarity of two images is the cosine of their features, which the head reads after the last norm. The N nearest
training images vote for their classes with weights exp(similarity / 0.07).

Shapes: B images of a batch, V evaluated images, D width, N neighbours, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_ray.config import TrainConfig, replace_fields
from lape_ray.data.batch import Batches
from lape_ray.data.ready import Normalized
from lape_ray.data.split import SplitInfo
from lape_ray.inference.evaluate import by_name, choose_device, config_for, evaluation_loader, seen_as
from lape_ray.inference.predict import load_network
from lape_ray.model import Network
from lape_ray.storage import local
from lape_ray.training.classes import places_of
from lape_ray.training.preflight import check_split
from lape_ray.training.state import autocast_for

TEMPERATURE = 0.07


def knn_evaluation(
    checkpoint: str,
    *,
    overrides: Mapping[str, Any],
    neighbours: Sequence[int],
    recipe: str | None = None,
    ema: bool = False,
) -> str:
    """Evaluate the checkpoint at an address by the config of `config_for`, and say the results in a line each."""
    path = str(local(checkpoint))
    config = config_for(path, recipe, overrides)
    results = knn_accuracy(path, config, neighbours, ema=ema)
    line = "{images:.0f} images  top-1 {acc1:.3f}  top-5 {acc5:.3f}"
    return "\n".join(
        f"{number} nearest neighbours: {line.format(**result)}  ({seen_as(config)})"
        for number, result in results.items()
    )


def knn_accuracy(
    checkpoint: str, config: TrainConfig, neighbours: Sequence[int], *, ema: bool = False
) -> dict[int, dict[str, float]]:
    """Classify `data.val` by its nearest neighbours in `data.train`, each image of either as evaluation sees it.

    The classes are those of the data, whatever the checkpoint's are; its head is not used.

    Returns:
        for each number of neighbours `images`, `acc1` and `acc5` (percent).

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, or has too few images or other classes.
    """
    device = choose_device(config)
    train, val = check_split(config, "train", subset=True), check_split(config, "val", subset=True)
    if max(neighbours) > train.num_samples:
        raise ValueError(f"{train.path} has {train.num_samples} images, fewer than --knn {max(neighbours)}")
    places_K = _places(val, train)
    loaders = [_loader(config, info.path, device) for info in (train, val)]
    network = load_network(checkpoint, config, ema=ema, new_head=True).to(device).eval()
    autocast = autocast_for(config, device)
    similarity_VN, label_VN, label_V = nearest(
        network, loaders[0], by_name(loaders[1], places_K), max(neighbours), autocast=autocast
    )
    return {
        number: hits(similarity_VN[:, :number], label_VN[:, :number], label_V, len(train.classes))
        for number in neighbours
    }


def _places(val: SplitInfo, train: SplitInfo) -> list[int]:
    """Find the label in `train` of each class of `val`, by name."""
    places = places_of(val.classes, train.classes)
    if places is None:
        foreign = [name for name in val.classes if name not in train.classes] or list(val.classes)
        raise ValueError(
            f"{val.path} has classes that {train.path} has not, or not once, such as {foreign[0]!r}; write the first "
            f"again with --classes-of {train.path}"
        )
    return places


def _loader(config: TrainConfig, path: str, device: torch.device) -> Batches:
    config = replace_fields(config, {"data.val": path})
    return Normalized(evaluation_loader(config, device), config.data, device)


@torch.inference_mode()
def nearest(
    network: Network,
    train: Batches,
    val: Batches,
    number: int,
    *,
    autocast: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the training images that are most similar to each evaluated one, the nearest first.

    Returns similarities and labels (V, N), and the labels (V,) of the evaluated ones. The features of the training
    images go by and are not kept: memory holds those of the evaluated images (V, D), and V x (N + B) similarities.
    """
    parts = list(_features(network, val, autocast))
    features_VD, label_V = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    similarity_VN = features_VD.new_empty(len(label_V), 0)
    label_VN = label_V.new_empty(len(label_V), 0)
    for features_BD, label_B in _features(network, train, autocast):
        found = torch.cat((similarity_VN, features_VD @ features_BD.T), dim=1)
        labels = torch.cat((label_VN, label_B.expand(len(label_V), -1)), dim=1)
        similarity_VN, place_VN = found.topk(min(number, found.shape[1]), dim=1)
        label_VN = labels.gather(1, place_VN)
    return similarity_VN, label_VN, label_V


def _features(
    network: Network, loader: Batches, autocast: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the float32 features (B, D) of each batch, of length 1, and its labels (B,); two heads' are joined."""
    with contextlib.closing(loader.epoch(0)) as batches:
        for images_BCHW, labels_B, _ in batches:
            with autocast():
                features = network.features(images_BCHW)
            yield F.normalize(features.flatten(1).float(), dim=1), labels_B.to(features.device)


def hits(similarity_VN: Tensor, label_VN: Tensor, label_V: Tensor, num_classes: int) -> dict[str, float]:
    """Let the neighbours vote; a class without a vote is never among the best five."""
    votes_VK = similarity_VN.new_zeros(len(label_V), num_classes)
    votes_VK.scatter_add_(1, label_VN, (similarity_VN / TEMPERATURE).exp())
    most, place = votes_VK.topk(min(5, num_classes), dim=1)
    right = (place == label_V.unsqueeze(1)) & (most > 0)
    images = len(label_V)
    return {
        "images": float(images),
        "acc1": 100 * right[:, 0].sum().item() / images,
        "acc5": 100 * right.sum().item() / images,
    }
