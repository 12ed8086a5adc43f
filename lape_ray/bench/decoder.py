"""How fast a random resized crop comes out of a JPEG: this package's decoder and its peers, on the same files.

Every decoder gets the same crops and flips and delivers uint8 (side, side, 3) or (3, side, side). The rounds of
all of them are interleaved, so that a disturbance meets each alike, and ours runs twice: how far its two rows lie
apart is what the others' rows are uncertain by.

Shape suffixes: B images, R rounds, C chunks of images.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as v2

from lape_ray.bench.inputs import MARKERS, make_inputs
from lape_ray.bench.record import spread
from lape_ray.data import native

CHUNK = 10  # images that are timed at a time
OURS, AGAIN = "lape_ray", "lape_ray, again"
WHOLE = "libjpeg-turbo, whole, no resize"


@dataclass
class Work:
    """What every decoder has to do with one set of files; `boxes_B4` are x, y, width and height."""

    files: Sequence[bytes]
    widths_B: np.ndarray
    heights_B: np.ndarray
    boxes_B4: np.ndarray
    flips_B: np.ndarray
    side: int

    @classmethod
    def of(cls, files: Sequence[bytes], side: int, seed: int) -> Work:
        widths_B, heights_B = np.array([Image.open(io.BytesIO(data)).size for data in files]).T
        positions_B = np.arange(len(files))
        boxes_B4 = native.random_resized_crops(seed, 0, positions_B, widths_B, heights_B)
        return cls(files, widths_B, heights_B, boxes_B4, native.flips(seed, 0, positions_B), side)


Decode = Callable[[range], None]  # decodes these images of a Work


def native_crops(work: Work, threads: int) -> Decode:
    """This package: bicubic with antialiasing."""
    decoder = native.Decoder(threads)
    lengths_B = np.array([len(data) for data in work.files], np.uint64)
    offsets_B = np.cumsum(lengths_B) - lengths_B
    file = np.frombuffer(b"".join(work.files), np.uint8)
    modes_B = np.zeros(len(work.files), np.uint8)
    out_BHW3 = np.empty((len(work.files), work.side, work.side, 3), np.uint8)

    def decode(part: range) -> None:
        chosen = slice(part.start, part.stop)
        statuses_B = decoder.decode_batch(
            file,
            offsets_B[chosen],
            lengths_B[chosen],
            modes_B[chosen],
            work.widths_B[chosen],
            work.heights_B[chosen],
            work.boxes_B4[chosen],
            work.flips_B[chosen],
            out_BHW3[chosen],
        )
        native.check(statuses_B)

    return decode


def ffcv_crops(work: Work, threads: int) -> Decode:
    """The arithmetic of FFCV's own decoder: a whole decode with the fast DCT, then area interpolation."""
    from ffcv.libffcv import imdecode, resize_crop

    files = [np.frombuffer(data, np.uint8) for data in work.files]
    pixels = int((work.widths_B * work.heights_B).max())
    scratch = threading.local()  # as in FFCV, memory for the whole image is not allocated for each

    def decode(part: range) -> None:
        if not hasattr(scratch, "image"):
            scratch.image = np.zeros(3 * pixels, np.uint8)
        out_HW3 = np.empty((work.side, work.side, 3), np.uint8)
        for i in part:
            width, height = int(work.widths_B[i]), int(work.heights_B[i])
            image_HW3 = scratch.image[: 3 * width * height].reshape(height, width, 3)
            imdecode(files[i], image_HW3, height, width, height, width)
            x, y, crop_width, crop_height = work.boxes_B4[i].tolist()
            resize_crop(image_HW3, y, y + crop_height, x, x + crop_width, out_HW3)
            if work.flips_B[i]:
                np.ascontiguousarray(out_HW3[:, ::-1])

    return decode


def torchvision_crops(work: Work, threads: int) -> Decode:
    """torchvision.io and transforms.v2 on uint8: bilinear with antialiasing."""
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in work.files]
    size = [work.side, work.side]

    def decode(part: range) -> None:
        for i in part:
            x, y, width, height = work.boxes_B4[i].tolist()
            image = v2.resized_crop(
                decode_jpeg(files[i], ImageReadMode.RGB), y, x, height, width, size, antialias=True
            )
            if work.flips_B[i]:
                v2.horizontal_flip(image)

    return decode


