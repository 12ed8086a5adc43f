"""The backend on torchvision: the other decoders are measured by it, so it is measured by torchvision itself."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.photographs import link_first
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from lape_ray.config import Backend, DataConfig
from lape_ray.data import native
from lape_ray.data.beton import write_beton
from lape_ray.data.readers import READERS
from lape_ray.data.readers.native import NativeReader
from lape_ray.data.readers.reader import RandomCrop, ReaderOptions, build_crop
from lape_ray.data.readers.torchvision import Draw, TorchvisionReader, _draw_seed
from lape_ray.data.sources import Source, image_folder

SIDE = 64
IMAGES = 24
KEYS = np.arange(IMAGES)
DEFAULTS = DataConfig()


@pytest.fixture(scope="module")
def source(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return image_folder(link_first(photograph_folder, tmp_path_factory.mktemp("images"), IMAGES))


def options(split: str = "train", data: DataConfig = DEFAULTS, **changes: object) -> ReaderOptions:
    values = {
        "image_size": SIDE,
        "batch_size": 5,
        "threads": 2,
        "seed": 3,
        "device": torch.device("cpu"),
        **changes,
    }
    return ReaderOptions(crop=build_crop(data, split), **values)  # type: ignore[arg-type]


def random_crop(**values: object) -> RandomCrop:
    crop = build_crop(DataConfig(**values), "train")  # type: ignore[arg-type]
    assert isinstance(crop, RandomCrop)
    return crop


def reader_of(source: Source, split: str = "train", **changes: object) -> TorchvisionReader:
    return TorchvisionReader(source, options(split, **changes))


def pixels(reader: TorchvisionReader | NativeReader, epoch: int = 0, shift: int = 0) -> np.ndarray:
    return np.concatenate(list(reader.batches(KEYS, KEYS + shift, epoch)))


@pytest.fixture(scope="module")
def native_readers(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeReader]:
    path = str(tmp_path_factory.mktemp("beton") / "x.beton")
    write_beton(source, path, workers=1)  # keeps the original bytes; grey ones are pixels
    return {split: NativeReader(path, options(split, batch_size=7)) for split in ("train", "val")}


def test_evaluation_is_that_of_our_decoder(source: Source, native_readers: dict[str, NativeReader]) -> None:
    for interpolation, share in (("bicubic", 0.875), ("bilinear", 1.0), ("random", 0.5)):
        data = DataConfig(interpolation=interpolation, eval_crop=share)  # type: ignore[arg-type]
        ours = native_readers["val"]
        ours.options = options("val", data)
        np.testing.assert_array_equal(pixels(reader_of(source, "val", data=data)), pixels(ours))


def test_evaluation_is_torchvisions(source: Source) -> None:
    transform = v2.Compose([v2.Resize(int(SIDE / 0.875), InterpolationMode.BICUBIC), v2.CenterCrop(SIDE)])
    expected = [np.asarray(transform(source.read(i))) for i in range(IMAGES)]
    np.testing.assert_array_equal(pixels(reader_of(source, "val")), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_those_of_our_decoder(
    source: Source, native_readers: dict[str, NativeReader], interpolation: str
) -> None:
    """Given the same boxes and flips, bit for bit."""
    data = DataConfig(interpolation=interpolation)  # type: ignore[arg-type]

    class SameDraws(TorchvisionReader):
        def draw(self, crop: RandomCrop, image: Image.Image, epoch: int, epoch_index: int) -> Draw:
            place = np.array([epoch_index])
            sizes = (np.array([side]) for side in image.size)
            left, top, width, height = native.random_resized_crops(self.options.seed, epoch, place, *sizes)[
                0
            ].tolist()
            flip = bool(native.flips(self.options.seed, epoch, place)[0])
            return Draw(left, top, width, height, flip, InterpolationMode(interpolation))

    ours = native_readers["train"]
    ours.options = options("train", data)
    theirs = SameDraws(source, options("train", data))
    for epoch in range(3):
        np.testing.assert_array_equal(pixels(theirs, epoch), pixels(ours, epoch))
    own = pixels(reader_of(source, data=data))
    assert (own != pixels(ours)).mean() > 0.5  # its own draws are other ones


def test_a_draw_is_torchvisions(source: Source) -> None:
    """The same box as from the global generator in the same state, which is left as it was."""
    image, reader = source.read(0), reader_of(source)
    before = torch.get_rng_state()
    draw = reader.draw(random_crop(), image, 1, 7)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_draw_seed(3, 1, 7))
        crop = v2.RandomResizedCrop(SIDE).make_params([image])
    assert draw[:4] == (crop["left"], crop["top"], crop["width"], crop["height"])


def distance(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Between two distributions: the largest difference of their cumulative shares."""
    at = np.concatenate([a_N, b_N])
    shares = [np.searchsorted(np.sort(x_N), at, side="right") / len(x_N) for x_N in (a_N, b_N)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (900, 100), (32, 32)])
