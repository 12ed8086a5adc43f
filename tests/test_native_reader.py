"""The loader over our own decoder: exact evaluation, keyed draws, errors, threads; torchvision is the oracle."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lape_ray.config import DataConfig
from lape_ray.data.beton import Manifest, read_contents, write_beton
from lape_ray.data.loader import build_loader, train_keys
from lape_ray.data.sources import Source, image_folder

SIDE = 64


@pytest.fixture(scope="module")
def source(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("images")
    for folder in sorted((shared_dir / "data" / "imagenet-sample").iterdir())[:37]:
        (root / folder.name).symlink_to(folder)
    return image_folder(root)


@pytest.fixture(scope="module")
def data(source: Source, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("beton") / "x.beton"
    write_beton(source, path, mode="proportion", raw_share=0.3, max_size=400, workers=1)
    return DataConfig(train=str(path), val=str(path))


def epoch_of(
    data: DataConfig, split: str, epoch: int = 0, **kwargs: object
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    arguments = {"image_size": SIDE, "batch_size": 5, "threads": 2, "seed": 3, **kwargs}
    return list(build_loader(data, split, **arguments).epoch(epoch))  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3, 41])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_delivers_every_image_once(data: DataConfig, world_size: int, batch_size: int) -> None:
    whole = torch.cat([images for images, _ in epoch_of(data, "val", batch_size=37)])
    seen = []
    for rank in range(world_size):
        for images, labels in epoch_of(data, "val", rank=rank, world_size=world_size, batch_size=batch_size):
            torch.testing.assert_close(images, whole[labels])  # a class is one image here
            seen += labels.tolist()
    assert sorted(seen) == list(range(37))


def test_evaluation_is_torchvisions_resize_and_crop(data: DataConfig) -> None:
    """Bit for bit with Pillow, from the stored pixels."""
    transform = v2.Compose([v2.Resize(int(SIDE / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIDE)])
    contents, content = read_contents(data.val), Path(data.val).read_bytes()
    images = torch.cat([images for images, _ in epoch_of(data, "val")])
    for image, record, size in zip(images, contents.images_N, contents.lengths_N, strict=True):
        start = int(record["data_ptr"])
        stored = content[start : start + int(size)]
        if record["mode"] == 1:
            picture = Image.frombytes("RGB", (record["width"], record["height"]), stored)
        else:
            picture = Image.open(io.BytesIO(stored))
        expected = torch.from_numpy(np.array(transform(picture))).permute(2, 0, 1)
        torch.testing.assert_close(image, expected, atol=0, rtol=0)


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_pixels_depend_on_seed_epoch_and_position_alone(data: DataConfig, interpolation: str) -> None:
    data = dataclasses.replace(data, interpolation=interpolation)  # type: ignore[arg-type]
    reference = torch.cat([images for images, _ in epoch_of(data, "train", batch_size=12)])
    for threads, batch_size, world_size in ((1, 12, 1), (3, 4, 3), (2, 6, 2)):
        parts = [
            torch.cat([x for x, _ in epoch_of(data, "train", threads=threads, batch_size=batch_size,
                                              rank=rank, world_size=world_size)])
            for rank in range(world_size)
        ]  # fmt: skip
        merged = torch.stack(parts, dim=1).flatten(0, 1)
        torch.testing.assert_close(merged, reference, atol=0, rtol=0)
    for other in ({"epoch": 1}, {"seed": 4}):
        again = torch.cat([images for images, _ in epoch_of(data, "train", batch_size=12, **other)])
        assert (again != reference).float().mean() > 0.5


def test_the_filters_differ_and_random_uses_both(data: DataConfig) -> None:
    pixels = {
        name: torch.cat(
            [x for x, _ in epoch_of(dataclasses.replace(data, interpolation=name), "train", batch_size=36)]  # type: ignore[arg-type]
        )
        for name in ("bicubic", "bilinear", "random")
    }
    same = {name: (pixels["random"] == pixels[name]).flatten(1).all(1) for name in ("bicubic", "bilinear")}
    assert 5 < same["bicubic"].sum() < 31
    assert (same["bicubic"] | same["bilinear"]).all()


def test_repeats_are_neighbours_with_other_pixels(data: DataConfig) -> None:
    batches = epoch_of(dataclasses.replace(data, repeats=3), "train", batch_size=12)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(labels) == 36
    triples = labels.view(12, 3)
    assert (triples == triples[:, :1]).all()
    assert len(triples[:, 0].unique()) == 12
    assert (images[0::3] != images[1::3]).flatten(1).any(1).all()
    keys = train_keys(100, step_samples=30, seed=0, epoch=0, repeats=3)
    assert len(np.unique(keys)) == 90


def test_leaving_early_leaves_no_thread(data: DataConfig) -> None:
    loader = build_loader(data, "train", image_size=SIDE, batch_size=2, threads=2)
    next(iter(loader.epoch(0)))
    before = threading.active_count()
    for epoch in range(20):
        batches = loader.epoch(epoch)
        next(batches)
        batches.close()
    assert threading.active_count() <= before


@pytest.fixture
def damaged(data: DataConfig, tmp_path: Path) -> Iterator[DataConfig]:
    """The fourth image's bytes are zeros; the manifest's size still agrees."""
    path = tmp_path / "damaged.beton"
    content, contents = bytearray(Path(data.train).read_bytes()), read_contents(data.train)
    bad = np.flatnonzero(contents.images_N["mode"] == 0)[3]
    start, size = int(contents.images_N["data_ptr"][bad]), int(contents.lengths_N[bad])
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    Manifest.load(data.train).save(path)
    yield dataclasses.replace(data, train=str(path), val=str(path))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named_and_not_black(damaged: DataConfig, split: str) -> None:
    jpegs = np.flatnonzero(read_contents(damaged.train).images_N["mode"] == 0)
    with pytest.raises(
        ValueError, match=rf"1 of \d+ images cannot be read: .*damaged\.beton image {jpegs[3]}: "
    ):
        for epoch in range(20):  # training leaves one image of each epoch out
            epoch_of(damaged, split, epoch=epoch, batch_size=36)
