"""The loader: which images, in which order, and that it neither hangs, leaks nor goes quiet."""

from __future__ import annotations

import dataclasses
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.installed import MISSING, needs_ffcv
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from lape_ray.config import DataConfig, TrainConfig
from lape_ray.data.beton import write_beton
from lape_ray.data.loader import Loader, build_loader
from lape_ray.data.sampler import train_epoch_index, train_keys
from lape_ray.data.sources import image_folder
from lape_ray.training.preflight import check_before_start, check_split

SIDE = 48  # of the delivered square
RAMPS, PHOTOGRAPHS = 140, 60
INDEX = 0xFFFFFFFF


@pytest.fixture(scope="module")
def data(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """60 photographs, one of each class, then 140 ramps (red grows to the right, green downwards) of one class."""
    root = tmp_path_factory.mktemp("data")
    for folder in sorted(photograph_folder.iterdir())[:PHOTOGRAPHS]:
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / folder.name).symlink_to(folder)
    (root / "images" / "ramps").mkdir()
    ramp = np.zeros((256, 256, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256), np.arange(256)[:, None]
    for i in range(RAMPS):
        Image.fromarray(ramp).save(root / "images" / "ramps" / f"{i:03}.png", compress_level=1)
    path = root / "x.beton"
    write_beton(image_folder(root / "images"), path, mode="proportion", raw_share=0.5, workers=1)
    return DataConfig(train=str(path), val=str(path), backend="ffcv")


@pytest.fixture(scope="module")
def ffcv() -> None:
    if MISSING:
        pytest.skip(f"needs {MISSING}: the extra lape_ray[ffcv]")


@pytest.fixture(scope="module")
def val(data: DataConfig, ffcv: None) -> Loader:
    return build_loader(data, "val", image_size=SIDE, batch_size=64, threads=2)


@pytest.fixture(scope="module")
def train(data: DataConfig, ffcv: None) -> Loader:
    return build_loader(data, "train", image_size=SIDE, batch_size=20, seed=5, threads=2)


def of_rank(loader: Loader, rank: int, world_size: int, batch_size: int) -> Loader:
    """Another rank's loader over the same compiled reader (compiling takes seconds)."""
    loader.reader.batch_size = batch_size
    return Loader(loader.reader, loader.info, split=loader.split, rank=rank, world_size=world_size,
                  seed=loader.seed, device=loader.device)  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_delivers_every_image_once(val: Loader, world_size: int, batch_size: int) -> None:
    labels, images = [], []
    for rank in range(world_size):
        loader = of_rank(val, rank, world_size, batch_size)
        batches = list(loader.epoch(0))
        assert len(loader) == len(batches)
        assert all(len(b) == batch_size for _, b, _ in batches[:-1])
        labels += [label for _, batch, _ in batches for label in batch.tolist()]
        images += [image for batch, *_ in batches for image in batch]
    expected_images, expected_labels = (
        torch.cat(x) for x in list(zip(*of_rank(val, 0, 1, 200).epoch(0), strict=True))[:2]
    )
    order = np.concatenate([np.arange(200)[rank::world_size] for rank in range(world_size)])
    assert loader.num_samples == 200
    assert labels == expected_labels[order].tolist()
    assert torch.equal(torch.stack(images), expected_images[order])
    assert sorted(labels) == sorted([*range(PHOTOGRAPHS), *[PHOTOGRAPHS] * RAMPS])


def test_more_ranks_than_images(val: Loader) -> None:
    delivered = [
        sum(len(labels) for _, labels, _ in of_rank(val, rank, 300, 64).epoch(0))
        for rank in (0, 199, 200, 299)
    ]
    assert delivered == [1, 1, 0, 0]
    assert len(of_rank(val, 250, 300, 64)) == 0


def test_evaluation_is_stock_ffcvs(val: Loader, data: DataConfig) -> None:
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader as StockLoader
    from ffcv.loader import OrderOption

    threads = torch.get_num_threads()
    stock = StockLoader(data.val, batch_size=50, num_workers=1, os_cache=False, order=OrderOption.SEQUENTIAL,
                        pipelines={"image": [CenterCropRGBImageDecoder((SIDE, SIDE), 0.875)]})  # fmt: skip
    for (ours, our_labels, _), (theirs, labels) in zip(of_rank(val, 0, 1, 50).epoch(0), stock, strict=True):
        assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), theirs)
        assert torch.equal(our_labels, labels[:, 0])
    torch.set_num_threads(threads)


