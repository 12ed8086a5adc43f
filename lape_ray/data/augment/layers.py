"""Layers of per-image operations, and how a whole batch goes through them in few kernels.

A layer says, for each image of a batch, which kind of operation it gets and with which parameters; all of it is
drawn on the host. To run a layer, the batch is put in the order of the kinds, so that the images of one kind are
neighbours and go through one kernel call together. The host knows the order and the counts, so the device is never
waited for, and the batch is put back in its own order only once, after the last layer.

Shapes: B images, C=3 channels, H rows, W columns, V=256 levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lape_ray.data.augment.color import (
    adjust_color,
    adjust_contrast,
    apply_table,
    autocontrast,
    equalize,
    identity_table,
)
from lape_ray.data.augment.filters import BLUR_TAPS, adjust_sharpness, gaussian_blur
from lape_ray.data.augment.geometry import affine, shift_columns, shift_rows
from lape_ray.data.augment.hue import adjust_hue

_COLUMNS = ("amount_B", "table_BV", "matrix_B6", "cubic_B", "taps_BK")


class Kind(IntEnum):
    """The kernels that an image can go through, and the columns of a `Layer` that each reads.

    From SHIFT_ROWS on they move pixels, by the matrix.
    """

    IDENTITY = 0
    TABLE = 1  # table
    AUTOCONTRAST = 2
    EQUALIZE = 3
    CONTRAST = 4  # amount: factor
    COLOR = 5  # amount: factor
    HUE = 6  # amount: steps of 1/256
    SHARPNESS = 7  # amount: factor
    BLUR = 8  # taps
    SHIFT_ROWS = 9  # matrix (1, b, c, 0, 1, 0), cubic
    SHIFT_COLUMNS = 10  # matrix (1, 0, 0, d, 1, f), cubic
    AFFINE_BILINEAR = 11  # matrix
    AFFINE_BICUBIC = 12  # matrix


class Layer:
    """One operation for each of `size` images, on the host; made as the identity, then filled by rows.

    Attributes:
        kind_B: of `Kind`.
        amount_B: float32, what the kind says.
        table_BV: uint8, the new level of each level.
        matrix_B6: float64, (a, b, c, d, e, f) of `geometry`.
        cubic_B: bool; interpolate bicubically, else bilinearly.
        taps_BK: float32, of `filters.blur_taps`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.kind_B = np.full(size, Kind.IDENTITY, dtype=np.int64)
        self.amount_B = np.zeros(size, dtype=np.float32)
        self.table_BV = np.tile(identity_table(), (size, 1))
        self.matrix_B6 = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (size, 1))
        self.cubic_B = np.zeros(size, dtype=np.bool_)
        self.taps_BK = np.zeros((size, BLUR_TAPS), dtype=np.float32)


class _Arguments(NamedTuple):
    """The columns of a layer on the device, for the images of one kernel call."""

    amount_B: Tensor
    table_BV: Tensor
    matrix_B6: Tensor
    cubic_B: Tensor
    taps_BK: Tensor
    fill_C: Tensor


_KERNELS: dict[Kind, Callable[[Tensor, _Arguments], Tensor]] = {
    Kind.IDENTITY: lambda x, a: x,
    Kind.TABLE: lambda x, a: apply_table(x, a.table_BV.unsqueeze(1)),
    Kind.AUTOCONTRAST: lambda x, a: autocontrast(x),
    Kind.EQUALIZE: lambda x, a: equalize(x),
    Kind.CONTRAST: lambda x, a: adjust_contrast(x, a.amount_B),
    Kind.COLOR: lambda x, a: adjust_color(x, a.amount_B),
    Kind.HUE: lambda x, a: adjust_hue(x, a.amount_B),
    Kind.SHARPNESS: lambda x, a: adjust_sharpness(x, a.amount_B),
    Kind.BLUR: lambda x, a: gaussian_blur(x, a.taps_BK),
    Kind.SHIFT_ROWS: lambda x, a: shift_rows(x, a.matrix_B6[:, 1], a.matrix_B6[:, 2], a.cubic_B, a.fill_C),
    Kind.SHIFT_COLUMNS: lambda x, a: shift_columns(
        x, a.matrix_B6[:, 3], a.matrix_B6[:, 5], a.cubic_B, a.fill_C
    ),
    Kind.AFFINE_BILINEAR: lambda x, a: affine(x, a.matrix_B6, "bilinear", a.fill_C),
    Kind.AFFINE_BICUBIC: lambda x, a: affine(x, a.matrix_B6, "bicubic", a.fill_C),
}


class KindSlice(NamedTuple):
    """Neighbouring images of one kind: `start` up to `stop` of their chunk."""

    kind: Kind
    start: int
    stop: int


class Chunk(NamedTuple):
    """The images `start` up to `stop` of the batch, and the slices by kind into which each layer orders them."""

    start: int
    stop: int
    layers: list[list[KindSlice]]


class Plan(NamedTuple):
    """The way of a batch through its layers, and the arrays that `run_plan` needs on the device, by name."""

    chunks: list[Chunk]
    arrays: dict[str, np.ndarray]


def plan_layers(layers: Sequence[Layer], *, size: int, chunk_size: int) -> Plan:
    """Order a batch of `size` images by kind for each layer, within chunks of `chunk_size` images.

    A chunk goes through all layers before the next one starts.
    """
    chunks = [Chunk(start, min(start + chunk_size, size), []) for start in range(0, size, chunk_size)]
    arrays = {}
    image_B = np.arange(size)  # which image stands in each place; it never leaves its chunk
    for i, layer in enumerate(layers):
        step_B = np.lexsort((layer.kind_B[image_B], image_B // chunk_size))
        image_B = image_B[step_B]
        arrays[f"order_B{i}"] = step_B % chunk_size
        for name in _COLUMNS:
            arrays[f"{name}{i}"] = getattr(layer, name)[image_B]
        for chunk in chunks:
            kinds, starts = np.unique(layer.kind_B[image_B[chunk.start : chunk.stop]], return_index=True)
            stops = [*starts[1:].tolist(), chunk.stop - chunk.start]
            chunk.layers.append(list(map(KindSlice, map(Kind, kinds), starts.tolist(), stops)))
    arrays["restore_B"] = np.argsort(image_B) % chunk_size
    return Plan(chunks, arrays)


def run_plan(
    plan: Plan, images_BCHW: Tensor, arrays: Mapping[str, Tensor], fill_C: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Apply the layers to uint8 images, chunk by chunk.

    Args:
        plan: of `plan_layers`.
        images_BCHW: uint8, any strides; not changed.
        arrays: the plan's arrays on the images' device.
        fill_C: uint8, the colour outside a moved image.

    Yields:
        For each chunk its place in the batch and the finished uint8 images, in the batch's order.
    """
    for start, stop, layers in plan.chunks:
        chunk = slice(start, stop)
        x_BCHW = images_BCHW[chunk]
        for i, slices in enumerate(layers):
            x_BCHW = x_BCHW.index_select(0, arrays[f"order_B{i}"][chunk]).contiguous()
            columns = {name: arrays[f"{name}{i}"][chunk] for name in _COLUMNS}
            parts = [
                _KERNELS[kind](
                    x_BCHW[a:b],
                    _Arguments(fill_C=fill_C, **{name: column[a:b] for name, column in columns.items()}),
                )
                for kind, a, b in slices
            ]
            x_BCHW = torch.cat(parts)
        yield chunk, x_BCHW.index_select(0, arrays["restore_B"][chunk])
