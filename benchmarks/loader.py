"""Time the input pipeline beside its peers: whole loaders, augmentation on the device, training fed by them.

    python benchmarks/loader.py --images imagenet/train --json loader.json
    python benchmarks/loader.py --device cuda --parts augmentation,training

Nothing is timed before the pixels of our loader are Pillow's. Every candidate delivers random crops and flips of the
same images, each at its usual settings. Without --images, textures are drawn. About 2 GB of temporary disk are used.

Shapes: B images, S pixels of a side, H and W pixels of an image, F columns of a half spectrum.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import Candidate, CannotRunError, Column, Record, Row
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from train_step import check_device, wait

from lape_ray.config import DataConfig, replace_fields
from lape_ray.data import native
from lape_ray.data.augment import Augment, build_augment
from lape_ray.data.batch import Batch
from lape_ray.data.beton import write_beton
from lape_ray.data.loader import build_loader
from lape_ray.data.ready import augment_batches
from lape_ray.data.sources import image_folder, open_source
from lape_ray.recipes import recipe
from lape_ray.training.parallelize import missing_compiler
from lape_ray.training.state import build_state
from lape_ray.training.step import optimizer_step

SEED = 5

# ---- images


def read_images(where: str | None, *, count: int, split: str | None = None) -> tuple[list[bytes], str]:
    """Read `count` JPEGs of three channels, evenly spread over a source, or draw them without a source.

    Returns:
        The files, and where they come from, for the record; other images become JPEGs of quality 95.
    """
    if where is None:
        return [
            draw_photograph(index) for index in range(count)
        ], f"{count} drawn textures with a 1/f spectrum"
    source = open_source(where, split)
    files, changed = [], 0
    for index in np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)).tolist():
        data = source.encoded(index)
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
                data, changed = _jpeg(source.read(index), quality=95), changed + 1
        files.append(data)
    return files, f"{len(files)} images of {source.origin}" + (
        f", {changed} encoded as RGB JPEG" if changed else ""
    )


def _jpeg(image: Image.Image, *, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def draw_photograph(index: int) -> bytes:
    """Draw a JPEG that costs a decoder what a photograph does; the same for the same number.

    Photographs have amplitudes that fall as 1/f (Field, "Relations between the statistics of natural images", 1987)
    and more contrast in luma than in colour; most of ImageNet's have a longest side of 500.
    """
    rng, height, width = np.random.default_rng((0x1F, index)), 375, 500
    frequency_HF = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency_HF[0, 0] = np.inf
    steepness = rng.uniform(1.15, 1.75)
    planes = []
    for contrast in (52.0, 10.0, 10.0):
        noise_HF = rng.normal(size=(2, *frequency_HF.shape)) / frequency_HF**steepness
        plane_HW = np.fft.irfft2(noise_HF[0] + 1j * noise_HF[1], s=(height, width))
        planes.append(128 + contrast * plane_HW / plane_HW.std())
    pixels_HW3 = np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)
    return _jpeg(Image.fromarray(pixels_HW3, "YCbCr").convert("RGB"), quality=95)


def shrunk(files: Sequence[bytes]) -> list[bytes]:
    """Return copies of at most 500 pixels a side at quality 90, the usual ImageNet file of FFCV."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    for image in images:
        image.thumbnail((500, 500), Image.Resampling.BICUBIC)
    return [_jpeg(image, quality=90) for image in images]


@dataclass(frozen=True)
class Stored:
    """The same images on disk, in the same order: a folder for each, whose number is the label.

    Attributes:
        root: of the folders
        betons: the files of `KINDS`
        repeats: how often each image is delivered in an epoch
    """

    root: Path
    betons: Mapping[str, str]
    repeats: int


# How .betons are written: as our writer does, with restart markers; without them, as FFCV gains nothing from those.
KINDS: dict[str, dict[str, Any]] = {
    "marked": {},
    "plain": {"markers": 0},
    "raw": {"max_size": 256, "mode": "raw"},
}


