"""The loader over our own decoder: exact evaluation, keyed draws, errors, threads; torchvision is the oracle."""

from __future__ import annotations

import dataclasses
import io
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.installed import needs_ffcv
from PIL import Image
from torchvision.transforms import v2

from lape_ray.config import DataConfig
from lape_ray.data.batch import Batch
from lape_ray.data.beton import Manifest, read_contents, write_beton
from lape_ray.data.beton.format import HEADER, RECORD, RECORDS_START, read_tables, tables_sha256
from lape_ray.data.loader import build_loader
from lape_ray.data.readers.ahead import read_ahead
from lape_ray.data.readers.buffers import Buffers
from lape_ray.data.sampler import train_keys
from lape_ray.data.sources import Source, image_folder

SIDE = 64


@pytest.fixture(scope="module")
def source(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("images")
    for folder in sorted(photograph_folder.iterdir())[:37]:
        (root / folder.name).symlink_to(folder)
    return image_folder(root)


@pytest.fixture(scope="module")
def data(source: Source, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("beton") / "x.beton"
    write_beton(source, path, mode="proportion", raw_share=0.3, max_size=400, workers=1)
    return DataConfig(train=str(path), val=str(path))


def epoch_of(data: DataConfig, split: str, epoch: int = 0, **kwargs: object) -> list[Batch]:
    arguments = {"image_size": SIDE, "batch_size": 5, "threads": 2, "seed": 3, **kwargs}
    return list(build_loader(data, split, **arguments).epoch(epoch))  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3, 41])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_delivers_every_image_once(data: DataConfig, world_size: int, batch_size: int) -> None:
    whole = torch.cat([images for images, *_ in epoch_of(data, "val", batch_size=37)])
    seen = []
    for rank in range(world_size):
        for images, labels, _ in epoch_of(
            data, "val", rank=rank, world_size=world_size, batch_size=batch_size
        ):
            torch.testing.assert_close(images, whole[labels])  # a class is one image here
            seen += labels.tolist()
    assert sorted(seen) == list(range(37))


def test_evaluation_is_torchvisions_resize_and_crop(data: DataConfig) -> None:
    """Bit for bit with Pillow, from the stored pixels."""
    transform = v2.Compose([v2.Resize(int(SIDE / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIDE)])
    contents, content = read_contents(data.val), Path(data.val).read_bytes()
    images = torch.cat([images for images, *_ in epoch_of(data, "val")])
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
def test_pixels_depend_on_seed_epoch_and_index_alone(data: DataConfig, interpolation: str) -> None:
    data = dataclasses.replace(data, interpolation=interpolation)  # type: ignore[arg-type]
    reference = torch.cat([images for images, *_ in epoch_of(data, "train", batch_size=12)])
    for threads, batch_size, world_size in ((1, 12, 1), (3, 4, 3), (2, 6, 2)):
        parts = [
            torch.cat([x for x, *_ in epoch_of(data, "train", threads=threads, batch_size=batch_size,
                                              rank=rank, world_size=world_size)])
            for rank in range(world_size)
        ]  # fmt: skip
        merged = torch.stack(parts, dim=1).flatten(0, 1)
        torch.testing.assert_close(merged, reference, atol=0, rtol=0)
    for other in ({"epoch": 1}, {"seed": 4}):
        again = torch.cat([images for images, *_ in epoch_of(data, "train", batch_size=12, **other)])
        assert (again != reference).float().mean() > 0.5


def test_the_filters_differ_and_random_uses_both(data: DataConfig) -> None:
    pixels = {
        name: torch.cat(
            [x for x, *_ in epoch_of(dataclasses.replace(data, interpolation=name), "train", batch_size=36)]  # type: ignore[arg-type]
        )
        for name in ("bicubic", "bilinear", "random")
    }
    same = {name: (pixels["random"] == pixels[name]).flatten(1).all(1) for name in ("bicubic", "bilinear")}
    assert 5 < same["bicubic"].sum() < 31
    assert (same["bicubic"] | same["bilinear"]).all()


def test_repeats_are_neighbours_with_other_pixels(data: DataConfig) -> None:
    batches = epoch_of(dataclasses.replace(data, repeats=3), "train", batch_size=12)
    images, labels = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:2])
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


