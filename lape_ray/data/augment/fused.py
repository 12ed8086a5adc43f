"""A layer of per-image operations as one kernel on a GPU, written in Triton.

What `layers` does with an operator for each step of each kind of operation (hundreds of launches, and as many passes
over the memory), this does with one pass: each program takes some pixels of one image through that image's operation.
Where an operation depends on the whole image (autocontrast, equalize, contrast), a small kernel makes its table first.

Levels are Pillow's as those of `layers` are; rotations come nearer to it, as the kernel computes Pillow's own cubic
convolution. A blur is left to `filters`, and a turn of the hue to `hue`.

Shapes: B images, C=3 channels, H rows, W columns, V=256 levels, R images of a few kinds.
"""

# Triton reads the source of the kernels, and knows annotations of compile-time constants only.
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lape_ray.data.augment.filters import gaussian_blur
from lape_ray.data.augment.geometry import NUDGE
from lape_ray.data.augment.hue import adjust_hue
from lape_ray.data.augment.layers import Kind, Layer

TABLED = (Kind.AUTOCONTRAST, Kind.EQUALIZE, Kind.CONTRAST)  # their tables depend on the image
OPTIONS = {"enable_fp_fusion": False}
"""Options of the compiler. Pillow rounds products and sums each by itself: they must not become one operation."""
_PIXELS = 256  # of a program of 4 warps, which then takes about 64 registers and spills none
_COUNTED = 1024  # pixels of a step, in an image that gets a table

_TABLE = tl.constexpr(int(Kind.TABLE))
_AUTOCONTRAST = tl.constexpr(int(Kind.AUTOCONTRAST))
_EQUALIZE = tl.constexpr(int(Kind.EQUALIZE))
_CONTRAST = tl.constexpr(int(Kind.CONTRAST))
_COLOR = tl.constexpr(int(Kind.COLOR))
_SHARPNESS = tl.constexpr(int(Kind.SHARPNESS))
_SHIFT_ROWS = tl.constexpr(int(Kind.SHIFT_ROWS))
_HUE = tl.constexpr(int(Kind.HUE))
_BLUR = tl.constexpr(int(Kind.BLUR))
_NUDGE = tl.constexpr(NUDGE)


@triton.jit
def _grey(red, green, blue):
    """Compute `color.grey_levels`; exact in float32."""
    weighted = red * (19595 / 65536) + green * (38470 / 65536) + blue * (7471 / 65536)
    return tl.floor(weighted + 0.5)


@triton.jit
def _blend(degenerate, level, factor):
    """Compute `color.blend`, as a whole number."""
    return tl.minimum(tl.maximum((level - degenerate) * factor + degenerate, 0.0), 255.0).to(tl.int32)


@triton.jit
def _weight(tap, t, bend):
    """Compute the weight of neighbour `tap` of four, at the fraction `t`; `bend` is 0 for bilinear interpolation."""
    inner = tl.where(tap == 1, 1 - t, t) * (1 + bend)
    outer = tl.where(tap == 0, t - 1, -t) * bend
    return tl.where((tap == 1) | (tap == 2), inner, outer)


