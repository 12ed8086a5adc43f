"""Crops of stored images, decoded and resized in C++ with one call for a whole batch.

    Decoder                a pool of threads and its `decode_batch`
    Status                 what became of an image; `check` turns failures into a ValueError
    add_restart_markers    rewrites a JPEG, without loss, so that a crop of it is decoded without what lies around it
    crc32c                 the checksum behind each image of a .beton that this package writes
    random_resized_crops, flips, center_crops, boxes_of_resized    which crops to take; random ones are keyed, see below
    philox4x32             the generator behind them

The pixels are those of Pillow, bit for bit: libjpeg-turbo's accurate DCT and smooth chroma upsampling, then the
arithmetic of `Image.crop` and `Image.resize` (which rounds otherwise, by 1 of 255, where a crop is more than 100
times as high as wide). Only what a crop needs is decoded, which is where the speed is.

Random numbers are counter-based (Philox4x32-10): the key is the seed, the counter is the image's index in
the epoch's order over all ranks, the epoch and the purpose. An image's augmentation is thus a function of
(seed, epoch, index) and of nothing else: not of threads, batch size, ranks or what was drawn before.

Shape suffixes: B images of a batch, H and W pixels of the output, N anything counted.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

ABI = 3  # kAbi in module.cpp; both are raised when what one side relies on changes

Interpolation = Literal["bilinear", "bicubic"]
FILTERS: dict[str, int] = {"bilinear": 0, "bicubic": 1}
Array = npt.NDArray[Any]


def _load() -> Any:
    fix = "build it with `make setup` (or `pip install .`) in a checkout"
    try:
        module = importlib.import_module("_lape_ray_native")
    except ImportError as error:
        raise ImportError(f"the compiled crop decoder cannot be imported ({error}); {fix}") from error
    if module.ABI != ABI:
        raise ImportError(
            f"the compiled crop decoder {module.__file__} has version {module.ABI}, but this source tree needs "
            f"{ABI}; {fix}"
        )
    return module


_native = _load()


class Status(enum.IntEnum):
    """The outcome of an image. Its pixels are zeros unless it is OK."""

    OK = 0
    DAMAGED = 1
    BAD_HEADER = 2
    SIZE_MISMATCH = 3
    UNSUPPORTED = 4
    NO_MEMORY = 5
    BAD_BOX = 6
    OUT_OF_RANGE = 7
    BAD_MODE = 8
    TOO_LARGE = 9
    READ_FAILED = 10
    CUT_SHORT = 11
    WRONG_CHECKSUM = 12

    @property
    def text(self) -> str:
        """The status in words."""
        return str(_native.STATUS_TEXTS[self])


def check(statuses_B: Array, name: Callable[[int], str] = "image {} of the batch".format) -> None:
    """Raise a ValueError that names the images which are not OK, the first ten of them, and says why."""
    failed = np.flatnonzero(statuses_B)
    if len(failed):
        lines = [f"{name(int(i))}: {Status(statuses_B[i]).text}" for i in failed[:10]]
        more = f" and {len(failed) - 10} more" if len(failed) > 10 else ""
        raise ValueError(
            f"{len(failed)} of {len(statuses_B)} images cannot be read: {'; '.join(lines)}{more}"
        )


class Decoder:
    """Threads that decode batches; make one for a run. After a fork, the child must make its own.

    Args:
        threads: how many work on a batch, the caller's among them.
        simd: False: only code that runs on any processor, with the same result.
    """

    def __init__(self, threads: int, *, simd: bool = True) -> None:
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads={threads} is out of range; it must be from 1 to 1024")
        self._handle = _native.decoder(threads, simd)

    def decode_batch(
        self,
        file: Array,
        offsets_B: Array,
        lengths_B: Array,
        modes_B: Array,
        widths_B: Array,
        heights_B: Array,
        boxes_B4: Array,
        flips_B: Array,
        out_BHW3: Array,
        *,
        interpolation: Interpolation | Array = "bicubic",
        crop_first: bool = True,
        reference: bool = False,
        checksums: bool = False,
    ) -> Array:
        """Decode, crop, resize with antialiasing and flip: fills `out_BHW3` and returns the statuses (B,) int32.

        Nothing that a file holds can do worse than a status: sizes, offsets and boxes are not trusted. But JPEGs
        have no checksum, and damage that still reads as valid code goes unseen without `checksums`.
        Python's lock is released; one batch is decoded at a time.

        Args:
            file: uint8 (N,) in memory; or the descriptors of the open files that hold each image, int32 (B,): they
                are read, not mapped, so that a file which is cut short gives a status and not a bus error.
            offsets_B, lengths_B: where in the file each image's bytes are.
            modes_B: 0: a JPEG, 1: rows of RGB.
            widths_B, heights_B: size of each image in pixels; a JPEG must state the same.
            boxes_B4: x, y, width and height of what is taken of each image, in pixels.
            flips_B: whether the result is mirrored horizontally.
            out_BHW3: uint8, C-contiguous; its shape says the size to resize to.
            interpolation: a name, or for each image (B,) its index in `FILTERS`: 0 bilinear, 1 bicubic.
            crop_first: True: pixels outside the box do not count, as when a crop is resized (torchvision's
                RandomResizedCrop); boxes are whole numbers. False: the filter reaches past the box, as when a
                resized image is cropped (Resize, CenterCrop); boxes may be fractions.
            reference: decode JPEGs by libjpeg alone, from their beginning: slower, for comparisons.
            checksums: behind each image's bytes in an open file lies their `crc32c`, 4 bytes, little endian; an
                image that does not agree with it is not decoded.

        Raises:
            ValueError: the arrays do not fit together.
        """
        images = len(offsets_B)
        filters_B = _filters(interpolation, images)
        _check_out(out_BHW3, images)
        bytes_N, descriptors_B = _open_or_in_memory(file, images, checksums)
        height, width = out_BHW3.shape[1:3]
        statuses_B = np.empty(images, np.int32)
        _native.decode(
            self._handle,
            bytes_N,
            descriptors_B,
            _column("offsets", offsets_B, np.uint64, images),
            _column("lengths", lengths_B, np.uint64, images),
            _column("modes", modes_B, np.uint8, images),
            _column("widths", widths_B, np.uint32, images),
            _column("heights", heights_B, np.uint32, images),
            _column("boxes", boxes_B4, np.float64, images, 4),
            _column("flips", flips_B, np.bool_, images),
            filters_B,
            out_BHW3,
            statuses_B,
            width,
            height,
            crop_first,
            reference,
            checksums,
        )
        return statuses_B


def _filters(interpolation: Interpolation | Array, images: int) -> Array:
    """Return each image's index in `FILTERS` (B,); ValueError if a name or an index is not known."""
    if isinstance(interpolation, str):
        if interpolation not in FILTERS:
            known = ", ".join(FILTERS)
            raise ValueError(f"interpolation={interpolation!r} is not known; choose one of {known}")
        return np.full(images, FILTERS[interpolation], np.uint8)
    filters_B = _column("interpolation", interpolation, np.uint8, images)
    if images and filters_B.max() >= len(FILTERS):
        raise ValueError(f"interpolation must hold indices from 0 to {len(FILTERS) - 1}")
    return filters_B


