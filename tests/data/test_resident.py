"""Images that lie on the device: the native backend's pixels, draws and order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lape_ray.config import DataConfig, TrainConfig, replace_fields
from lape_ray.data.augment.crop import crop_and_resize
from lape_ray.data.beton import write_beton
from lape_ray.data.loader import build_loader
from lape_ray.data.native import random_resized_crops
from lape_ray.data.ready import augment_batches
from lape_ray.data.sources import Source, digits, open_source, select
from lape_ray.recipes import recipe
from lape_ray.training.state import build_state

FILTERS = {True: Image.Resampling.BICUBIC, False: Image.Resampling.BILINEAR}


@pytest.mark.parametrize("side", [32, 20, 48])
@pytest.mark.parametrize("cubic", [True, False])
def test_crops_are_pillows(side: int, cubic: bool) -> None:
    """Enlarged, shrunk (antialiased) and as they are; noise is the hardest image there is for a filter."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    sizes = np.full(64, 32)
    boxes = random_resized_crops(5, 0, np.arange(64), sizes, sizes, scale=(0.08, 1.0))
    boxes[0] = (0, 0, 32, 32)
    flips = rng.random(64) < 0.5
    ours = crop_and_resize(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        torch.from_numpy(boxes),
        torch.from_numpy(flips),
        torch.full((64,), cubic),
        side,
    )
    for image, (x, y, width, height), flip, our in zip(images, boxes, flips, ours, strict=True):
        crop = Image.fromarray(image).crop((x, y, x + width, y + height)).resize((side, side), FILTERS[cubic])
        theirs = np.array(crop)[:, ::-1] if flip else np.array(crop)
        assert np.array_equal(theirs.transpose(2, 0, 1), our.numpy())


def test_a_whole_image_comes_back_as_it_is() -> None:
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    box, flip = torch.tensor([[0, 0, 32, 32]]), torch.tensor([False])
    assert torch.equal(crop_and_resize(image, box, flip, torch.tensor([True]), 32), image)
    assert torch.equal(crop_and_resize(image, box, ~flip, torch.tensor([False]), 32), image.flip(3))


@pytest.fixture(scope="module")
def source(thumbnail_shards: Path) -> Source:
    return select(open_source(str(thumbnail_shards), "train"), "per-class:13")


@pytest.fixture(scope="module")
def data(source: Source, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("beton") / "x.beton"
    write_beton(source, path, workers=1)
    return DataConfig(train=str(path), val=str(path), interpolation="random")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("rank", [0, 2])
def test_batches_are_the_native_backends(data: DataConfig, split: str, rank: int) -> None:
    """Same images in the same order, cropped and flipped alike; also from the middle of an epoch."""
    batches = {}
    for backend in ("native", "resident"):
        loader = build_loader(
            dataclasses.replace(data, backend=backend), split, image_size=32, batch_size=7,
            micro_batches=4, rank=rank, world_size=3, seed=4,
        )  # type: ignore[arg-type]  # fmt: skip
        assert len(loader) == len(list(loader.epoch(3)))
        batches[backend] = list(loader.epoch(3, start=1))
    for (native, labels, epoch_index), (resident, same, alike) in zip(
        batches["native"], batches["resident"], strict=True
    ):
        assert torch.equal(labels, same)
        assert np.array_equal(epoch_index, alike)
        assert torch.equal(native, resident)


def test_validation_takes_images_of_any_size(photograph_folder: Path, tmp_path: Path) -> None:
    from lape_ray.data.sources import image_folder

    source = select(image_folder(photograph_folder), "per-class:1")
    write_beton(source, tmp_path / "x.beton", max_size=256, workers=2)
    data = DataConfig(train=str(tmp_path / "x.beton"), val=str(tmp_path / "x.beton"))
    resident = dataclasses.replace(data, backend="resident")
    sizes = {"image_size": 64, "batch_size": 50}
    ours = build_loader(resident, "val", **sizes)  # type: ignore[arg-type]
    theirs = build_loader(data, "val", **sizes)  # type: ignore[arg-type]
    for (a, *_), (b, *_) in zip(ours.epoch(0), theirs.epoch(0), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(
        ValueError, match=r"holds images of \d+x\d+, .*squares of one size: use data.backend=native"
    ):
        build_loader(resident, "train", **sizes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    path = tmp_path_factory.mktemp("digits") / "train.beton"
    write_beton(select(digits("train"), "per-class:16"), path, workers=1)
    return replace_fields(
        recipe("demo"),
        {"data.train": str(path), "data.val": str(path), "data.batch_size": 32, "data.erase_prob": 0.5,
         "data.rand_augment": "rand-m9-mstd0.5-inc1", "optim.accumulate": 2},
    )  # fmt: skip


@pytest.mark.parametrize("group_size", [3, 100])
def test_micro_batches_augmented_together_are_those_augmented_alone(
    small: TrainConfig, group_size: int
) -> None:
    state = build_state(small, torch.device("cpu"))
    loader, augment = state.train_loader.loader, state.train_loader.augment
    alone = list(state.train_loader.epoch(2, start=2))
    together = list(augment_batches(loader.epoch(2, start=2), augment, epoch=2, group_size=group_size))
    assert len(alone) == 18  # of 10 steps of two micro-batches
    for (images, labels, epoch_index), (same, as_well, alike) in zip(alone, together, strict=True):
        assert torch.equal(labels, as_well)
        assert np.array_equal(epoch_index, alike)
        torch.testing.assert_close(images, same, atol=0, rtol=0)