@triton.jit
def _make_tables(
    images, by_image, by_channel, by_row, by_column, rows, kinds, amounts, tables,
    WIDTH: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make the tables (B, C, V) of the images `rows` whose kind looks at all of the image, one program a channel."""
    row = tl.load(rows + tl.program_id(0))
    channel = tl.program_id(1)
    kind = tl.load(kinds + row)
    image = images + row.to(tl.int64) * by_image
    level = tl.arange(0, 256)
    place = tl.arange(0, BLOCK)
    if kind == _CONTRAST:
        total = tl.zeros([BLOCK], tl.int32)
        for start in range(0, PIXELS, BLOCK):
            pixel = start + place
            at = image + (pixel // WIDTH) * by_row + (pixel % WIDTH) * by_column
            within = pixel < PIXELS
            red = tl.load(at, mask=within, other=0).to(tl.float32)
            green = tl.load(at + by_channel, mask=within, other=0).to(tl.float32)
            blue = tl.load(at + 2 * by_channel, mask=within, other=0).to(tl.float32)
            total += _grey(red, green, blue).to(tl.int32)
        mean = tl.floor(tl.sum(total, 0).to(tl.float64) / PIXELS + 0.5).to(tl.float32)
        table = _blend(mean, level.to(tl.float32), tl.load(amounts + row))
    else:
        counts = tl.zeros([256], tl.int32)
        for start in range(0, PIXELS, BLOCK):
            pixel = start + place
            at = image + channel * by_channel + (pixel // WIDTH) * by_row + (pixel % WIDTH) * by_column
            counts += tl.histogram(tl.load(at, mask=pixel < PIXELS, other=0).to(tl.int32), 256)
        beyond: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK * BLOCK - PIXELS  # which were counted as 0
        counts -= tl.where(level == 0, beyond, 0)
        low = tl.min(tl.where(counts > 0, level, 255), 0)
        high = tl.max(tl.where(counts > 0, level, 0), 0)
        if kind == _EQUALIZE:
            step = (PIXELS - tl.sum(tl.where(level == high, counts, 0), 0)) // 255
            below = tl.cumsum(counts, 0) - counts
            flat = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
            table = tl.where(step > 0, flat, level)
        else:
            first = low.to(tl.float64)
            scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
            stretched = level.to(tl.float64) * scale - first * scale
            stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0)
            table = tl.where(high > low, stretched.to(tl.int32), level)
    tl.store(tables + (row * 3 + channel) * 256 + level, table.to(tl.uint8))


@triton.jit
def _run_layer(
    images, by_image, by_channel, by_row, by_column, out,
    kinds, amounts, given_tables, made_tables, matrices, cubics, fill,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Apply each image's operation; `out` (B, C, H, W) is in channels_last memory."""
    row = tl.program_id(1)
    kind = tl.load(kinds + row)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = pixel < HEIGHT * WIDTH
    y, x = pixel // WIDTH, pixel % WIDTH
    image = images + row.to(tl.int64) * by_image
    to = out + row.to(tl.int64) * (HEIGHT * WIDTH * 3) + pixel * 3
    here = image + y * by_row + x * by_column
    if kind >= _SHIFT_ROWS:
        # Where the pixel's centre comes from, and the four neighbours of that in each direction.
        matrix = matrices + row * 6
        centre_x, centre_y = x.to(tl.float64) + 0.5, y.to(tl.float64) + 0.5
        from_x = tl.load(matrix) * centre_x + tl.load(matrix + 1) * centre_y + tl.load(matrix + 2)
        from_y = tl.load(matrix + 3) * centre_x + tl.load(matrix + 4) * centre_y + tl.load(matrix + 5)
        inside = (from_x >= 0) & (from_x < WIDTH) & (from_y >= 0) & (from_y < HEIGHT)
        # What lies outside is not read, and its place may be no number of 32 bits.
        from_x = tl.where(inside, from_x, 0.5) - 0.5
        from_y = tl.where(inside, from_y, 0.5) - 0.5
        whole_x, whole_y = tl.floor(from_x), tl.floor(from_y)
        t_x, t_y = (from_x - whole_x).to(tl.float32), (from_y - whole_y).to(tl.float32)
        cubic = tl.load(cubics + row).to(tl.float32)
        bend_x, bend_y = cubic * t_x * (1 - t_x), cubic * t_y * (1 - t_y)
        first_x, first_y = whole_x.to(tl.int32) - 1, whole_y.to(tl.int32) - 1
        red = tl.zeros([BLOCK], tl.float32)
        green = tl.zeros([BLOCK], tl.float32)
        blue = tl.zeros([BLOCK], tl.float32)
        for i in range(4):  # not unrolled, which would take all registers
            line = tl.minimum(tl.maximum(first_y + i, 0), HEIGHT - 1)
            weight_y = _weight(i, t_y, bend_y)
            for j in tl.static_range(4):
                column = tl.minimum(tl.maximum(first_x + j, 0), WIDTH - 1)
                weight = weight_y * _weight(j, t_x, bend_x)
                at = image + line * by_row + column * by_column
                read = within & inside
                red += weight * tl.load(at, mask=read, other=0).to(tl.float32)
                green += weight * tl.load(at + by_channel, mask=read, other=0).to(tl.float32)
                blue += weight * tl.load(at + 2 * by_channel, mask=read, other=0).to(tl.float32)
        red = tl.minimum(tl.maximum(red + _NUDGE, 0.0), 255.0).to(tl.int32)
        green = tl.minimum(tl.maximum(green + _NUDGE, 0.0), 255.0).to(tl.int32)
        blue = tl.minimum(tl.maximum(blue + _NUDGE, 0.0), 255.0).to(tl.int32)
        tl.store(to, tl.where(inside, red, tl.load(fill).to(tl.int32)).to(tl.uint8), mask=within)
        tl.store(to + 1, tl.where(inside, green, tl.load(fill + 1).to(tl.int32)).to(tl.uint8), mask=within)
        tl.store(to + 2, tl.where(inside, blue, tl.load(fill + 2).to(tl.int32)).to(tl.uint8), mask=within)
    elif kind == _SHARPNESS:
        factor = tl.load(amounts + row)
        kernel = within & (y > 0) & (y < HEIGHT - 1) & (x > 0) & (x < WIDTH - 1)
        for channel in tl.static_range(3):
            at = here + channel * by_channel
            level = tl.load(at, mask=within, other=0).to(tl.int32)
            total = 4 * level
            for i in tl.static_range(3):
                for j in tl.static_range(3):
                    near = at + (i - 1) * by_row + (j - 1) * by_column
                    total += tl.load(near, mask=kernel, other=0).to(tl.int32)
            smooth = tl.floor(total.to(tl.float32) * (1 / 13) + 0.5)
            sharp = _blend(smooth, level.to(tl.float32), factor)
            tl.store(to + channel, tl.where(kernel, sharp, level).to(tl.uint8), mask=within)
    elif kind == _COLOR:
        factor = tl.load(amounts + row)
        red = tl.load(here, mask=within, other=0).to(tl.float32)
        green = tl.load(here + by_channel, mask=within, other=0).to(tl.float32)
        blue = tl.load(here + 2 * by_channel, mask=within, other=0).to(tl.float32)
        grey = _grey(red, green, blue)
        tl.store(to, _blend(grey, red, factor).to(tl.uint8), mask=within)
        tl.store(to + 1, _blend(grey, green, factor).to(tl.uint8), mask=within)
        tl.store(to + 2, _blend(grey, blue, factor).to(tl.uint8), mask=within)
    elif kind == _TABLE:
        for channel in tl.static_range(3):
            level = tl.load(here + channel * by_channel, mask=within, other=0).to(tl.int32)
            tl.store(to + channel, tl.load(given_tables + row * 256 + level), mask=within)
    elif (kind == _AUTOCONTRAST) | (kind == _EQUALIZE) | (kind == _CONTRAST):
        for channel in tl.static_range(3):
            level = tl.load(here + channel * by_channel, mask=within, other=0).to(tl.int32)
            tl.store(to + channel, tl.load(made_tables + (row * 3 + channel) * 256 + level), mask=within)
    elif (kind != _HUE) & (kind != _BLUR):
        for channel in tl.static_range(3):
            tl.store(to + channel, tl.load(here + channel * by_channel, mask=within, other=0), mask=within)


def plan_fused(layers: Sequence[Layer]) -> dict[str, np.ndarray]:
    """Make the arrays that `run_fused` needs on the device for `layers`, all of one batch, by name."""
    arrays = dict[str, np.ndarray]()
    for i, layer in enumerate(layers):
        kind_B = layer.kind_B
        rotated_B = kind_B >= Kind.AFFINE_BILINEAR
        arrays |= {
            f"rows_R{i}": np.flatnonzero(np.isin(kind_B, TABLED)).astype(np.int32),
            f"kind_B{i}": kind_B.astype(np.int32),
            f"amount_B{i}": layer.amount_B,
            f"table_BV{i}": layer.table_BV,
            f"matrix_B6{i}": layer.matrix_B6,
            f"cubic_B{i}": np.where(rotated_B, kind_B == Kind.AFFINE_BICUBIC, layer.cubic_B),
            f"hue_R{i}": np.flatnonzero(kind_B == Kind.HUE),
            f"blur_R{i}": np.flatnonzero(kind_B == Kind.BLUR),
            f"taps_RK{i}": layer.taps_BK[kind_B == Kind.BLUR],
        }
    return arrays


def run_fused(
    layers: int, images_BCHW: Tensor, arrays: Mapping[str, Tensor], fill_C: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Apply a number of layers to uint8 images, as `layers.run_plan` does; yields the batch as one.

    How many images an operation has is the length of its array, so that the device is never waited for.

    Args:
        images_BCHW: uint8, any strides; not changed.
        arrays: those of `plan_fused` on the images' device.
        fill_C: uint8, the colour outside a moved image.
    """
    size, _, height, width = images_BCHW.shape
    x_BCHW = images_BCHW
    for i in range(layers if size else 0):
        kind_B, amount_B, rows_R = (arrays[f"{name}{i}"] for name in ("kind_B", "amount_B", "rows_R"))
        made_BCV = x_BCHW.new_empty((size, 3, 256) if len(rows_R) else (1,))
        if len(rows_R):
            _launch(_make_tables, (len(rows_R), 3),
                    x_BCHW, *x_BCHW.stride(), rows_R, kind_B, amount_B, made_BCV,
                    WIDTH=width, PIXELS=height * width, BLOCK=_COUNTED)  # fmt: skip
        out_BCHW = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
        _launch(_run_layer, (triton.cdiv(height * width, _PIXELS), size),
                x_BCHW, *x_BCHW.stride(), out_BCHW, kind_B, amount_B, arrays[f"table_BV{i}"], made_BCV,
                arrays[f"matrix_B6{i}"], arrays[f"cubic_B{i}"], fill_C,
                HEIGHT=height, WIDTH=width, BLOCK=_PIXELS)  # fmt: skip
        if len(hue_R := arrays[f"hue_R{i}"]):
            x_RCHW = x_BCHW.index_select(0, hue_R).contiguous()
            out_BCHW.index_copy_(0, hue_R, adjust_hue(x_RCHW, amount_B.index_select(0, hue_R)))
        if len(blur_R := arrays[f"blur_R{i}"]):
            x_RCHW = x_BCHW.index_select(0, blur_R).contiguous()
            out_BCHW.index_copy_(0, blur_R, gaussian_blur(x_RCHW, arrays[f"taps_RK{i}"]))
        x_BCHW = out_BCHW
    yield slice(0, size), x_BCHW


def _launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: int) -> None:
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current one
        kernel[grid](*arguments, **constants, **OPTIONS)
