"""The fused kernels, run by Triton's interpreter, against PyTorch's operators and Pillow.

tests/data/test_fused_augment.py runs this file in a process of its own: Triton must be told to interpret before it is
imported, and cannot compile for others then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lape_ray.config import DataConfig
from lape_ray.data.augment import Augment, build_augment, fused
from lape_ray.data.augment.erasing import RandomErasing
from lape_ray.data.augment.filters import blur_taps
from lape_ray.data.augment.jitter import ColorJitter
from lape_ray.data.augment.layers import Kind, Layer, plan_layers, run_plan
from lape_ray.data.augment.randaugment import RandAugment, parse_rand_augment, rotation_matrix
from lape_ray.data.augment.transfer import to_device

CPU = torch.device("cpu")
FILL = (124, 116, 104)
PLAIN = DataConfig(mean=(0.5,) * 3, std=(0.25,) * 3)


def everything(data: DataConfig, *, image_size: int, seed: int, fused: bool) -> Augment:
    """Make more than a config can ask for: turns of the hue too."""
    size = (image_size, image_size)
    rand = parse_rand_augment("rand-m9-n3-p0.9-mstd2-inc1")
    policies = [
        RandAugment(rand, image_size=size, interpolation="random", seed=seed),
        ColorJitter((0.4, 0.3, 0.2, 0.1), seed=seed),
    ]
    erasing = RandomErasing(0.7, "pixel", image_size=size, seed=seed)
    return Augment(policies, erasing, image_size=size, mean=data.mean, std=data.std, fused=fused)


def pictures(count: int, height: int, width: int) -> Tensor:
    """Smooth and noisy images, uint8 in channels_last memory as a loader gives them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width, :1][:2]
    waves = [
        128 + 90 * np.sin(x / rng.uniform(2, 9, 3) + rng.uniform(0, 6, 3)) * np.cos(y / rng.uniform(2, 9, 3))
        for _ in range(count)
    ]
    noise = rng.normal(size=(count, height, width, 3)) * (10 * np.arange(count) % 40)[:, None, None, None]
    return torch.from_numpy((np.stack(waves) + noise).clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def of_every_kind(each: int, height: int, width: int) -> Layer:
    """`each` images of each kind, some of them bicubic, with arguments of their own."""
    rng = np.random.default_rng(1)
    size = each * len(Kind)
    layer = Layer(size)
    layer.kind_B[:] = np.arange(size) % len(Kind)
    layer.amount_B[:] = rng.uniform(0, 2, size)
    layer.amount_B[layer.kind_B == Kind.HUE] = rng.integers(-127, 128, each)
    layer.table_BV[:] = rng.integers(0, 256, (size, 256))
    layer.taps_BK[:] = blur_taps(rng.uniform(0.1, 2, size))
    layer.cubic_B[:] = np.arange(size) // len(Kind) % 2
    shear, shift, angle = (rng.uniform(-limit, limit, size) for limit in (0.4, 9.0, 40.0))
    shift[::5] = 1e12  # nothing but fill, and no number of 32 bits
    rows, columns = layer.kind_B == Kind.SHIFT_ROWS, layer.kind_B == Kind.SHIFT_COLUMNS
    layer.matrix_B6[rows, 1], layer.matrix_B6[rows, 2] = shear[rows], shift[rows]
    layer.matrix_B6[columns, 3], layer.matrix_B6[columns, 5] = shear[columns], shift[columns]
    rotated = layer.kind_B >= Kind.AFFINE_BILINEAR
    layer.matrix_B6[rotated] = rotation_matrix(angle[rotated], height, width)
    return layer


def by_operators(layer: Layer, images_BCHW: Tensor) -> Tensor:
    plan = plan_layers([layer], size=layer.size, chunk_size=layer.size)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    return next(run_plan(plan, images_BCHW, to_device(plan.arrays, CPU), fill))[1]


def by_kernels(layer: Layer, images_BCHW: Tensor) -> Tensor:
    arrays = to_device(fused.plan_fused([layer]), CPU)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    found: Tensor = next(fused.run_fused(1, images_BCHW, arrays, fill))[1]
    return found


@pytest.mark.parametrize(("height", "width", "contiguous"), [(32, 32, False), (20, 33, True)])
def test_kernels_give_the_levels_of_operators(height: int, width: int, contiguous: bool) -> None:
    """Every level, except of bicubic rotations, which the operators make by a rule that is near Pillow's."""
    layer = of_every_kind(3, height, width)
    images = pictures(layer.size, height, width)
    images = images.contiguous() if contiguous else images
    before = images.clone()
    wanted, found = by_operators(layer, images), by_kernels(layer, images)
    assert torch.equal(images, before)
    assert found.is_contiguous(memory_format=torch.channels_last)
    error = (wanted.int() - found.int()).abs()
    for kind in Kind:
        off = error[torch.from_numpy(layer.kind_B == kind)]
        if kind == Kind.AFFINE_BICUBIC:
            assert off.max() <= 4
        elif kind >= Kind.SHIFT_ROWS:
            assert off.max() <= 1 and (off > 0).float().mean() < 1e-3, kind.name
        else:
            assert off.max() == 0, kind.name


@pytest.mark.parametrize("cubic", [True, False])
def test_rotations_are_pillows(cubic: bool) -> None:
    images, angles = pictures(8, 32, 48), np.linspace(-30, 33, 8)
    layer = Layer(8)
    layer.kind_B[:] = Kind.AFFINE_BICUBIC if cubic else Kind.AFFINE_BILINEAR
    layer.matrix_B6[:] = rotation_matrix(angles, 32, 48)
    found = by_kernels(layer, images)
    for image, angle, got in zip(images, angles, found, strict=True):
        resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        wanted = np.asarray(picture.rotate(angle, resample=resample, fillcolor=FILL))
        error = (got.permute(1, 2, 0).int() - torch.from_numpy(wanted.copy()).int()).abs()
        assert error.max() <= 1 and (error > 0).float().mean() < 0.01


def test_images_of_one_level_and_of_two_keep_their_tables() -> None:
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    images[2:4], images[4:, :, 3:] = 255, 200
    layer = Layer(8)
    layer.kind_B[:] = [Kind.AUTOCONTRAST, Kind.EQUALIZE] * 4
    layer.kind_B[6:], layer.amount_B[:] = Kind.CONTRAST, 1.7
    assert torch.equal(by_kernels(layer, images), by_operators(layer, images))


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (build_augment, {"rand_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.25}),
        (build_augment, {"three_augment": True, "color_jitter": 0.3}),
        (everything, {}),
        (build_augment, {"erase_prob": 0.5}),
    ],
    ids=["deit", "deit_iii", "everything", "erasing"],
)
@pytest.mark.parametrize("size", [10, 0])
def test_a_whole_augmentation_is_that_of_operators(
    build: Callable[..., Augment], changes: dict[str, Any], size: int
) -> None:
    images = pictures(size, 32, 32) if size else torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    data = replace(PLAIN, **changes)
    found, wanted = (
        build(data, image_size=32, seed=3, fused=kernels)(images, epoch=1, epoch_index=np.arange(size))
        for kernels in (True, False)
    )
    assert found.shape == wanted.shape == images.shape
    # Rotations differ by a few levels, of which one is 0.016, and an operation after one may make more of them.
    assert ((found - wanted).abs() > 0.02).sum() <= 0.005 * found.numel()
    if build is build_augment and not data.rand_augment:
        assert torch.equal(found, wanted)