def store(files: Sequence[bytes], root: Path, *, samples: int, kinds: Sequence[str]) -> Stored:
    """Write `files` below `root`, and beside it .betons that repeat them up to at least `samples` images."""
    for number, data in enumerate(files):
        (root / f"{number:05}").mkdir(parents=True)
        (root / f"{number:05}" / "image.jpg").write_bytes(data)
    repeats = -(-samples // len(files))
    source = image_folder(root).take(np.tile(np.arange(len(files)), repeats))
    betons = {kind: f"{root}-{kind}.beton" for kind in kinds}
    for kind, path in betons.items():
        write_beton(source, path, **KINDS[kind])
    return Stored(root, betons, repeats)


# ---- pixels, before anything is timed

MEAN_LIMIT, MAX_LIMIT = 0.05, 4  # of 255 levels: libjpeg-turbo and Pillow's copy of it may differ in rounding


class WrongPixelsError(ValueError):
    """Our pixels are not those that Pillow delivers: times would mean nothing."""


def check_pixels(stored: Stored, side: int, batch_size: int, where: str) -> Row:
    """Compare the first images of our loader's first epoch with Pillow's crops of the files.

    Raises:
        WrongPixelsError: they lie further apart than rounding.
    """
    data = DataConfig(train=stored.betons["marked"])
    loader = build_loader(data, "train", image_size=side, batch_size=batch_size, seed=SEED, threads=2)
    with contextlib.closing(loader.epoch(0)) as batches:
        images_B3SS, labels_B, _ = next(batches)
    paths = [stored.root / f"{label:05}" / "image.jpg" for label in labels_B[:48].tolist()]
    images = [Image.open(path).convert("RGB") for path in paths]
    sizes_B2, epoch_index_B = np.array([image.size for image in images]), np.arange(len(images))
    boxes_B4 = native.random_resized_crops(SEED, 0, epoch_index_B, sizes_B2[:, 0], sizes_B2[:, 1])
    flips_B = native.flips(SEED, 0, epoch_index_B)
    wanted = []
    for image, (x, y, width, height), flip in zip(images, boxes_B4.tolist(), flips_B, strict=True):
        crop = image.crop((x, y, x + width, y + height)).resize((side, side), Image.Resampling.BICUBIC)
        wanted.append(np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop))
    ours_BSS3 = images_B3SS.permute(0, 2, 3, 1).numpy()[: len(images)]
    return compare_pixels(ours_BSS3, np.stack(wanted), where)


def compare_pixels(ours_BSS3: np.ndarray, theirs_BSS3: np.ndarray, where: str) -> Row:
    """Return how far images lie apart, of 255 levels; a WrongPixelsError where that is more than rounding."""
    apart_BSS3 = np.abs(ours_BSS3.astype(np.int16) - theirs_BSS3)
    mean, largest = float(apart_BSS3.mean()), int(apart_BSS3.max())
    if mean > MEAN_LIMIT or largest > MAX_LIMIT:
        worst = int(apart_BSS3.reshape(len(apart_BSS3), -1).mean(axis=1).argmax())
        raise WrongPixelsError(
            f"{where}: our pixels are not Pillow's (mean error {mean:.3f}, largest {largest} of 255, worst image "
            f"{worst} of {len(apart_BSS3)}); nothing was timed. Build the decoder again with `make setup`"
        )
    return {"name": where, "images": len(apart_BSS3), "mean_error": mean, "max_error": largest}


# ---- loaders

Epoch = Callable[[int], Generator[int, None, None]]
"""Yields the number of images of each batch that has arrived on the device; left early, it is closed."""


@dataclass(frozen=True)
class Job:
    """The work of a candidate: deliver `stored` as squares of `side` pixels to `device`, or train on that.

    Attributes:
        model, steps: that are trained, and so many steps in a round
    """

    candidate: str
    stored: Stored
    side: int
    batch_size: int
    threads: int
    device: str
    model: str
    steps: int


def ours(job: Job, *, kind: str = "marked", threads: int | None = None) -> Epoch:
    """Make this package's loader with its default backend: bicubic with antialiasing."""
    loader = build_loader(
        DataConfig(train=job.stored.betons[kind]), "train", image_size=job.side, batch_size=job.batch_size,
        device=job.device, threads=threads or job.threads,
    )  # fmt: skip

    def epoch(number: int) -> Generator[int, None, None]:
        with contextlib.closing(loader.epoch(number)) as batches:
            for batch in batches:
                yield len(batch.labels)

    return epoch


