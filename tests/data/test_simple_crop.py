"""The crop `simple` of every backend beside torchvision's own transforms, which DeiT III's code composes it of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.photographs import link_first
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from lape_ray.config import DataConfig
from lape_ray.data.beton import write_beton
from lape_ray.data.loader import build_loader
from lape_ray.data.native import flips
from lape_ray.data.readers.native import NativeReader
from lape_ray.data.readers.reader import ReaderOptions, SimpleCrop, build_crop
from lape_ray.data.readers.simple import PADDING, draw_squares, shift_reflected
from lape_ray.data.readers.torchvision import TorchvisionReader
from lape_ray.data.sources import Source, image_folder, open_source, select

SIDE, IMAGES, SEED = 48, 16, 3
KEYS = np.arange(IMAGES)
SIMPLE = DataConfig(crop="simple")


@pytest.fixture(scope="module")
def source(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return image_folder(link_first(photograph_folder, tmp_path_factory.mktemp("images"), IMAGES))


@pytest.fixture(scope="module")
def file(source: Source, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("beton") / "x.beton")
    write_beton(source, path, workers=1)  # keeps the original bytes
    return path


def options(data: DataConfig = SIMPLE, batch_size: int = 5) -> ReaderOptions:
    return ReaderOptions(
        crop=build_crop(data, "train"), image_size=SIDE, batch_size=batch_size, threads=2, seed=SEED,
        device=torch.device("cpu"),
    )  # fmt: skip


def composed(image: Image.Image, left: int, top: int, flip: bool, filter_: InterpolationMode) -> np.ndarray:
    """Compute Resize(SIDE), RandomCrop(SIDE, padding=4, padding_mode="reflect") and the flip, for what was drawn."""
    image = v2.Resize(SIDE, filter_)(image)
    image = functional.pad(image, [PADDING] * 4, padding_mode="reflect")
    image = functional.crop(image, top + PADDING, left + PADDING, SIDE, SIDE)
    return np.asarray(functional.horizontal_flip(image) if flip else image)


def corners(source: Source, epoch: int) -> np.ndarray:
    """Return where the squares of the native draws begin in the resized images (N, 2), from -PADDING on."""
    sizes = np.array([source.read(index).size for index in KEYS])
    boxes, shifts = draw_squares(SEED, epoch, KEYS, *sizes.T, SIDE)
    resized = SIDE * sizes // sizes.min(1, keepdims=True)
    return np.rint(boxes[:, :2] * resized / sizes).astype(int) + shifts


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_native_crops_are_torchvisions(source: Source, file: str, interpolation: str) -> None:
    reader = NativeReader(file, options(replace(SIMPLE, interpolation=interpolation)))  # type: ignore[arg-type]
    beyond = 0
    for epoch in range(3):
        places, mirrored = corners(source, epoch), flips(SEED, epoch, KEYS)
        ours = np.concatenate(list(reader.batches(KEYS, KEYS, epoch)))
        for index, ((left, top), flip) in enumerate(zip(places.tolist(), mirrored.tolist(), strict=True)):
            wanted = composed(source.read(index), left, top, flip, InterpolationMode(interpolation))
            np.testing.assert_array_equal(ours[index], wanted)
            beyond += min(left, top) < 0
    assert beyond > IMAGES  # of 48, most squares begin left of an image or above it, or both


def test_the_torchvision_backend_is_torchvisions(source: Source) -> None:
    reader = TorchvisionReader(source, options(replace(SIMPLE, interpolation="random")))
    crop = reader.options.crop
    assert isinstance(crop, SimpleCrop)
    ours = np.concatenate(list(reader.batches(KEYS, KEYS + 100, 1)))
    filters = set()
    for index in KEYS.tolist():
        image = source.read(index)
        draw = reader.draw_square(crop, image, 1, index + 100, SIDE)
        wanted = composed(image, draw.left, draw.top, draw.flip, draw.interpolation)
        np.testing.assert_array_equal(ours[index], wanted)
        filters.add(draw.interpolation)
    assert len(filters) == 2


def test_resident_crops_are_the_native_backends(thumbnail_shards: Path, tmp_path: Path) -> None:
    """Images as they are, enlarged and shrunk; from the middle of an epoch, of any rank."""
    path = str(tmp_path / "x.beton")
    write_beton(select(open_source(str(thumbnail_shards), "train"), "per-class:13"), path, workers=1)
    data = DataConfig(train=path, val=path, crop="simple", interpolation="random")
    for side in (32, 40, 20):
        found = []
        for backend in ("native", "resident"):
            loader = build_loader(
                replace(data, backend=backend), "train", image_size=side, batch_size=7, micro_batches=4,
                rank=1, world_size=3, seed=4,
            )  # type: ignore[arg-type]  # fmt: skip
            found.append([images for images, *_ in loader.epoch(2, start=1)])
        assert len(found[0]) > 1
        for native, resident in zip(*found, strict=True):
            assert torch.equal(native, resident)


@pytest.mark.parametrize("backend", ["native", "torchvision"])
def test_pixels_depend_on_seed_epoch_and_index_alone(source: Source, file: str, backend: str) -> None:
    make = {"native": lambda size: NativeReader(file, options(batch_size=size)),
            "torchvision": lambda size: TorchvisionReader(source, options(batch_size=size))}[backend]  # fmt: skip
    whole = np.concatenate(list(make(16).batches(KEYS, KEYS, 0)))
    half = np.concatenate(list(make(3).batches(KEYS[1::2], KEYS[1::2], 0)))  # as the second of two ranks
    np.testing.assert_array_equal(half, whole[1::2])
    for other in (make(16).batches(KEYS, KEYS, 1), make(16).batches(KEYS, KEYS + 16, 0)):
        assert (np.concatenate(list(other)) != whole).mean() > 0.5


def test_every_place_is_as_likely() -> None:
    """The short side has 9 places, the long one of 96 pixels 57: all are drawn, each about as often."""
    count = 20_000
    sizes = (np.full(count, side) for side in (200, 100))
    boxes, shifts = draw_squares(SEED, 0, np.arange(count), *sizes, SIDE)
    for axis, (scale, places) in enumerate(((96 / 200, 57), (48 / 100, 9))):
        found = np.rint(boxes[:, axis] * scale).astype(int) + shifts[:, axis]
        times = np.bincount(found + PADDING, minlength=places)
        assert len(times) == places
        deviation = ((times - count / places) ** 2 / (count / places)).sum()  # chi-squared
        assert deviation < places - 1 + 4 * (2 * (places - 1)) ** 0.5


def test_a_moved_square_is_cut_from_the_reflection() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (81, 12, 12, 3), dtype=np.uint8)
    shifts = np.stack(np.meshgrid(np.arange(-4, 5), np.arange(-4, 5)), -1).reshape(-1, 2)
    wanted = [
        np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")[
            4 + down : 16 + down, 4 + across : 16 + across
        ]
        for image, (across, down) in zip(images, shifts.tolist(), strict=True)
    ]
    shift_reflected(images, shifts)
    np.testing.assert_array_equal(images, wanted)


def test_a_strip_takes_no_memory_of_its_resized_whole(source: Source) -> None:
    reader = TorchvisionReader(source, options())
    crop, strip = reader.options.crop, Image.new("RGB", (1, 60_000), (10, 20, 30))
    assert isinstance(crop, SimpleCrop)
    from lape_ray.data.readers.torchvision import simple_crop

    square = simple_crop(strip, reader.draw_square(crop, strip, 0, 0, SIDE), SIDE)
    assert square.size == (SIDE, SIDE) and square.getcolors() == [(SIDE * SIDE, (10, 20, 30))]


def test_ffcv_refuses_it() -> None:
    with pytest.raises(ValueError, match="crop=simple is not made by backend=ffcv; choose native, resident"):
        DataConfig(crop="simple", backend="ffcv")
