"""Batches of a split that lies on the training device as a whole.

They are for small images, which decoding and copying cost more than training on them.

Everything is decoded once, when the reader is made; for validation once for each `image_size`. From then on the draws
of an epoch are made and sent at its beginning, and a batch is a few kernels on the device: nothing is left to do for
the host.

Shapes: N images of a pass, B of a batch, S the side of a delivered image in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from lape_ray.data.augment.crop import crop_and_resize
from lape_ray.data.augment.transfer import to_device
from lape_ray.data.readers.buffers import Buffers
from lape_ray.data.readers.native import NativeReader, train_draws
from lape_ray.data.readers.reader import CenterCrop, ReaderOptions
from lape_ray.data.readers.simple import reflected
from lape_ray.data.sampler import sample_index

_DECODED_AT_ONCE = 1024
_CROPPED_PIXELS = 2**20
"""The pixels of several batches that are cropped in one go where they are small, which spares a GPU launches."""


class ResidentReader:
    """Images of one .beton or set, decoded into the memory of `device`: all of one square size, for validation any.

    The pixels are those of the native backend.

    Raises:
        ValueError: the training images are not all of one square size, or cannot be read; names the sizes or images.
    """

    reuses_buffers = False
    on_device = True

    def __init__(self, path: str, options: ReaderOptions) -> None:
        self.options, self.image_size, self.batch_size = options, options.image_size, options.batch_size
        trains = not isinstance(options.crop, CenterCrop)
        whole = CenterCrop(share=1.0, interpolation=options.crop.interpolation) if trains else options.crop
        host = torch.device("cpu")
        native = NativeReader(
            path, dataclasses.replace(options, crop=whole, batch_size=_DECODED_AT_ONCE, device=host)
        )
        if trains:
            native.image_size = _square_side(native, path)
        self.labels_N = native.labels_N
        self.images_N3SS = _decoded(native, options.device)
        self._native = None if trains else native

    def batches(
        self, keys_N: np.ndarray, epoch_index_N: np.ndarray, epoch: int
    ) -> Generator[Tensor, None, None]:
        """Yield the batches of one pass; see `Reader.batches`.

        They are views of channels-first memory on the device, which nothing else uses.
        """
        index_N, crop, device = sample_index(keys_N), self.options.crop, self.options.device
        if isinstance(crop, CenterCrop):
            if self._native is not None and self._native.image_size != self.image_size:
                self._native.image_size = self.image_size
                self.images_N3SS = _decoded(self._native, device)
            for index_B in to_device({"index": index_N}, device)["index"].split(self.batch_size):
                yield self.images_N3SS[index_B].permute(0, 2, 3, 1)
            return
        side = self.images_N3SS.shape[2]
        sides_N = np.full(len(index_N), side)
        draws = train_draws(crop, self.options.seed, epoch, epoch_index_N, sides_N, sides_N, self.image_size)
        arrays = {"index": index_N, "boxes": draws.boxes_N4, "flips": draws.flips_N, "cubic": draws.cubic_N}
        if draws.shifts_N2 is not None:
            arrays["shifts"] = draws.shifts_N2
        sent = to_device(arrays, device)
        group_size = max(1, _CROPPED_PIXELS // (self.batch_size * self.image_size**2)) * self.batch_size
        for start in range(0, len(index_N), group_size):
            index_B, boxes_B4, flips_B, cubic_B, *shifts = (
                sent[name][start : start + group_size] for name in sent
            )
            cropped = crop_and_resize(self.images_N3SS[index_B], boxes_B4, flips_B, cubic_B, self.image_size)
            cropped = _shifted(cropped, *shifts) if shifts else cropped
            for images_B3SS in cropped.split(self.batch_size):
                yield images_B3SS.permute(0, 2, 3, 1)


def _decoded(native: NativeReader, device: torch.device) -> Tensor:
    """Decode all images, uint8 (N, 3, S, S) on the device."""
    index_N = np.arange(len(native.labels_N))
    images_N3SS = torch.cat(
        [
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
            for images in native.batches(index_N, index_N, 0)
        ]
    )
    native.buffers = Buffers()  # those of before would keep their memory
    return images_N3SS


def _shifted(images_B3SS: Tensor, shifts_B2: Tensor) -> Tensor:
    """Do what `shift_reflected` does, on the images' device."""
    side = images_B3SS.shape[-1]
    place_S = torch.arange(side, device=images_B3SS.device)
    columns_BS, rows_BS = (reflected(place_S + shift_B1, side) for shift_B1 in shifts_B2[..., None].unbind(1))
    taken_B3SS = images_B3SS.gather(2, rows_BS[:, None, :, None].expand_as(images_B3SS))
    return taken_B3SS.gather(3, columns_BS[:, None, None].expand_as(images_B3SS))


def _square_side(native: NativeReader, path: str) -> int:
    images_N = native.contents.images_N
    sizes = np.unique(np.stack([images_N["width"], images_N["height"]], 1), axis=0).tolist()
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes[:3]) + (
            ", ..." if len(sizes) > 3 else ""
        )
        raise ValueError(
            f"{path} holds images of {shown} pixels; data.backend=resident trains on squares of one size: "
            "use data.backend=native"
        )
    return sizes[0][0]