def ffcv(job: Job, *, kind: str) -> Epoch:
    """Make FFCV's own loader on the same images: area interpolation and the fast DCT. Compiles for seconds."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

    device = torch.device(job.device)
    delivery = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    crop = [RandomResizedCropRGBImageDecoder((job.side, job.side)), RandomHorizontalFlip()]
    loader = Loader(
        job.stored.betons[kind], batch_size=job.batch_size, num_workers=job.threads, os_cache=True,
        order=OrderOption.RANDOM, seed=0,
        pipelines={"image": [*crop, ToTensor(), *delivery, ToTorchImage()],
                   "label": [IntDecoder(), ToTensor(), Squeeze(1), *delivery]},
    )  # fmt: skip
    # It keeps room for the largest image in every slot of every batch that is on its way.
    images = loader.reader.metadata["f0"]
    largest = 3 * int(images["width"].max()) * int(images["height"].max())
    needed = (loader.batches_ahead + 2) * job.batch_size * largest
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free / 2:
        raise CannotRunError(f"its buffers take {needed / 2**30:.1f} GB, and {free / 2**30:.1f} GB are free")

    def epoch(number: int) -> Generator[int, None, None]:
        batches = iter(loader)
        try:
            for images_B3SS, _ in batches:
                yield len(images_B3SS)
        finally:
            batches.close()  # its thread would outlive a caller that stops early
            batches.join()

    return epoch


def _data_loader(job: Job, read: Callable[[str], Any], transform: Callable[[Any], Tensor]) -> Epoch:
    from torchvision.datasets import ImageFolder

    files = ImageFolder(job.stored.root, transform, loader=read)
    loader: Any = torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset([files] * job.stored.repeats), batch_size=job.batch_size, shuffle=True,
        drop_last=True, num_workers=job.threads, persistent_workers=True, pin_memory=job.device == "cuda",
        multiprocessing_context="fork",  # its default outside of a process that was itself spawned
    )  # fmt: skip

    def epoch(number: int) -> Generator[int, None, None]:
        for batch in loader:
            images_B3SS, _ = (tensor.to(job.device, non_blocking=True) for tensor in batch)
            yield len(images_B3SS)

    return epoch


def torchvision(job: Job) -> Epoch:
    """Make a DataLoader over torchvision.io and transforms.v2 on uint8: bilinear with antialiasing."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(job.side, antialias=True), v2.RandomHorizontalFlip()])
    return _data_loader(job, lambda path: decode_jpeg(read_file(path), ImageReadMode.RGB), transform)