def test_batches_are_channels_last_bytes(val: Loader) -> None:
    images_BCHW, labels_B, epoch_index_B = next(val.epoch(0))
    assert (images_BCHW.dtype, labels_B.dtype) == (torch.uint8, torch.int64)
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert images_BCHW.shape[1:] == (3, SIDE, SIDE)
    assert (epoch_index_B.dtype, epoch_index_B.shape) == (np.int64, labels_B.shape)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
def test_every_world_size_trains_on_the_same_micro_batches(world_size: int) -> None:
    """Steps of 8 micro-batches of 5 images: rank r of R has micro-batches r, r + R, ... of every step."""
    size = 1000 // 40 * 40
    parts = [
        train_epoch_index(size, batch_size=5, micro_batches=8, rank=rank, world_size=world_size).reshape(
            25, -1, 5
        )
        for rank in range(world_size)
    ]
    for step in range(25):
        for rank, part in enumerate(parts):
            for micro, epoch_index in zip(range(rank, 8, world_size), part[step], strict=True):
                assert epoch_index.tolist() == [40 * step + micro + 8 * image for image in range(5)]
    assert sorted(np.concatenate([part.ravel() for part in parts])) == list(range(size))
    with pytest.raises(ValueError, match="rank=8 of 9 has no part in the 8 micro-batches of a step"):
        train_epoch_index(size, batch_size=5, micro_batches=8, rank=8, world_size=9)


def test_train_order_depends_on_seed_and_epoch_alone() -> None:
    keys_N = train_keys(1000, step_samples=7, seed=3, epoch=4)
    assert np.array_equal(keys_N, train_keys(1000, step_samples=7, seed=3, epoch=4))
    for seed, epoch in ((3, 5), (4, 4), (0, 4), (3, 0)):
        assert not np.array_equal(keys_N, train_keys(1000, step_samples=7, seed=seed, epoch=epoch))
    # What is left over differs, so that every image is seen.
    seen = np.unique(
        np.concatenate([train_keys(1000, step_samples=300, seed=0, epoch=e) & INDEX for e in range(6)])
    )
    assert len(seen) == 1000
    assert keys_N.min() >= 0
    assert (keys_N & INDEX).max() < 1000


def pixels(loader: Loader, epoch: int = 0) -> torch.Tensor:
    return torch.cat([images for images, *_ in loader.epoch(epoch)])


def test_training_repeats_itself_to_the_pixel(train: Loader) -> None:
    first = pixels(of_rank(train, 0, 1, 20), 1)
    assert len(first) == 200
    assert torch.equal(first, pixels(of_rank(train, 0, 1, 20), 1))
    assert not torch.equal(first, pixels(of_rank(train, 0, 1, 20), 2))
    assert torch.equal(first, pixels(of_rank(train, 0, 1, 40), 1))
    halves = [pixels(of_rank(train, rank, 2, 10), 1) for rank in (0, 1)]
    assert torch.equal(first, torch.stack(halves, dim=1).flatten(0, 1))


def test_threads_do_not_change_pixels(train: Loader, data: DataConfig) -> None:
    single = build_loader(data, "train", image_size=SIDE, batch_size=20, seed=5, threads=1)
    assert torch.equal(pixels(single, 3), pixels(of_rank(train, 0, 1, 20), 3))