def test_boxes_are_distributed_as_those_of_our_decoder(source: Source, size: tuple[int, int]) -> None:
    """Left edge, top edge, area and ratio: Kolmogorov-Smirnov, at a level of 0.001 for each; the draws are fixed."""
    count = 4_000
    image, reader, epoch_index = Image.new("RGB", size), reader_of(source), np.arange(count)
    drawn = [reader.draw(random_crop(), image, 0, position) for position in range(count)]
    theirs = np.array([draw[:4] for draw in drawn])
    widths, heights = (np.full(count, side) for side in size)
    ours = native.random_resized_crops(5, 0, epoch_index, widths, heights)

    limit = 1.95 * np.sqrt(2 / count)

    def features(boxes: np.ndarray) -> list[np.ndarray]:
        left, top, width, height = boxes.T.astype(float)
        return [left / size[0], top / size[1], width * height / np.prod(size), width / height]

    for a, b in zip(features(theirs), features(ours), strict=True):
        assert distance(a, b) < limit
    narrower = native.random_resized_crops(5, 0, epoch_index, widths, heights, scale=(0.12, 1.0))
    assert (
        distance(features(theirs)[2], features(narrower)[2]) > 1.95 * np.sqrt(2 / count) or min(size) == 100
    )
    flips = np.mean([draw.flip for draw in drawn])
    assert abs(flips - 0.5) < 4 * 0.5 / np.sqrt(count)


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_pixels_depend_on_seed_epoch_and_index_alone(source: Source, interpolation: str) -> None:
    data = DataConfig(interpolation=interpolation)  # type: ignore[arg-type]
    reference = pixels(reader_of(source, data=data))
    for threads, batch_size in ((1, 24), (3, 1), (4, 7)):
        again = pixels(reader_of(source, data=data, threads=threads, batch_size=batch_size))
        np.testing.assert_array_equal(again, reference)
    reader = reader_of(source, data=data)
    half = np.concatenate(list(reader.batches(KEYS[1::2], KEYS[1::2], 0)))  # as the second of two ranks
    np.testing.assert_array_equal(half, reference[1::2])
    for other in (pixels(reader, 1), pixels(reader, shift=1), pixels(reader_of(source, data=data, seed=4))):
        assert (other != reference).mean() > 0.5


def test_global_draws_go_on_undisturbed_beside_a_pass(source: Source) -> None:
    torch.manual_seed(0)
    alone = [torch.rand(3) for _ in range(20)]
    torch.manual_seed(0)
    beside = []
    batches = reader_of(source, batch_size=2).batches(KEYS, KEYS, 0)
    for _ in range(10):
        beside += [torch.rand(3), torch.rand(3)]
        next(batches)
    batches.close()
    assert torch.equal(torch.stack(alone), torch.stack(beside))


def test_flip_and_filter_probabilities(source: Source) -> None:
    image = source.read(0)
    reader = reader_of(source)
    assert not any(reader.draw(random_crop(flip=0.0), image, 0, i).flip for i in range(50))
    assert all(reader.draw(random_crop(flip=1.0), image, 0, i).flip for i in range(50))
    both = random_crop(interpolation="random")
    cubic = [reader.draw(both, image, 0, i).interpolation == InterpolationMode.BICUBIC for i in range(400)]
    assert 140 < sum(cubic) < 260


def test_the_size_may_change_between_passes(source: Source) -> None:
    reader = reader_of(source, "val")
    assert pixels(reader).shape == (IMAGES, SIDE, SIDE, 3)
    reader.image_size = 32
    assert pixels(reader).shape == (IMAGES, 32, 32, 3)


def test_leaving_early_leaves_no_thread(source: Source) -> None:
    before = threading.active_count()
    for epoch in range(10):
        batches = reader_of(source, threads=3, batch_size=2).batches(KEYS, KEYS, epoch)
        next(batches)
        assert threading.active_count() > before
        batches.close()
        assert threading.active_count() == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_image_is_named(source: Source, tmp_path: Path, split: str) -> None:
    for i in range(6):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.jpg").write_bytes(b"" if i == 4 else source.encoded(i))
    before = threading.active_count()
    reader = reader_of(image_folder(tmp_path), split, batch_size=2)
    delivered = []
    with pytest.raises(ValueError, match=r"4/x\.jpg cannot be read"):
        for batch in reader.batches(np.arange(6), np.arange(6), 0):
            delivered.append(batch)
    assert len(delivered) == 2
    assert threading.active_count() == before


def test_every_backend_has_a_reader() -> None:
    assert set(READERS) == set(get_args(Backend))