def test_an_epoch_can_begin_in_its_middle(data: DataConfig) -> None:
    """As a resumed run needs it, in another loader: the rest is what it would have been."""
    for split, world_size in (("train", 1), ("train", 2), ("val", 2)):
        options = {"rank": world_size - 1, "world_size": world_size, "batch_size": 4}
        whole = epoch_of(data, split, epoch=2, **options)
        for start in range(len(whole) + 1):
            loader = build_loader(data, split, image_size=SIDE, threads=1, seed=3, **options)  # type: ignore[arg-type]
            rest = list(loader.epoch(2, start=start))
            assert len(rest) == len(whole) - start
            for (images, labels, epoch_index), (expected, right, own) in zip(
                rest, whole[start:], strict=True
            ):
                torch.testing.assert_close(images, expected, atol=0, rtol=0)
                assert torch.equal(labels, right)
                assert np.array_equal(epoch_index, own)
    with pytest.raises(ValueError, match="start=-1 must be from 0 to the 5 batches"):
        next(loader.epoch(0, start=-1))


def test_a_batch_knows_its_places(data: DataConfig) -> None:
    """Of two steps of four micro-batches, the second rank has every other one; also from the middle of an epoch."""
    loader = build_loader(
        data, "train", image_size=SIDE, batch_size=4, micro_batches=4, rank=1, world_size=2, threads=1
    )
    for start in (0, 1):
        for number, batch in enumerate(loader.epoch(0, start=start), start):
            step, micro = number // 2, 1 + 2 * (number % 2)
            assert batch.epoch_index.tolist() == [(4 * step + image) * 4 + micro for image in range(4)]
        assert number == 3


def test_resolution_changes_between_epochs(data: DataConfig) -> None:
    loader = build_loader(data, "train", image_size=SIDE, batch_size=12, threads=2, seed=3)
    for size in (32, 96, 64):
        loader.resize(size)
        images = torch.cat([images for images, *_ in loader.epoch(0)])
        expected = epoch_of(data, "train", batch_size=12, image_size=size)
        torch.testing.assert_close(images, torch.cat([images for images, *_ in expected]), atol=0, rtol=0)


