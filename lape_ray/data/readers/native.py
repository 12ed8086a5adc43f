"""Batches of a .beton through our own decoder: no compilation at start, Pillow's pixels, keyed draws.

Shape suffixes: N samples of a pass, B of a batch, S the side of a crop in pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lape_ray.data.augment.draws import Stream, uniform
from lape_ray.data.beton import read_contents
from lape_ray.data.native import FILTERS, Decoder, center_crops, check, flips, random_resized_crops
from lape_ray.data.readers.ahead import read_ahead
from lape_ray.data.readers.buffers import Buffers
from lape_ray.data.readers.reader import CenterCrop, RandomCrop, ReaderOptions, TrainCrop
from lape_ray.data.readers.simple import draw_squares, shift_reflected
from lape_ray.data.sampler import sample_index
from lape_ray.data.streaming.arrivals import Arrivals
from lape_ray.values.program import program


class NativeReader:
    """Images of one .beton or set; a pass decodes ahead in a separate thread, which ends with the pass.

    The files are read by position, not mapped: they stay open, so that another file of that name does not matter,
    and one that is cut short or changed in place is an error that names it.
    """

    reuses_buffers = False
    on_device = False

    def __init__(self, path: str, options: ReaderOptions) -> None:
        self.contents = read_contents(path)
        self.options, self.image_size, self.batch_size = options, options.image_size, options.batch_size
        self.labels_N = self.contents.labels_N
        self.files = [file.open("rb", buffering=0) for file in self.contents.files]
        self.descriptors = np.array([file.fileno() for file in self.files], np.int32)
        self.states = [_state(descriptor) for descriptor in self.descriptors]
        self.arrivals = Arrivals.of(path, self.contents)
        self.decoder = Decoder(options.threads)
        self.buffers = Buffers()

    def batches(
        self, keys_N: np.ndarray, epoch_index_N: np.ndarray, epoch: int
    ) -> Generator[np.ndarray, None, None]:
        """Yield the batches of one pass; see `Reader.batches`."""
        index_N, side = sample_index(keys_N), self.image_size
        parts = (slice(start, start + self.batch_size) for start in range(0, len(index_N), self.batch_size))
        pool = ThreadPoolExecutor(1, thread_name_prefix="decode")
        with contextlib.ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            wait = stack.enter_context(
                self._arriving(index_N)
            )  # ends first, and with it the waiting for images
            yield from read_ahead(
                pool.submit(self._decode, index_N[part], epoch_index_N[part], epoch, side, wait).result
                for part in parts
            )

    @contextlib.contextmanager
    def _arriving(self, index_N: np.ndarray) -> Iterator[Callable[[np.ndarray], None]]:
        """Say in which order images are read, where they are on their way; yields what waits for those of a batch."""
        if self.arrivals is None:
            yield lambda index_B: None
            return
        with self.arrivals.wanted(index_N, self.batch_size) as wait:
            yield wait

    def _decode(
        self,
        index_B: np.ndarray,
        epoch_index_B: np.ndarray,
        epoch: int,
        side: int,
        wait: Callable[[np.ndarray], None],
    ) -> np.ndarray:
        wait(index_B)
        crop, contents = self.options.crop, self.contents
        images_B = contents.images_N[index_B]
        shape = (len(index_B), side, side, 3)
        if self.options.device.type == "cuda":  # torch keeps pinned memory for its next use by itself
            out_BSS3 = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            out_BSS3 = self.buffers.take(shape)
        widths_B, heights_B = images_B["width"], images_B["height"]
        if isinstance(crop, CenterCrop):
            resize = max(side, math.floor(side / crop.share))
            draws = TrainDraws(
                center_crops(widths_B, heights_B, resize=resize, size=side),
                np.zeros(len(index_B), bool),
                np.full(len(index_B), crop.interpolation != "bilinear"),
            )
        else:
            draws = train_draws(crop, self.options.seed, epoch, epoch_index_B, widths_B, heights_B, side)
        files_B = contents.file_N[index_B]
        statuses_B = self.decoder.decode_batch(
            self.descriptors[files_B],
            images_B["data_ptr"],
            contents.lengths_N[index_B],
            images_B["mode"],
            widths_B,
            heights_B,
            draws.boxes_N4,
            draws.flips_N,
            out_BSS3,
            interpolation=np.where(draws.cubic_N, FILTERS["bicubic"], FILTERS["bilinear"]),
            crop_first=isinstance(crop, RandomCrop),
            checksums=True,
        )
        self._refuse_changes(np.unique(files_B))
        check(statuses_B, lambda i: contents.name(index_B[i]))
        if draws.shifts_N2 is not None:
            shift_reflected(out_BSS3, draws.shifts_N2)
        return out_BSS3

    def _refuse_changes(self, files: np.ndarray) -> None:
        """Refuse files that were changed.

        Checksums find changed bytes, but not whole images that changed places. While a file is on its way it changes
        all the time.
        """
        if self.arrivals is not None:
            if self.arrivals.whole:
                self.states, self.arrivals = [_state(one) for one in self.descriptors], None
            return
        for file in files:
            if _state(self.descriptors[file]) != self.states[file]:
                raise ValueError(
                    f"{self.contents.files[file]} was changed while it was read; a file in use may be replaced "
                    "by another of its name (as mv does), but not written in place: check it with "
                    f"{program('write-data')} verify {shlex.quote(Path(self.contents.files[file]).name)}, and start "
                    "again"
                )


class TrainDraws(NamedTuple):
    """The draws for the crops of N training images.

    Attributes:
        boxes_N4: x, y, width and height in pixels
        flips_N: whether the crop is mirrored
        cubic_N: whether it is resized bicubically, else bilinearly
        shifts_N2: pixels to the right and down by which the mirrored crop is moved over its reflection; None: it is not
    """

    boxes_N4: np.ndarray
    flips_N: np.ndarray
    cubic_N: np.ndarray
    shifts_N2: np.ndarray | None = None


def train_draws(
    crop: TrainCrop,
    seed: int,
    epoch: int,
    epoch_index_N: np.ndarray,
    widths_N: np.ndarray,
    heights_N: np.ndarray,
    side: int,
) -> TrainDraws:
    """Draw for the images at `epoch_index_N` of the epoch's order over all ranks, of these sizes in pixels.

    Args:
        side: of the result, in pixels.
    """
    if crop.interpolation == "random":
        cubic_N = uniform(seed, epoch, epoch_index_N, Stream.INTERPOLATION, 1)[:, 0] < 0.5
    else:
        cubic_N = np.full(len(epoch_index_N), crop.interpolation == "bicubic")
    flips_N = flips(seed, epoch, epoch_index_N, crop.flip)
    if isinstance(crop, RandomCrop):
        boxes_N4 = random_resized_crops(
            seed, epoch, epoch_index_N, widths_N, heights_N, scale=crop.scale, ratio=crop.ratio
        )
        return TrainDraws(boxes_N4, flips_N, cubic_N)
    boxes_N4, shifts_N2 = draw_squares(seed, epoch, epoch_index_N, widths_N, heights_N, side)
    shifts_N2[flips_N, 0] *= -1
    return TrainDraws(boxes_N4, flips_N, cubic_N, shifts_N2)


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