def libjpeg_whole(work: Work, threads: int) -> Decode:
    """Nothing but libjpeg-turbo's decoding of whole images, as torchvision.io calls it."""
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in work.files]

    def decode(part: range) -> None:
        for i in part:
            decode_jpeg(files[i], ImageReadMode.RGB)

    return decode


def pillow_crops(work: Work, threads: int) -> Decode:
    """Pillow, as torchvision's ImageFolder uses it: bicubic with antialiasing."""

    def decode(part: range) -> None:
        for i in part:
            x, y, width, height = work.boxes_B4[i].tolist()
            image = Image.open(io.BytesIO(work.files[i])).convert("RGB").crop((x, y, x + width, y + height))
            image = image.resize((work.side, work.side), Image.Resampling.BICUBIC)
            if work.flips_B[i]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            np.asarray(image)

    return decode


DECODERS: dict[str, Callable[[Work, int], Decode]] = {
    OURS: native_crops,
    AGAIN: native_crops,
    "ffcv core": ffcv_crops,
    "torchvision.io": torchvision_crops,
    "Pillow": pillow_crops,
    WHOLE: libjpeg_whole,
}


def decoder_benchmark(
    files: Sequence[bytes], *, side: int = 224, rounds: int = 5, threads: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """Measure all decoders on `files`, the bytes of JPEGs, and on what is usually made of them.

    Inputs are the originals, the originals with restart markers, and copies of at most 500 pixels a side at
    quality 90, the usual ImageNet file of FFCV, without and with markers.

    Returns:
        A dict for each decoder and input:
        name, input: of the decoder and of what it decodes
        missing: why the decoder did not run, if it is not installed; then nothing below is there
        bytes: of a file, on average
        cpu_ms: CPU time of an image with one thread, a `spread` over the rounds
        cpu_ms_quiet: the same with each chunk of images at its best round, for machines that others use too
        images_per_second: by the clock, with `threads` threads, a `spread`
    """
    if len(files) < CHUNK or rounds < 1 or threads < 1:
        raise ValueError(f"{len(files)} files, {rounds} rounds, {threads} threads; it takes {CHUNK}, 1 and 1")
    works = {name: Work.of(inputs, side, seed) for name, inputs in make_inputs(files).items()}
    missing: dict[str, str] = {}
    alone: dict[tuple[str, str], Decode] = {}
    shared: dict[tuple[str, str], Decode] = {}
    for name, work in works.items():
        for decoder, make in DECODERS.items():
            if MARKERS in name and decoder not in (OURS, AGAIN):
                continue  # peers gain nothing from restart markers
            try:
                alone[decoder, name], shared[decoder, name] = make(work, 1), make(work, threads)
            except ImportError as error:
                if decoder in (OURS, AGAIN):
                    raise
                missing[decoder] = str(error)
    chunks = [range(i, min(i + CHUNK, len(files))) for i in range(0, len(files), CHUNK)]
    cpu_ms: dict[tuple[str, str], list[list[float]]] = {run: [] for run in alone}
    per_second: dict[tuple[str, str], list[float]] = {run: [] for run in alone}
    with _one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        for round_ in range(-1, rounds):  # the first warms up
            for run in alone:
                cpu_C = [_cpu_ms(partial(alone[run], chunk)) for chunk in chunks]
                start = time.perf_counter()
                if run[0] in (OURS, AGAIN):  # has threads of its own
                    shared[run](range(len(files)))
                else:
                    list(pool.map(shared[run], chunks))
                seconds = time.perf_counter() - start
                if round_ >= 0:
                    cpu_ms[run].append(cpu_C)
                    per_second[run].append(len(files) / seconds)
    rows: list[dict[str, Any]] = []
    for decoder, name in alone:
        cpu_RC = np.array(cpu_ms[decoder, name]) / len(files)
        rows.append(
            {
                "name": decoder,
                "input": name,
                "bytes": round(sum(map(len, works[name].files)) / len(files)),
                "cpu_ms": spread(cpu_RC.sum(axis=1).tolist()),
                "cpu_ms_quiet": float(cpu_RC.min(axis=0).sum()),
                "images_per_second": spread(per_second[decoder, name]),
            }
        )
    return rows + [{"name": name, "input": "all", "missing": why} for name, why in missing.items()]


def _cpu_ms(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