def _check_out(out_BHW3: Array, images: int) -> None:
    """Raise a ValueError where the extension could not write its pixels into `out_BHW3`."""
    shape = out_BHW3.shape
    if out_BHW3.dtype != np.uint8 or len(shape) != 4 or (shape[0], shape[3]) != (images, 3):
        raise ValueError(f"out is {out_BHW3.dtype} {shape}; it must be uint8 ({images}, H, W, 3)")
    if not out_BHW3.flags.c_contiguous or not out_BHW3.flags.writeable:
        raise ValueError("out must be C-contiguous and writeable")
    height, width = shape[1:3]
    if not (1 <= height <= 0xFFFF and 1 <= width <= 0xFFFF):
        raise ValueError(f"out has {height}x{width} pixels; a side must be from 1 to {0xFFFF}")


def _open_or_in_memory(file: Array, images: int, checksums: bool) -> tuple[Array, Array]:
    """Return the file's bytes in memory and the descriptors of open files, of which one is empty."""
    if file.dtype == np.int32:
        return np.empty(0, np.uint8), _column("descriptors", file, np.int32, images)
    if checksums:
        raise ValueError("checksums are read from open files only; give their descriptors")
    if file.dtype != np.uint8 or file.ndim != 1 or not file.flags.c_contiguous:
        raise ValueError(
            f"file is {file.dtype} {file.shape}; it must be contiguous uint8 (N,), or int32 (B,)"
        )
    return file, np.empty(0, np.int32)


def _column(name: str, values: Array, dtype: type, *shape: int) -> Array:
    """Convert `values` to what the extension reads; ValueError if a value or the shape does not fit."""
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
    if np.issubdtype(dtype, np.integer) and array.dtype != dtype and array.size:
        limits = np.iinfo(dtype)
        if array.dtype.kind not in "iub" or int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ValueError(f"{name} must be whole numbers from {limits.min} to {limits.max}")
    return np.ascontiguousarray(array, dtype)


