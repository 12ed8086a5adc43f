"""Batches of a source through Pillow and torchvision: slow and plain, the measure of the other decoders.

Decoding is Pillow's, boxes are drawn by torchvision's own code, crops and resizes are `transforms.v2` on Pillow
images. Draws are keyed by (seed, epoch, index) as those of our decoder, but are other numbers.

Shape suffixes: N samples of a pass, B of a batch, S the side of a crop in pixels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as v2

from lape_ray.data.center import center_crop, resized_square
from lape_ray.data.readers.ahead import read_ahead
from lape_ray.data.readers.reader import RandomCrop, ReaderOptions, SimpleCrop, TrainCrop
from lape_ray.data.readers.simple import PADDING, shift_reflected
from lape_ray.data.sampler import sample_index
from lape_ray.data.sources import Source

PART_IMAGES = 8  # that a thread works on at a time


class Draw(NamedTuple):
    """The changes to one training image; the box is in pixels of the image, or of the resized one (`SimpleCrop`)."""

    left: int
    top: int
    width: int
    height: int
    flip: bool
    interpolation: InterpolationMode


class TorchvisionReader:
    """The images of a source; a pass decodes ahead in separate threads, which end with the pass.

    Images are read in the order of the epoch: a source that decodes its neighbours with an image (parquet) is slow
    here unless its row groups are small.

    Attributes:
        batch_size: images of a batch
        image_size: side of the square that is delivered, in pixels; may be set between passes
        labels_N: int64, of the whole source
    """

    reuses_buffers = False
    on_device = False

    def __init__(self, source: Source, options: ReaderOptions) -> None:
        self.options, self.image_size, self.batch_size = options, options.image_size, options.batch_size
        self.source = source
        self.labels_N = source.labels_N

    def batches(
        self, keys_N: np.ndarray, epoch_index_N: np.ndarray, epoch: int
    ) -> Generator[np.ndarray, None, None]:
        """Yield the batches of one pass; see `Reader.batches`."""
        index_N, side = sample_index(keys_N), self.image_size
        parts = (slice(start, start + self.batch_size) for start in range(0, len(index_N), self.batch_size))
        pool = ThreadPoolExecutor(self.options.threads, thread_name_prefix="torchvision")
        try:
            yield from read_ahead(
                self._start(pool, index_N[part].tolist(), epoch_index_N[part].tolist(), epoch, side)
                for part in parts
            )
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(
        self, pool: Executor, index_B: list[int], epoch_index_B: list[int], epoch: int, side: int
    ) -> Callable[[], np.ndarray]:
        """Begin to read a batch in parts; returns what waits for it."""
        out_BSS3 = np.empty((len(index_B), side, side, 3), np.uint8)
        parts = [slice(start, start + PART_IMAGES) for start in range(0, len(index_B), PART_IMAGES)]
        work = [
            pool.submit(self._fill, out_BSS3[part], index_B[part], epoch_index_B[part], epoch)
            for part in parts
        ]
        return functools.partial(_finished, out_BSS3, work)

    def draw(self, crop: RandomCrop, image: Image.Image, epoch: int, epoch_index: int) -> Draw:
        """Draw for the image at `epoch_index`: a function of these, the seed and the image's size."""
        generator = self._generator(epoch, epoch_index)
        with _RandomFrom(generator):
            top, left, height, width = RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio))
        return Draw(left, top, width, height, *_draw_flip_and_filter(crop, generator))

    def draw_square(
        self, crop: SimpleCrop, image: Image.Image, epoch: int, epoch_index: int, side: int
    ) -> Draw:
        """Draw a square of `side` pixels of the resized image, which may begin PADDING pixels before it."""
        generator = self._generator(epoch, epoch_index)
        left, top = (
            int(torch.randint(length + 2 * PADDING - side + 1, (), generator=generator)) - PADDING
            for length in _resized(image, side)
        )
        return Draw(left, top, side, side, *_draw_flip_and_filter(crop, generator))

    def _generator(self, epoch: int, epoch_index: int) -> torch.Generator:
        return torch.Generator().manual_seed(_draw_seed(self.options.seed, epoch, epoch_index))

    def _fill(self, out_PSS3: np.ndarray, index_P: list[int], epoch_index_P: list[int], epoch: int) -> None:
        """Read, crop and resize some images (P) of a batch into their place."""
        crop = self.options.crop
        for out_SS3, index, epoch_index in zip(out_PSS3, index_P, epoch_index_P, strict=True):
            image, side = self.source.read(index), len(out_SS3)
            if isinstance(crop, RandomCrop):
                square = resized_crop(image, self.draw(crop, image, epoch, epoch_index), side)
            elif isinstance(crop, SimpleCrop):
                square = simple_crop(image, self.draw_square(crop, image, epoch, epoch_index, side), side)
            else:
                square = center_crop(image, size=side, share=crop.share, interpolation=crop.interpolation)
            out_SS3[:] = np.asarray(square)


def _draw_flip_and_filter(crop: TrainCrop, generator: torch.Generator) -> tuple[bool, InterpolationMode]:
    flip, second_filter = torch.rand(2, generator=generator).tolist()
    interpolation = _filter(crop.interpolation)
    if crop.interpolation == "random" and second_filter < 0.5:
        interpolation = InterpolationMode.BILINEAR
    return flip < crop.flip, interpolation


def resized_crop(image: Image.Image, draw: Draw, side: int) -> Image.Image:
    """Cut out an image's box, `side` x `side` pixels, perhaps mirrored: torchvision's RandomResizedCrop and flip."""
    square = v2.resized_crop(
        image,
        draw.top,
        draw.left,
        draw.height,
        draw.width,
        [side, side],
        interpolation=draw.interpolation,
        antialias=True,
    )
    return v2.horizontal_flip(square) if draw.flip else square


def simple_crop(image: Image.Image, draw: Draw, side: int) -> Image.Image:
    """Resize an image's shorter side to `side`, and cut its square out of the result and its reflection."""
    sizes = _resized(image, side)
    corner = (draw.left, draw.top)
    inside = [min(max(at, 0), length - side) for at, length in zip(corner, sizes, strict=True)]
    square = resized_square(
        image, sizes, inside, side, bilinear=draw.interpolation is InterpolationMode.BILINEAR
    )
    pixels_1SS3 = np.array(square)[None]
    shift_reflected(pixels_1SS3, np.subtract([corner], [inside]))
    square = Image.fromarray(pixels_1SS3[0])
    return v2.horizontal_flip(square) if draw.flip else square


def _resized(image: Image.Image, side: int) -> list[int]:
    return [side * length // min(image.size) for length in image.size]


def _filter(interpolation: str) -> InterpolationMode:
    return InterpolationMode.BILINEAR if interpolation == "bilinear" else InterpolationMode.BICUBIC


def _finished(out_BSS3: np.ndarray, work: list[Future[None]]) -> np.ndarray:
    for future in work:
        future.result()
    return out_BSS3


def _draw_seed(seed: int, epoch: int, epoch_index: int) -> int:
    digest = hashlib.blake2b(f"torchvision,{seed},{epoch},{epoch_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _RandomFrom(TorchFunctionMode):
    """A context in which torch, on this thread alone, draws from `generator` where the code names none.

    torchvision's get_params takes no generator. Seeding the global one instead would change what the rest of the
    process draws, and what other threads draw here.
    """

    DRAWS = frozenset({torch.Tensor.uniform_, torch.randint, torch.rand})

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.DRAWS:
            kwargs.setdefault("generator", self.generator)
        return func(*args, **kwargs)
