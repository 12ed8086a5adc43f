"""k-NN by features: against a reference that holds every similarity, for every family, and by names of classes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lape_ray.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lape_ray.data.batch import Batch
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import image_folder
from lape_ray.inference.knn import hits, knn_evaluation, nearest
from lape_ray.model import build_model

SMALL: dict[str, Any] = {"image_size": 32, "embed_dim": 32, "num_heads": 2, "num_classes": 7, "join": "lape"}
FAMILIES: dict[str, dict[str, Any]] = {
    "deit_tiny": {"depth": 2, "patch_size": 8},
    "deit_tiny_distilled": {"depth": 2, "patch_size": 8},
    "cct_7_3x1": {"depth": 2},
    "t2t_vit_7": {"depth": 2},
    "ceit_tiny": {"depth": 2},
    "swin_tiny": {"depths": (2, 1, 1, 1), "patch_size": 2, "window_size": 4},
}


@dataclass
class Images:
    """Batches of random images, all different."""

    number: int
    seed: int
    batch_size: int = 5

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        draws = torch.Generator().manual_seed(self.seed)
        images = torch.randn(self.number, 3, 32, 32, generator=draws)
        labels = torch.randint(7, (self.number,), generator=draws)
        for first in range(0, self.number, self.batch_size):
            part = slice(first, first + self.batch_size)
            yield Batch(images[part], labels[part], np.arange(self.number)[part])


def by_hand(bank: list[tuple[Tensor, int]], query: Tensor, number: int) -> list[int]:
    """Return the classes with votes, most first, computed one image at a time."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    near = sorted(((cosine(one, query), label) for one, label in bank), reverse=True)[:number]
    votes: dict[int, float] = defaultdict(float)
    for similarity, label in near:
        votes[label] += math.exp(similarity / 0.07)
    return sorted(votes, key=lambda label: -votes[label])


@pytest.mark.parametrize("variant", FAMILIES)
def test_votes_are_those_of_every_similarity(variant: str) -> None:
    torch.manual_seed(0)
    network = build_model(ModelConfig(variant=variant, **SMALL, **FAMILIES[variant])).eval()  # type: ignore[arg-type]
    train, val = Images(33, 1), Images(12, 2)
    similarity, labels, label_V = nearest(network, train, val, 20)
    assert similarity.shape == labels.shape == (12, 20)
    with torch.no_grad():
        bank, queries = (
            [
                (row.flatten().double(), int(label))
                for images, batch_labels, _ in split.epoch(0)
                for row, label in zip(network.features(images), batch_labels, strict=True)
            ]
            for split in (train, val)
        )
    for number in (1, 4, 20):
        ranked = [by_hand(bank, query, number) for query, _ in queries]
        found = hits(similarity[:, :number], labels[:, :number], label_V, 7)
        first = [order[0] == label for order, (_, label) in zip(ranked, queries, strict=True)]
        five = [label in order[:5] for order, (_, label) in zip(ranked, queries, strict=True)]
        assert found["images"] == 12
        assert found["acc1"] == pytest.approx(100 * sum(first) / 12)
        assert found["acc5"] == pytest.approx(100 * sum(five) / 12)


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_features_are_what_the_head_reads(variant: str) -> None:
    torch.manual_seed(0)
    network = build_model(ModelConfig(variant=variant, **SMALL, **FAMILIES[variant])).eval()  # type: ignore[arg-type]
    (images, _, _), *_ = Images(3, 0).epoch(0)
    read: list[Tensor] = []
    network.head.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    network(images)
    features = network.features(images)
    assert torch.equal(features if features.ndim == 2 else features[:, 0], read[0])
    assert features.shape == ((3, 2) if "distilled" in variant else (3,)) + read[0].shape[1:]


SHADES = {"hen": 20, "jay": 90, "kite": 160, "wren": 230}
MODEL = ModelConfig(embed_dim=32, depth=1, num_heads=2, image_size=16, patch_size=8, position="none")


def photographs(path: Path, birds: list[str], number: int) -> str:
    for bird in birds:
        (path / bird).mkdir(parents=True)
        for each in range(number):
            shade = (SHADES[bird] + each, 255 - SHADES[bird], 90)
            Image.new("RGB", (20, 18), shade).save(path / bird / f"{each}.png")
    write_beton(image_folder(path), path.with_suffix(".beton"), workers=1)
    return str(path.with_suffix(".beton"))


def test_the_job_says_each_number_and_goes_by_the_names_of_classes(tmp_path: Path) -> None:
    """The weights are a backbone's, without a head, and fresh: shades can be told apart by any of them."""
    torch.manual_seed(0)
    state = {name: value for name, value in build_model(MODEL).state_dict().items() if "head" not in name}
    save_file(state, tmp_path / "backbone.safetensors")
    train = photographs(tmp_path / "train", [*SHADES], 6)
    val = photographs(tmp_path / "val", ["wren", "jay"], 2)  # whose labels are 0 and 1, not 3 and 1
    base = TrainConfig(
        model=MODEL,
        data=DataConfig(train=train, val=val, upscale=True, eval_batch_size=5),
        run=RunConfig(device="cpu"),
    )
    overrides = {
        f"{section}.{name}": getattr(getattr(base, section), name)
        for section, names in {
            "model": ("embed_dim", "depth", "num_heads", "image_size", "patch_size", "position"),
            "data": ("train", "val", "upscale", "eval_batch_size"),
            "run": ("device",),
        }.items()
        for name in names
    }
    weights = str(tmp_path / "backbone.safetensors")
    text = knn_evaluation(weights, overrides=overrides, neighbours=(1, 5))
    assert [line.split("  (")[0] for line in text.splitlines()] == [
        f"{number} nearest neighbours: 4 images  top-1 100.000  top-5 100.000" for number in (1, 5)
    ]
    with pytest.raises(ValueError, match=r"train\.beton has 24 images, fewer than --knn 25"):
        knn_evaluation(weights, overrides=overrides, neighbours=(1, 25))
    with pytest.raises(
        ValueError, match=r"train\.beton has classes that .*val\.beton has not.* such as 'hen'"
    ):
        knn_evaluation(
            weights, overrides={**overrides, "data.train": val, "data.val": train}, neighbours=(1,)
        )
