"""Whole loaders that deliver training batches of random crops and flips: ours and its peers at their usual settings.

A contender is made for one job and then runs epochs: it yields the number of images of each batch that has arrived
on the device (uint8, with labels). Whoever leaves an epoch early closes the generator.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lape_ray.bench.inputs import Stored
from lape_ray.bench.isolated import CannotRunError, Work

Epoch = Callable[[int], Generator[int, None, None]]
OURS, FFCV, TORCHVISION, PILLOW = "lape_ray", "ffcv", "torchvision.io", "Pillow"
SCRATCH_SHARE = 0.5  # of the memory that is free, which FFCV's buffers may take


@dataclass(frozen=True)
class Job:
    """What a contender has to do: deliver epochs of `stored` as squares of `side` pixels to `device`."""

    stored: Stored
    side: int
    batch_size: int
    threads: int
    device: str


def ours(job: Job) -> Epoch:
    """This package's loader with its default backend: bicubic with antialiasing."""
    from lape_ray.config import DataConfig
    from lape_ray.data.loader import build_loader

    loader = build_loader(
        DataConfig(train=job.stored.beton),
        "train",
        image_size=job.side,
        batch_size=job.batch_size,
        device=job.device,
        threads=job.threads,
    )

    def epoch(number: int) -> Generator[int, None, None]:
        with contextlib.closing(loader.epoch(number)) as batches:
            for images_BCHW, _ in batches:
                yield len(images_BCHW)

    return epoch


def stock_ffcv(job: Job) -> Epoch:
    """FFCV's own Loader on the same file: area interpolation and the fast DCT. Compiles when it is made."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

    device = torch.device(job.device)
    delivery = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    crop = [RandomResizedCropRGBImageDecoder((job.side, job.side)), RandomHorizontalFlip()]
    loader = Loader(
        job.stored.beton,
        batch_size=job.batch_size,
        num_workers=job.threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=0,
        pipelines={
            "image": [*crop, ToTensor(), *delivery, ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze(1), *delivery],
        },
    )
    _refuse_large_scratch(loader, job)

    def epoch(number: int) -> Generator[int, None, None]:
        batches = iter(loader)
        try:
            for images_BCHW, _ in batches:
                yield len(images_BCHW)
        finally:
            batches.close()  # its thread would outlive a caller that stops early
            batches.join()

    return epoch


def _refuse_large_scratch(loader: Any, job: Job) -> None:
    """FFCV keeps room for the largest image in every slot of every batch that is on its way."""
    images = loader.reader.metadata["f0"]
    largest = 3 * int(images["width"].max()) * int(images["height"].max())
    needed = (loader.batches_ahead + 2) * job.batch_size * largest
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > SCRATCH_SHARE * free:
        raise CannotRunError(
            f"its buffers take {needed / 2**30:.1f} GB for images of up to {largest / 3e6:.1f} megapixels, "
            f"and {free / 2**30:.1f} GB are free"
        )


class _Files(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Files in the order of the .beton's samples, as torchvision's ImageFolder would give them."""

    def __init__(
        self, job: Job, read: Callable[[str], Any], transform: Callable[[Any], torch.Tensor]
    ) -> None:
        self.paths, self.samples = job.stored.paths, job.stored.samples
        self.read, self.transform = read, transform

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        label = index % len(self.paths)
        return self.transform(self.read(self.paths[label])), label


def _data_loader(job: Job, files: _Files) -> Epoch:
    device = torch.device(job.device)
    loader = torch.utils.data.DataLoader(
        files,
        batch_size=job.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=job.threads,
        persistent_workers=True,
        multiprocessing_context="fork",  # its default outside of a process that was itself spawned
        pin_memory=device.type == "cuda",
    )

    def epoch(number: int) -> Generator[int, None, None]:
        for images_BCHW, labels_B in _moved(loader, device):
            yield min(len(images_BCHW), len(labels_B))

    return epoch


def _moved(loader: Any, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for images_BCHW, labels_B in loader:
        yield images_BCHW.to(device, non_blocking=True), labels_B.to(device, non_blocking=True)


def torchvision_io(job: Job) -> Epoch:
    """DataLoader over torchvision.io and transforms.v2 on uint8: bilinear with antialiasing."""
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(job.side, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return _data_loader(job, _Files(job, _read_with_torchvision, transform))


def _read_with_torchvision(path: str) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    return decode_jpeg(read_file(path), ImageReadMode.RGB)


def pillow(job: Job) -> Epoch:
    """DataLoader over Pillow as torchvision's ImageFolder uses it: bicubic with antialiasing."""
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(job.side, interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    return _data_loader(job, _Files(job, _read_with_pillow, transform))


def _read_with_pillow(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


CONTENDERS: dict[str, Callable[[Job], Epoch]] = {
    OURS: ours,
    FFCV: stock_ffcv,
    TORCHVISION: torchvision_io,
    PILLOW: pillow,
}


def works(jobs: Mapping[str, tuple[str, Job]]) -> dict[str, Work]:
    """What a process times: by name, whole epochs of a contender at a job. Each is made at its first call."""
    return {name: _work(CONTENDERS[contender], job) for name, (contender, job) in jobs.items()}


def _work(make: Callable[[Job], Epoch], job: Job) -> Work:
    @functools.cache
    def made() -> Epoch:
        return make(job)

    def run(number: int) -> int:
        images = sum(made()(number))
        if torch.device(job.device).type == "cuda":
            torch.cuda.synchronize(job.device)
        return images

    return run