def pillow(job: Job) -> Epoch:
    """Make a DataLoader over Pillow as torchvision's ImageFolder uses it: bicubic with antialiasing."""
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(job.side, interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    return _data_loader(job, lambda path: Image.open(path).convert("RGB"), transform)


CANDIDATES: dict[str, Callable[[Job], Epoch]] = {
    "ours": ours,
    "ours again": ours,  # what a ratio is uncertain by
    "ours, no markers": lambda job: ours(job, kind="plain"),
    "ours, one thread": lambda job: ours(job, threads=1),
    "ffcv": lambda job: ffcv(job, kind="plain"),
    "torchvision.io": torchvision,
    "Pillow": pillow,
    "raw, ours": lambda job: ours(job, kind="raw"),
    "raw, ffcv": lambda job: ffcv(job, kind="raw"),
}
REFERENCES = {**dict.fromkeys(CANDIDATES, "ours"), "raw, ffcv": "raw, ours"}


def prepare(job: Job) -> Candidate:
    """Make a loader in a separate process; its facts say how soon its first batch came."""
    started = time.perf_counter()
    epoch = CANDIDATES[job.candidate](job)
    with contextlib.closing(epoch(0)) as batches:
        next(batches)
    facts = {"threads": 1 if "one thread" in job.candidate else job.threads,
             "first_batch_s": time.perf_counter() - started}  # fmt: skip

    def work(number: int) -> int:
        images = sum(epoch(number))
        wait(job.device)
        return images

    return Candidate(work, facts)


# ---- augmentation on the device

LEVEL, MAY_DIFFER = 0.02, 0.01  # more than one of 256, normalised; share of all pixels
CALLS = 20  # of a round


def prepare_augmentation(job: Job) -> Candidate:
    """Make the augmentation of DeiT's recipe with our kernels (`fused`) or with PyTorch's operators.

    `device_us` of its facts is the time of an image in kernels on a GPU, where what it takes to launch them is hidden.

    Raises:
        WrongPixelsError: our kernels give other images than the operators.
    """
    data, device, fused = recipe("deit_tiny_lape").data, torch.device(job.device), job.candidate == "fused"
    if fused and (missing := missing_compiler(device)):
        raise CannotRunError(f"{missing} is missing")
    make = partial(build_augment, data, image_size=job.side, seed=0)
    augment = make(fused=fused)
    config = DataConfig(train=job.stored.betons["marked"])
    loader = build_loader(config, "train", image_size=job.side, batch_size=job.batch_size, device=device)
    with contextlib.closing(loader.epoch(0)) as batches:
        images_B3SS = next(batches).images.clone()
    if fused:
        refuse_other_images(augment, make(fused=False), images_B3SS)

    def work(number: int) -> int:
        for call in range(CALLS):
            augment(images_B3SS, epoch=0, epoch_index=np.arange(job.batch_size) + call * job.batch_size)
        wait(job.device)
        return CALLS * job.batch_size

    facts: Row = {"batch_size": job.batch_size}
    if device.type == "cuda":
        work(0)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            images = work(0)
        busy_us = sum(event.self_device_time_total for event in profiler.key_averages())
        facts["device_us"] = busy_us / images
    return Candidate(work, facts)


def refuse_other_images(fused: Augment, operators: Augment, images_B3SS: Tensor) -> None:
    """Raise a WrongPixelsError where two augmentations give other images.

    They may differ in rotations, by a few levels, and in what comes after one in the same image.
    """
    epoch_index_B = np.arange(len(images_B3SS))
    one, other = (augment(images_B3SS, epoch=0, epoch_index=epoch_index_B) for augment in (fused, operators))
    share = ((one - other).abs() > LEVEL).float().mean().item()
    if not share <= MAY_DIFFER:
        raise WrongPixelsError(f"{share:.1%} of the pixels of the fused augmentation are not the operators'")


# ---- training that is fed

LEAD_STEPS = 4  # not timed: the loader's queue is full before them and has been used up after them


def prepare_fed(job: Job) -> Candidate:
    """Make training steps that are `fed` by the loader, or run on one batch that stays on the device.

    They are those of DeiT's recipe with LaPE, without its repeats, which only change the order.
    """
    beton = job.stored.betons["marked"]
    values = {"data.train": beton, "data.val": beton, "data.batch_size": job.batch_size,
              "data.threads": job.threads, "model.image_size": job.side}  # fmt: skip
    config = replace_fields(recipe(f"{job.model}_lape"), values)
    state = build_state(config, torch.device(job.device))
    state.model.train()
    ready: Iterator[Batch]
    if job.candidate == "fed":
        ready = itertools.chain.from_iterable(state.train_loader.epoch(epoch) for epoch in itertools.count())
    else:
        with contextlib.closing(state.train_loader.loader.epoch(0)) as batches:
            kept, labels_B, epoch_index_B = next(batches)
        one = Batch(kept.clone(), labels_B.clone(), epoch_index_B)
        moved = (one._replace(epoch_index=epoch_index_B + n * job.batch_size) for n in itertools.count())
        ready = augment_batches(moved, state.train_loader.augment, epoch=0)
    counter = itertools.count()

    def step(count: int) -> int:
        for _ in range(count):
            optimizer_step(state, ready, epoch=0, step=next(counter), lr=config.optim.lr)
        wait(job.device)
        return count * job.batch_size

    step(LEAD_STEPS)  # kernels are chosen and memory is taken
    return Candidate(lambda number: step(job.steps), {"model": job.model}, lead=lambda: step(LEAD_STEPS))


# ---- the command

PARTS: dict[str, Callable[[Job], Candidate]] = {
    "loaders": prepare,
    "augmentation": prepare_augmentation,
    "training": prepare_fed,
}
PIXELS = (Column("input", "name"), Column("images", "images", ",.0f"), Column("mean error", "mean_error", ".4f"),
          Column("largest", "max_error", ".0f"))  # fmt: skip
COLUMNS = (Column("candidate", "name"), Column("threads", "threads", ".0f"),
           Column("CPU ms/image", "cpu_ms", ".3f"), Column("images/s", "images_per_second", ",.0f"),
           Column("device us/image", "device_us"), Column("over", "over", ".2f"), Column("of", "of"),
           Column("first batch s", "first_batch_s", ".2f"))  # fmt: skip


def measure(section: str, names: Sequence[str], job: Job, rounds: int, record: Record, **also: str) -> None:
    """Time candidates of a part beside each other; `over` is CPU time of whole loaders, else time by the clock."""
    candidates = {name: (PARTS[section], dataclasses.replace(job, candidate=name)) for name in names}
    rows = common.interleaved(candidates, rounds, common.note)
    references = {name: REFERENCES.get(name, names[0]) for name in names if name not in ("ours", names[0])}
    common.add_ratios(rows, references, "cpu_ms" if section == "loaders" else "wall_ms")
    record.add(section, [{**also, **row} for row in rows])
    print("\n" + common.table(", ".join((section, *also.values())), COLUMNS, rows), flush=True)


def parse() -> argparse.Namespace:
    made = common.parser(__doc__, rounds=4)
    add = made.add_argument
    add("--images", help="folder of class folders, parquet file, folder or glob (default: images drawn here)")
    add("--split", help="train, val, ...: folder or shards of that name in --images")
    add("--parts", help=f"of {','.join(PARTS)} (default: loaders, on a GPU all)")
    add("--size", type=int, default=224, help="side of the crops in pixels (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="(default: %(default)s)")
    cpus = min(16, len(os.sched_getaffinity(0)))
    add("--threads", type=int, default=cpus, help="of a loader (default: %(default)s)")
    add("--model", default="deit_small", help="that is fed (default: %(default)s)")
    options = made.parse_args()
    check_device(options.device)
    options.parts = (options.parts or ("loaders" if options.device == "cpu" else ",".join(PARTS))).split(",")
    if unknown := set(options.parts) - set(PARTS):
        raise ValueError(f"--parts {', '.join(unknown)} is not known; choose from {', '.join(PARTS)}")
    if options.smoke:
        options.size, options.rounds, options.batch_size, options.model = 32, 1, 8, "deit_tiny"
    return options


def main() -> None:
    options = parse()
    record = Record("loader", vars(options), path=options.json, device=options.device)
    with tempfile.TemporaryDirectory(prefix="lape_ray-benchmark-") as folder:
        common.note("reading images and writing files and .betons")
        loaders = "loaders" in options.parts
        count = 10 if options.smoke else 200 if loaders else 32
        files, origin = read_images(options.images, count=count, split=options.split)
        record.content["images"] = origin
        print(f"{record.heading()}\n{origin}; crops of {options.size} px; median (lowest to highest round)")
        samples = 8 * options.batch_size * max(1, options.threads // 2)
        inputs = {"500px": shrunk(files), **({"original": files} if loaders and options.images else {})}
        jobs = {}
        for name, each in inputs.items():
            kinds = ["marked", "plain", "raw"][: 1 if not loaders else 3 if name == "500px" else 2]
            stored = store(each, Path(folder) / name, samples=samples, kinds=kinds)
            shape = options.size, options.batch_size, options.threads, options.device
            jobs[name] = Job("ours", stored, *shape, options.model, 1 if options.smoke else 40)
            record.add("pixels", [check_pixels(stored, options.size, options.batch_size, name)])
        print("\n" + common.table("pixels: ours from Pillow's, of 255", PIXELS, record.sections["pixels"]))
        for name, job in jobs.items() if loaders else ():
            names = [one for one in CANDIDATES if "raw" in job.stored.betons or not one.startswith("raw")]
            measure("loaders", names, job, options.rounds, record, input=name)
        job = jobs["500px"]
        if "augmentation" in options.parts:
            names = ["operators", "fused"][: 2 if options.device == "cuda" else 1]
            measure("augmentation", names, job, options.rounds, record)
        if "training" in options.parts:
            names = ["one batch", "again", "fed"]
            measure("training", names, job, options.rounds, record, model=options.model)


if __name__ == "__main__":
    common.run(main)