def test_shards_deliver_what_one_file_does(data: DataConfig, source: Source, tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    write_beton(source, path, mode="proportion", raw_share=0, max_size=400, shards=3, workers=1)
    write_beton(source, tmp_path / "one.beton", mode="proportion", raw_share=0, max_size=400, workers=1)
    pixels = [
        torch.cat([images for images, *_ in epoch_of(DataConfig(train=str(file)), "train", batch_size=12)])
        for file in (path, tmp_path / "one.beton")
    ]
    torch.testing.assert_close(*pixels, atol=0, rtol=0)


@needs_ffcv
def test_ffcv_refuses_shards(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    write_beton(source, path, mode="jpg", shards=3, workers=1)
    with pytest.raises(
        ValueError, match=r"set of 3 files; FFCV's loader reads one: set data\.backend=native"
    ):
        epoch_of(DataConfig(train=str(path), backend="ffcv"), "train")


@pytest.fixture
def own(data: DataConfig, tmp_path: Path) -> DataConfig:
    """A copy that a test may damage."""
    path = tmp_path / "own.beton"
    path.write_bytes(Path(data.train).read_bytes())
    Manifest.load(data.train).save(path)
    return dataclasses.replace(data, train=str(path), val=str(path))


def test_one_wrong_bit_is_found(own: DataConfig) -> None:
    """Also where the JPEG stays valid, or pixels are stored as they are."""
    content, contents = Path(own.val).read_bytes(), read_contents(own.val)
    for bad, share in ((5, 0.5), (6, 0.9), (7, 0.99), (8, 0.3)):
        place = int(contents.images_N["data_ptr"][bad] + share * contents.lengths_N[bad])
        Path(own.val).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=rf"own\.beton image {bad}: the bytes are not those .*CRC-32C"):
            epoch_of(own, "val")


def test_a_file_cut_short_while_it_is_read_is_an_error(own: DataConfig) -> None:
    """A mapped file would kill the process with SIGBUS."""
    loader = build_loader(own, "val", image_size=SIDE, batch_size=2, threads=2)
    batches = loader.epoch(0)
    next(batches)
    os.truncate(own.val, 200_000)
    with pytest.raises(ValueError, match=r"own\.beton was changed while it was read"):
        list(batches)


def test_a_file_written_in_place_is_an_error(own: DataConfig) -> None:
    """Two images of the same size change places: every checksum would still agree."""
    loader = build_loader(own, "val", image_size=SIDE, batch_size=2, threads=2)
    list(loader.epoch(0))
    status = Path(own.val).stat()
    with Path(own.val).open("r+b") as file:
        file.seek(100)
        file.write(file.read(1))
    os.utime(own.val, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # clocks of file systems can be coarse
    with pytest.raises(
        ValueError, match=r"may be replaced by another of its name \(as mv does\), but not written"
    ):
        list(loader.epoch(1))


def test_a_replaced_file_does_not_matter(own: DataConfig, data: DataConfig) -> None:
    loader = build_loader(own, "val", image_size=SIDE, batch_size=4, threads=2)
    batches = loader.epoch(0)
    images = [next(batches)[0]]
    Path(own.val).with_suffix(".new").write_bytes(b"something else")
    Path(own.val).with_suffix(".new").replace(own.val)
    images += [images for images, *_ in batches]
    expected = [images for images, *_ in epoch_of(data, "val", batch_size=4)]
    torch.testing.assert_close(torch.cat(images), torch.cat(expected), atol=0, rtol=0)


def test_memory_stays_flat(data: DataConfig) -> None:
    """Over 50 epochs and 50 that are left early, after some that fill the allocator's caches."""
    loader = build_loader(data, "train", image_size=128, batch_size=12, threads=2)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def epochs(count: int) -> None:
        for epoch in range(count):
            for _ in loader.epoch(epoch):
                pass
            batches = loader.epoch(epoch)
            next(batches)
            batches.close()

    epochs(10)
    before, threads = resident(), threading.active_count()
    epochs(50)
    assert threading.active_count() == threads
    assert resident() - before < 8e6  # a batch is 0.6 MB; one a pass would be 60 MB


def hostile(content: bytes, rng: np.random.Generator) -> bytes:
    """The file with some of its tables' or images' bytes changed, of the same length."""
    changed = bytearray(content)
    table = int(np.frombuffer(content, HEADER, 1)[0]["alloc_table_ptr"])
    regions = [(0, HEADER.itemsize), (RECORDS_START, RECORDS_START + 37 * RECORD.itemsize), (table, len(content)),
               (RECORDS_START, table)]  # fmt: skip
    low, high = regions[rng.integers(len(regions))]
    for _ in range(rng.integers(1, 6)):
        width = int(rng.choice([1, 2, 4, 8]))
        place = int(rng.integers(low, max(low + 1, high - width)))
        special = [bytes(width), b"\xff" * width, b"\x7f" + b"\xff" * (width - 1), rng.bytes(width)]
        changed[place : place + width] = special[rng.integers(4)]
    return bytes(changed)


def read_hostile(own: DataConfig, seeds: range) -> Counter[str]:
    """How files end whose every hash agrees with what is in them: by a ValueError, or with images."""
    content, manifest = Path(own.train).read_bytes(), Manifest.load(own.train)
    endings: Counter[str] = Counter()
    for seed in seeds:
        changed = hostile(content, np.random.default_rng(seed))
        Path(own.train).write_bytes(changed)
        try:
            tables = read_tables(own.train)
        except ValueError:
            endings["refused"] += 1
            continue
        dataclasses.replace(manifest, tables_sha256=tables_sha256(*tables)).save(own.train)
        try:
            epoch_of(own, "train", batch_size=36, image_size=16)
            endings["read"] += 1
        except ValueError as error:
            assert "own.beton" in str(error)
            endings["reported"] += 1
    return endings


def test_hostile_files(own: DataConfig) -> None:
    assert set(read_hostile(own, range(150))) == {"refused", "read", "reported"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_hostile_files_longer(own: DataConfig) -> None:
    assert set(read_hostile(own, range(1000, 6000))) == {"refused", "read", "reported"}


def test_memory_of_batches_is_used_again_but_never_under_one_that_is_kept() -> None:
    buffers = Buffers()
    first = buffers.take((4, 8, 8, 3))
    address, view = first.ctypes.data, first[1:3, ::2]
    tensor = torch.from_numpy(view)
    view[:] = 7
    del first, view
    assert buffers.take((4, 8, 8, 3)).ctypes.data != address
    assert (tensor == 7).all()
    del tensor
    again = buffers.take((3, 8, 8, 3))  # an epoch's last batch is smaller
    assert again.ctypes.data == address
    del again
    assert buffers.take((1, 2, 2, 3)).ctypes.data != address  # another resolution
    many = [buffers.take((10,)) for _ in range(30)]
    del many
    assert len(buffers._free) <= 8


def test_the_next_batches_are_started_before_one_is_delivered() -> None:
    started: list[int] = []

    def start(number: int) -> Callable[[], int]:
        started.append(number)
        return lambda: number

    results = read_ahead(map(start, range(5)), 2)
    assert (next(results), started) == (0, [0, 1, 2])
    assert (next(results), started) == (1, [0, 1, 2, 3])
    assert (list(results), started) == ([2, 3, 4], [0, 1, 2, 3, 4])