def test_labels_belong_to_their_images(train: Loader) -> None:
    for images_BCHW, labels_B, _ in of_rank(train, 0, 1, 20).epoch(0):
        is_ramp_B = images_BCHW[:, 2].amax(dim=(1, 2)) < 12  # ramps have no blue, but for JPEG's rounding
        assert torch.equal(is_ramp_B, labels_B == PHOTOGRAPHS)


def test_crops_and_flips_are_torchvisions(train: Loader) -> None:
    """Ramps tell where their crop lay; the shares and ratios are compared with torchvision's over 2,800 draws."""
    areas, ratios, flips = [], [], []
    for epoch in range(20):
        for images_BCHW, labels_B, _ in of_rank(train, 0, 1, 20).epoch(epoch):
            ramps_BCHW = images_BCHW[labels_B == PHOTOGRAPHS].float()
            # Corners of the crop, from the mean slope of each ramp.
            red, green = ramps_BCHW[:, 0].mean(dim=1), ramps_BCHW[:, 1].mean(dim=2)
            width = (red[:, -1] - red[:, 0]) * SIDE / (SIDE - 1)
            height = (green[:, -1] - green[:, 0]) * SIDE / (SIDE - 1)
            areas.append((width.abs() * height / 256**2).clamp(max=1))
            ratios.append((width.abs() / height).log())
            flips.append((width < 0).float())
    area, ratio, flip = torch.cat(areas), torch.cat(ratios), torch.cat(flips)
    torch.manual_seed(0)
    image = torch.zeros(1, 256, 256)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(len(area))]
    their_area = torch.tensor([h * w / 256**2 for _, _, h, w in theirs])
    their_ratio = torch.tensor([w / h for _, _, h, w in theirs]).log()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(area.quantile(quantiles), their_area.quantile(quantiles), atol=0.04, rtol=0)
    torch.testing.assert_close(ratio.quantile(quantiles), their_ratio.quantile(quantiles), atol=0.04, rtol=0)
    assert flip.mean().item() == pytest.approx(0.5, abs=0.05)


@needs_ffcv
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_probability(flip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's code, run by Python instead of the compiler, on one raw ramp."""
    from ffcv.pipeline.compiler import Compiler

    from lape_ray.data.readers import ffcv

    monkeypatch.setattr(Compiler, "is_enabled", False)
    monkeypatch.setattr(Compiler, "num_threads", 1)
    decoder = ffcv.random_crop(8, (0.5, 1.0), (1.0, 1.0), flip)
    ramp = np.ascontiguousarray(np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3)))
    decoder.accept_globals(None, lambda address, storage: ramp.reshape(-1))
    record = {"mode": 1, "height": 64, "width": 64, "data_ptr": 0}
    out_BSSC = np.zeros((5, 8, 8, 3), np.uint8)
    decoder.generate_code()(np.arange(5, dtype=np.int64) << 32, out_BSSC, [record], None)
    rises = out_BSSC[:, 0, -1, 0] > out_BSSC[:, 0, 0, 0]
    assert rises.tolist() == [flip == 0] * 5