def add_restart_markers(data: bytes, interval: int = 4) -> bytes:
    """Recode the JPEG `data` with the same coefficients, as a baseline JPEG with restart markers.

    A marker stands every `interval` MCUs.

    An MCU is the square of 8 or 16 pixels that JPEGs are coded in. From a marker, decoding can start, so that
    `Decoder` leaves out what lies around a crop. Any decoder reads the result; its Huffman tables are optimal,
    which makes up for the markers' bytes, and of the metadata only what decoding needs is kept.

    Raises:
        ValueError: the data is damaged, no JPEG, or of a kind that `Decoder` does not read (CMYK, 12 bits).
    """
    if not 1 <= interval <= 0xFFFF:
        raise ValueError(f"interval={interval} is out of range; it must be from 1 to {0xFFFF} MCUs")
    status, result = _native.add_restart_markers(data, interval)
    if status != Status.OK:
        raise ValueError(f"cannot add restart markers: {Status(status).text}")
    return bytes(result)


def crc32c(data: bytes, *, portable: bool = False) -> int:
    """Compute CRC-32C (RFC 3720, appendix B.4) of `data`; `portable`: without the processor's instruction for it."""
    return int(_native.crc32c(data, portable))


def random_resized_crops(
    seed: int,
    epoch: int,
    epoch_index_B: Array,
    widths_B: Array,
    heights_B: Array,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Draw boxes (B, 4) int32 of x, y, width and height, as torchvision's RandomResizedCrop distributes them.

    Args:
        epoch_index_B: each image's place in the order of the epoch, over all ranks.
        widths_B, heights_B: of the images, in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height.
    """
    if not (0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
        raise ValueError(f"scale={scale} and ratio={ratio} must each be two numbers with 0 < low <= high")
    images = len(epoch_index_B)
    widths_B = _column("widths", widths_B, np.uint32, images)
    heights_B = _column("heights", heights_B, np.uint32, images)
    if images and (min(widths_B.min(), heights_B.min()) < 1 or max(widths_B.max(), heights_B.max()) >= 2**31):
        raise ValueError("widths and heights must be at least 1 pixel")
    boxes_B4 = np.empty((images, 4), np.int32)
    epoch_index_B = _column("epoch_index", epoch_index_B, np.uint64, images)
    _native.random_resized_crops(
        *_run(seed, epoch), epoch_index_B, widths_B, heights_B, (*scale, *ratio), boxes_B4
    )
    return boxes_B4


def flips(seed: int, epoch: int, epoch_index_B: Array, probability: float = 0.5) -> Array:
    """Draw whether to flip each image, bool (B,); see `random_resized_crops` for the arguments."""
    flips_B = np.empty(len(epoch_index_B), np.bool_)
    epoch_index_B = _column("epoch_index", epoch_index_B, np.uint64, len(epoch_index_B))
    _native.flips(*_run(seed, epoch), epoch_index_B, probability, flips_B)
    return flips_B


def _run(seed: int, epoch: int) -> tuple[int, int]:
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**32):
        raise ValueError(f"seed={seed} and epoch={epoch} must be from 0 to 2**64 - 1 and 2**32 - 1")
    return seed, epoch


def center_crops(widths_B: Array, heights_B: Array, *, resize: int, size: int) -> Array:
    """Compute boxes (B, 4) float64 of torchvision's Resize and CenterCrop.

    They are for `decode_batch(..., crop_first=False)`.

    Args:
        widths_B, heights_B: of the images, in pixels.
        resize: length in pixels to which Resize brings an image's shorter side.
        size: side in pixels of the centre square that is then cut out: the side of the output.
    """
    if not 1 <= size <= resize:
        raise ValueError(f"size={size} must be from 1 to resize={resize}")
    sides_B2 = np.stack([widths_B, heights_B], axis=1).astype(np.int64)
    resized_B2 = resized_sides(sides_B2, resize)
    corner_B2 = np.round((resized_B2 - size) / 2)  # half to even, as Python's round in CenterCrop
    return boxes_of_resized(sides_B2, resized_B2, corner_B2, size)


def resized_sides(sides_B2: Array, resize: int) -> Array:
    """Compute width and height (B, 2) after torchvision's Resize of the shorter side to `resize` pixels."""
    return resize * sides_B2 // sides_B2.min(axis=1, keepdims=True)


def boxes_of_resized(sides_B2: Array, resized_B2: Array, corner_B2: Array, size: int) -> Array:
    """Compute the boxes (B, 4) float64 of images whose resized squares of `size` pixels begin at `corner_B2`.

    They are for `decode_batch(..., crop_first=False)`. Columns of all but the result are of width and height, in
    pixels.
    """
    scale_B2 = sides_B2 / resized_B2
    corner_B2 = corner_B2 * scale_B2
    return np.concatenate([corner_B2, np.minimum(size * scale_B2, sides_B2 - corner_B2)], axis=1)


def philox4x32(counters_N4: Array, key: tuple[int, int]) -> Array:
    """Run Philox4x32-10: four 32-bit words (N, 4) for each counter of four 32-bit words, under a key of two."""
    counters_N4 = _column("counters", counters_N4, np.uint32, len(counters_N4), 4)
    words_N4 = np.empty_like(counters_N4)
    _native.philox4x32(counters_N4, key, words_N4)
    return words_N4