def test_batches_may_be_kept(train: Loader) -> None:
    kept, copies = [], []
    for images_BCHW, *_ in of_rank(train, 0, 1, 5).epoch(0):  # many more batches than buffers
        kept.append(images_BCHW)
        copies.append(images_BCHW.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_early_break_ends_the_thread(train: Loader) -> None:
    before = threading.active_count()
    for epoch in range(5):
        for _ in of_rank(train, 0, 1, 5).epoch(epoch):
            break
        batches = of_rank(train, 0, 1, 5).epoch(epoch)
        for _ in range(3):
            next(batches)
        assert threading.active_count() == before + 1
        batches.close()
        assert threading.active_count() == before
    with pytest.raises(KeyError):
        for _ in of_rank(train, 0, 1, 5).epoch(0):
            raise KeyError
    assert threading.active_count() == before


def test_error_in_the_thread_reaches_the_caller(train: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    from lape_ray.data.readers.ffcv import BatchIterator

    run_pipeline = BatchIterator.run_pipeline

    def fail_third(self: BatchIterator, number: int, *arguments: Any) -> Any:
        if number == 2:
            raise RuntimeError("the disk is gone")
        return run_pipeline(self, number, *arguments)

    monkeypatch.setattr(BatchIterator, "run_pipeline", fail_third)
    before, delivered = threading.active_count(), 0
    with pytest.raises(RuntimeError, match="the disk is gone"):
        for _ in of_rank(train, 0, 1, 20).epoch(0):
            delivered += 1
    assert delivered == 2
    assert threading.active_count() == before


@needs_ffcv
def test_torch_keeps_its_threads(data: DataConfig) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    loader = build_loader(data, "val", image_size=SIDE, batch_size=200, threads=1)
    next(loader.epoch(0))
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


@needs_ffcv
def test_threads_are_clamped_to_what_numba_allows(data: DataConfig) -> None:
    import numba

    loader = build_loader(data, "val", image_size=SIDE, batch_size=200, threads=10_000)
    assert loader.reader.num_workers == numba.config.NUMBA_NUM_THREADS


@needs_ffcv
def test_bad_arguments(data: DataConfig, tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size": SIDE, "batch_size": 20}
    with pytest.raises(ValueError, match=r"data\.train is empty; give --data\.train FILE\.beton"):
        build_loader(DataConfig(), "train", **options)
    with pytest.raises(FileNotFoundError, match=r"absent\.beton is missing"):
        build_loader(DataConfig(val=str(tmp_path / "absent.beton")), "val", **options)
    with pytest.raises(ValueError, match="200 images, fewer than the 240 of one optimizer step"):
        build_loader(data, "train", world_size=4, micro_batches=12, **options)
    with pytest.raises(ValueError, match="rank=2 is not from 0 to world_size - 1 = 1"):
        build_loader(data, "val", rank=2, world_size=2, **options)
    cut = tmp_path / "cut.beton"
    cut.write_bytes(Path(data.train).read_bytes()[:-1])
    Path(f"{cut}.json").write_bytes(Path(f"{data.train}.json").read_bytes())
    with pytest.raises(ValueError, match=r"cut\.beton has .* bytes but its manifest says"):
        build_loader(dataclasses.replace(data, train=str(cut)), "train", **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_batches_survive_a_host_that_runs_ahead(train: Loader) -> None:
    """Every copy is queued behind long work, so a buffer reused too early would show."""
    expected = [images for images, *_ in of_rank(train, 0, 1, 5).epoch(0)]
    loader = of_rank(train, 0, 1, 5)
    loader.device = torch.device("cuda")
    square = torch.randn(4096, 4096, device="cuda")
    delivered = []
    for images_BCHW, *_ in loader.epoch(0):
        delivered.append(images_BCHW)
        for _ in range(20):
            square = torch.tanh(square @ square)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(delivered, expected, strict=True))


@needs_ffcv
@pytest.mark.parametrize("name", ["ffcv", "distutils"])
def test_where_ffcv_is_not_installed_a_run_does_not_begin(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = TrainConfig(data=data)
    said = (
        rf"needs {name}, which this Python does not have: install .*lape_ray\[ffcv\].*; or choose .* native"
    )
    with pytest.raises(ValueError, match=said):
        check_before_start(config, storage_root=str(tmp_path))
    with pytest.raises(ValueError, match=said):
        check_split(config, "val")
    with pytest.raises(ValueError, match=said):
        build_loader(data, "val", image_size=SIDE, batch_size=64, threads=2)
    native = dataclasses.replace(data, backend="native")
    assert build_loader(native, "val", image_size=SIDE, batch_size=64, threads=2).num_samples == 200
