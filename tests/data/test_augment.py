"""The augmentation against Pillow, timm and torchvision, and against itself in other batches."""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import threads
from helpers.photographs import cut
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from lape_ray.config import DataConfig
from lape_ray.data.augment import Augment, build_augment, randaugment
from lape_ray.data.augment.color import apply_table, posterize_table
from lape_ray.data.augment.draws import Stream, box_muller, normal, philox4x32, uniform, words
from lape_ray.data.augment.erasing import RandomErasing, hashed_normal
from lape_ray.data.augment.filters import blur_taps
from lape_ray.data.augment.geometry import affine, shift_columns, shift_rows
from lape_ray.data.augment.jitter import ColorJitter
from lape_ray.data.augment.layers import Kind, Layer, plan_layers, run_plan
from lape_ray.data.augment.randaugment import (
    INCREASING_TRANSFORMS,
    TRANSFORMS,
    RandAugment,
    parse_rand_augment,
    rotation_matrix,
    set_transform,
    transform_argument,
)
from lape_ray.data.augment.three_augment import ThreeAugment
from lape_ray.data.augment.transfer import to_device

torchvision_transforms = pytest.importorskip("torchvision.transforms")


def timm_module(name: str) -> ModuleType:
    """timm.data.<name> without timm, which takes seconds to import all its models."""
    timm = importlib.util.find_spec("timm")
    if timm is None or timm.origin is None:
        pytest.skip("timm is not installed", allow_module_level=True)
    spec = importlib.util.spec_from_file_location(name, Path(timm.origin).parent / "data" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


timm_augment, timm_erasing = timm_module("auto_augment"), timm_module("random_erasing")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)  # MEAN in levels
NONE = DataConfig(mean=MEAN, std=STD)
DEIT = replace(NONE, rand_augment="rand-m9-mstd0.5-inc1", erase_prob=0.25)
DEIT_III = replace(NONE, three_augment=True, color_jitter=0.3)
EVERYTHING = "everything"  # more than a config can ask for: turns of the hue too


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """uint8 (B, 3, H, W) in channels_last memory, as a loader gives it."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Eight photographs, 224 wide and 192 high."""
    return [cut(number, (224, 192)) for number in range(24, 32)]


@pytest.fixture(scope="module")
def thumbnails() -> list[Image.Image]:
    """64 photographs, 32 px."""
    return [cut(number, (32, 32)) for number in range(64)]


@pytest.fixture(params=["photos", "thumbnails"])
def images(request: pytest.FixtureRequest) -> list[Image.Image]:
    return request.getfixturevalue(request.param)


def run_layers(layers: list[Layer], images_BCHW: torch.Tensor, chunk_size: int = 5) -> torch.Tensor:
    plan = plan_layers(layers, size=len(images_BCHW), chunk_size=chunk_size)
    arrays = to_device(plan.arrays, images_BCHW.device)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    return torch.cat([x for _, x in run_plan(plan, images_BCHW, arrays, fill)])


def difference(got_BCHW: torch.Tensor, expected: list[Image.Image]) -> torch.Tensor:
    assert got_BCHW.dtype == torch.uint8
    return (got_BCHW.int() - to_tensor(expected).int()).abs()


# ---------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers_of_random123(counter, key, expected):
    counters = [np.array([c, c], dtype=np.uint64) for c in counter]
    assert philox4x32(counters, key).tolist() == [list(expected)] * 2


def test_words_are_counted_as_documented():
    seed, epoch, position, stream = 0x1234567890ABCDEF, 7, 0xA1B2C3D4E5, Stream.ERASING
    drawn = words(seed, epoch, np.array([3, position]), stream, 6)
    for block in range(2):
        counter = [np.array(c) for c in (0xB2C3D4E5, 0xA1, epoch, (3 << 16) + block)]
        expected = philox4x32(counter, (0x90ABCDEF, 0x12345678))
        assert drawn[1, 4 * block : 4 * block + 4].tolist() == expected[: 6 - 4 * block].tolist()


def test_draws_depend_on_every_part_of_the_key_and_on_nothing_else():
    epoch_index = np.arange(50)
    drawn = uniform(1, 2, epoch_index, Stream.FLIP, 5)
    shuffled = np.random.default_rng(0).permutation(epoch_index)
    assert np.array_equal(uniform(1, 2, shuffled, Stream.FLIP, 5), drawn[shuffled])
    assert np.array_equal(uniform(1, 2, epoch_index[:1], Stream.FLIP, 9)[:, :5], drawn[:1])
    others = [
        uniform(2, 2, epoch_index, Stream.FLIP, 5),
        uniform(1 + 2**32, 2, epoch_index, Stream.FLIP, 5),
        uniform(1, 3, epoch_index, Stream.FLIP, 5),
        uniform(1, 2, epoch_index + 2**32, Stream.FLIP, 5),
        uniform(1, 2, epoch_index, Stream.CROP, 5),
    ]
    for other in others:
        assert np.intersect1d(other, drawn).size == 0


def test_uniform_and_normal_have_their_distributions():
    u = uniform(0, 0, np.arange(20_000), Stream.COLOR_JITTER, 4)
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    z = normal(0, 0, np.arange(20_000), Stream.COLOR_JITTER, 4)
    assert stats.kstest(z.ravel(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(z.T) - np.eye(4)).max() < 0.03
    assert np.array_equal(
        z[:, 1], box_muller(*uniform(0, 0, np.arange(20_000), Stream.COLOR_JITTER, 8)[:, 2:4].T)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, np.arange(2)), "seed=-1"),
        ((2**64, 0, np.arange(2)), "seed="),
        ((0, -1, np.arange(2)), "epoch=-1"),
        ((0, 2**32, np.arange(2)), "epoch="),
        ((0, 0, np.array([1, -1])), "epoch_index"),
        ((0, 0, np.array([0.5])), "epoch_index"),
        ((0, 0, np.zeros((2, 2), dtype=int)), "epoch_index"),
    ],
)
def test_bad_keys_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniform(*arguments, Stream.CROP, 1)


# ---------------------------------------------------------------------------------------------- RandAugment


@pytest.mark.parametrize(
    "text",
    [
        "rand",
        "rand-m9-mstd0.5-inc1",
        "rand-m7-n3-p0.3-mstd1.5-inc0",
        "rand-m20-mmax30-inc1",
        "rand-mstd101",
        "rand-mmax0",
    ],
)
def test_notation_is_read_as_timm_reads_it(text):
    config, theirs = parse_rand_augment(text), timm_augment.rand_augment_transform(text, {"img_mean": FILL})
    op = theirs.ops[0]
    assert config.transforms == tuple(op.name for op in theirs.ops)
    assert (config.layers, config.magnitude, config.probability) == (theirs.num_layers, op.magnitude, op.prob)
    assert (config.magnitude_std, config.magnitude_max) == (op.magnitude_std, op.magnitude_max or 10)


@pytest.mark.parametrize(
    "text",
    ["", "augmix-m3", "rand-x3", "rand-m", "rand-m9.5", "rand-w0", "rand-tweights", "rand-m9-m8", "rand-inc2",
     "rand-n0", "rand-p1.5", "rand-mstd1.2.3", "rand--m9", "rand-m-9", "RAND-m9"],
)  # fmt: skip
def test_bad_notation_is_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match="rand_augment=") as error:
        parse_rand_augment(text)
    assert "twice" in str(error.value) or "rand[-m" in str(error.value)


@pytest.mark.parametrize("name", sorted({*TRANSFORMS, *INCREASING_TRANSFORMS}))
def test_arguments_equal_timms_level_functions(name, monkeypatch):
    magnitude = np.linspace(0, 10, 401)
    level = timm_augment.LEVEL_TO_ARG[name]
    for negative in (False, True):
        monkeypatch.setattr(timm_augment.random, "random", lambda negative=negative: float(negative))
        got = transform_argument(name, magnitude, np.full(len(magnitude), negative))
        if level is None:
            assert not got.any()
        else:
            expected = [level(m, {})[0] for m in magnitude]
            np.testing.assert_allclose(got, expected, rtol=1e-15, atol=1e-15)


def test_unknown_transform_is_refused():
    with pytest.raises(ValueError, match=r"'Cutout' is not known.*AutoContrast"):
        transform_argument("Cutout", np.ones(1), np.ones(1, dtype=bool))


GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.mark.parametrize("name", sorted({*TRANSFORMS, *INCREASING_TRANSFORMS}))
def test_transforms_equal_timms_on_pillow(name, images):
    """Colour transforms: every level equal. Shears and shifts: 1 level, rarely. Rotation: 3, and 1 in one of 10."""
    resamples = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR) if name in GEOMETRIC else (None,)
    for resample in resamples:
        # A shift by a multiple of 1/5 of a pixel would give many sums that float64 itself has a hair off a level.
        for i, magnitude in enumerate((0.0, 2.7, 4.97, 8.6, 9.4, 9.97 if name in GEOMETRIC else 10.0)):
            mine, negative = images[i::6] if len(images) > 8 else images[:4], bool(i % 2)
            width, height = mine[0].size
            argument = transform_argument(name, np.full(len(mine), magnitude), np.full(len(mine), negative))
            layer = Layer(len(mine))
            layer.cubic_B[:] = resample == Image.Resampling.BICUBIC
            set_transform(layer, np.arange(len(mine)), name, argument, (height, width))
            got = run_layers([layer], to_tensor(mine))

            value = int(argument[0]) if "Posterize" in name or "Solarize" in name else argument[0]
            arguments = () if timm_augment.LEVEL_TO_ARG[name] is None else (value,)
            kwargs = {"fillcolor": FILL, "resample": resample}
            apply = timm_augment.NAME_TO_OP[name]
            error = difference(got, [apply(image, *arguments, **dict(kwargs)) for image in mine])
            share = (error > 0).float().mean().item()
            if name not in GEOMETRIC:
                assert error.max() == 0
            elif name == "Rotate" and resample == Image.Resampling.BICUBIC:
                assert error.max() <= 4 and share < 0.1 and (error > 1).float().mean() < 1e-3
            else:
                assert error.max() <= 1 and share < 0.01


def test_posterizing_to_no_bits_is_black_as_in_pillow_12():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    tables = torch.from_numpy(posterize_table(np.array([0, -2, 8, 9])))
    got = apply_table(x.expand(4, -1, -1, -1), tables.unsqueeze(1))
    assert not got[:2].any()
    assert torch.equal(got[2:], x.expand(2, -1, -1, -1))


@pytest.mark.parametrize("cubic", [True, False])
def test_flat_images_stay_flat_under_geometry(cubic):
    level = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 24, 40).contiguous()
    B, fill = len(level), torch.tensor([255, 255, 255], dtype=torch.uint8)
    rng = np.random.default_rng(0)
    amount, zero = torch.from_numpy(rng.uniform(-0.4, 0.4, B)), torch.zeros(B, dtype=torch.float64)
    cubic_B = torch.full((B,), cubic)
    matrix = torch.from_numpy(rotation_matrix(rng.uniform(-40, 40, B), 24, 40))
    for moved in (
        shift_rows(level, amount, zero, cubic_B, fill),
        shift_columns(level, zero, 10 * amount, cubic_B, fill),
        affine(level, matrix, "bicubic" if cubic else "bilinear", fill),
    ):
        assert ((moved == level) | (moved == 255)).all()
        assert (moved == level).float().mean() > 0.5


def test_images_of_one_level_and_of_two_are_kept_by_autocontrast_and_equalize():
    flat = Image.new("RGB", (32, 32), (7, 0, 255))
    two = Image.new("RGB", (32, 32), (10, 20, 30))
    two.paste((11, 250, 30), (0, 0, 5, 5))
    for name in ("AutoContrast", "Equalize"):
        layer = Layer(2)
        set_transform(layer, np.arange(2), name, np.zeros(2), (32, 32))
        apply = timm_augment.NAME_TO_OP[name]
        assert difference(run_layers([layer], to_tensor([flat, two])), [apply(flat), apply(two)]).max() == 0


def draw_ours(text: str, n: int, interpolation: str = "random") -> list[tuple[str, float, bool]]:
    """(transform, argument, bicubic) of every operation that n images get."""
    drawn: list[tuple[str, float, bool]] = []

    def record(
        layer: Layer, rows: np.ndarray, name: str, argument_N: np.ndarray, size: tuple[int, int]
    ) -> None:
        drawn.extend(
            (name, value, cubic) for value, cubic in zip(argument_N, layer.cubic_B[rows], strict=True)
        )

    policy = RandAugment(parse_rand_augment(text), image_size=(100, 100), interpolation=interpolation, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randaugment, "set_transform", record)
        policy.draw(0, np.arange(n))
    return drawn


def draw_timms(text: str, n: int) -> list[tuple[str, float, bool]]:
    policy = timm_augment.rand_augment_transform(text, {"img_mean": FILL})
    drawn: list[tuple[str, float, bool]] = []
    for op in policy.ops:

        def record(image: None, *arguments: float, name: str = op.name, **kwargs: object) -> None:
            timm_augment._check_args_tf(kwargs)
            value = float(arguments[0]) if arguments else 0.0
            drawn.append((name, value, kwargs["resample"] == Image.Resampling.BICUBIC))

        op.aug_fn = record
    for _ in range(n):
        policy(None)
    return drawn


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m6-n3-p0.7-mstd200", "rand-m8-mstd2-inc1"])
def test_draws_are_distributed_as_timms(text):
    """Counts by chi-square, arguments by Kolmogorov-Smirnov, at fixed seeds."""
    timm_augment.random.seed(0)
    np.random.seed(0)
    n = 6000
    ours, theirs = draw_ours(text, n), draw_timms(text, n)
    counts = Counter(name for name, _, _ in ours), Counter(name for name, _, _ in theirs)
    config = parse_rand_augment(text)
    assert set(counts[0]) == set(counts[1]) == set(config.transforms)
    expected = n * config.layers * config.probability / 15
    assert stats.chisquare([*counts[0].values()], [sum(counts[0].values()) / 15] * 15).pvalue > 0.01
    assert abs(sum(counts[0].values()) - 15 * expected) < 4 * math.sqrt(15 * expected)
    assert stats.chi2_contingency([[c[name] for name in counts[0]] for c in counts]).pvalue > 0.01
    for name in counts[0]:
        values = [np.array([v for other, v, _ in drawn if other == name]) for drawn in (ours, theirs)]
        levels = np.unique(np.concatenate(values))
        if 1 < len(levels) < 10:
            table = [[(v == level).sum() for level in levels] for v in values]
            assert stats.chi2_contingency(table).pvalue > 1e-3, name
        elif len(levels) > 1:
            assert stats.ks_2samp(*values).pvalue > 1e-3, name
    units = {"Rotate": 3, "ShearX": 0.03, "ShearY": 0.03, "TranslateXRel": 0.045, "TranslateYRel": 0.045}
    pooled = [np.array([abs(v) / units[name] for name, v, _ in d if name in units]) for d in (ours, theirs)]
    clipped = [(magnitude > 10 - 1e-9).sum() for magnitude in pooled]
    assert stats.ks_2samp(*pooled).pvalue > 0.01
    assert pooled[0].max() < 10 + 1e-9 and abs(clipped[0] - clipped[1]) < 4 * math.sqrt(clipped[1] + 1)
    assert abs(pooled[0].std() / pooled[1].std() - 1) < 0.05
    cubic = [sum(c for name, _, c in drawn) / len(drawn) for drawn in (ours, theirs)]
    assert abs(cubic[0] - 0.5) < 0.03 and abs(cubic[1] - 0.5) < 0.03


def test_interpolation_is_the_one_that_is_asked_for():
    for interpolation, cubic in (("bicubic", True), ("bilinear", False)):
        assert {c for _, _, c in draw_ours("rand-m9-p1", 200, interpolation)} == {cubic}


def as_pillow(layer: Layer, i: int, image: Image.Image) -> Image.Image:
    """What layer does to image i, by Pillow."""
    kind, amount = Kind(layer.kind_B[i]), float(layer.amount_B[i])
    resample = Image.Resampling.BICUBIC if layer.cubic_B[i] else Image.Resampling.BILINEAR
    match kind:
        case Kind.IDENTITY:
            return image
        case Kind.TABLE:
            return image.point([*layer.table_BV[i].tolist()] * 3)
        case Kind.AUTOCONTRAST:
            return ImageOps.autocontrast(image)
        case Kind.EQUALIZE:
            return ImageOps.equalize(image)
        case Kind.CONTRAST | Kind.COLOR | Kind.SHARPNESS:
            return getattr(ImageEnhance, kind.name.capitalize())(image).enhance(amount)
        case Kind.HUE:
            return torchvision_transforms.functional.adjust_hue(
                image, (amount + math.copysign(0.5, amount)) / 255
            )
        case _:
            matrix = [*layer.matrix_B6[i].tolist()]
            return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


@pytest.mark.parametrize(
    "policy",
    [
        RandAugment(
            parse_rand_augment("rand-m9-mstd0.5-inc1"), image_size=(32, 32), interpolation="random", seed=0
        ),
        ColorJitter((0.4, 0.4, 0.4, 0.2), seed=0),
    ],
)
def test_chains_of_operations_equal_pillows(policy, thumbnails):
    layers = policy.draw(epoch=4, epoch_index=np.arange(64))
    expected = list(thumbnails)
    for layer in layers:
        expected = [as_pillow(layer, i, image) for i, image in enumerate(expected)]
    error = difference(run_layers(layers, to_tensor(thumbnails)), expected)
    if isinstance(policy, ColorJitter):
        assert error.max() == 0
    else:
        # A level that geometry misses by 1 can be spread by a table that comes after it.
        assert (error > 0).float().mean() < 0.02
        assert error.float().mean() < 0.05


# ---------------------------------------------------------------------------------------------- 3-Augment and jitter


def test_three_augment_chooses_one_of_three():
    (layer,) = ThreeAugment(seed=1).draw(0, np.arange(9000))
    counts = [(layer.kind_B == kind).sum() for kind in (Kind.COLOR, Kind.TABLE, Kind.BLUR)]
    assert sum(counts) == 9000 and stats.chisquare(counts).pvalue > 0.01
    assert not layer.amount_B.any()
    # The variance of the taps is the square of the radius, which is uniform from 0.1 to 2.
    distance = np.arange(13) - 6
    radius = np.sqrt((layer.taps_BK * distance**2).sum(axis=1))
    assert stats.kstest(radius, "uniform", (0.1, 1.9)).pvalue > 0.01


def test_three_augment_equals_pillow(photos):
    images = photos * 6
    (layer,) = ThreeAugment(seed=1).draw(0, np.arange(len(images)))
    got, x = run_layers([layer], to_tensor(images)), to_tensor(images)
    grey, solarized = layer.kind_B == Kind.COLOR, layer.kind_B == Kind.TABLE
    assert grey.sum() > 5 and solarized.sum() > 5
    expected = [
        ImageOps.grayscale(image).convert("RGB") if g else ImageOps.solarize(image)
        for image, g in zip(images, grey, strict=True)
    ]
    assert difference(got, expected)[torch.from_numpy(grey | solarized)].max() == 0
    assert not torch.equal(got, x)


@pytest.mark.parametrize("radius", [0.1, 0.4, 0.9, 1.4, 2.0])
def test_blur_is_near_pillows(radius, photos):
    """Pillow rounds after each of six passes and repeats the edge in each: 2 to 4 levels inside, more at the edge."""
    layer = Layer(len(photos))
    layer.kind_B[:] = Kind.BLUR
    layer.taps_BK[:] = blur_taps(np.full(len(photos), radius))
    assert np.allclose(layer.taps_BK.sum(axis=1), 1)
    error = difference(
        run_layers([layer], to_tensor(photos)), [p.filter(ImageFilter.GaussianBlur(radius)) for p in photos]
    )
    inside = error[..., 6:-6, 6:-6]
    assert inside.max() <= 4 and inside.float().mean() < 0.6
    assert error.max() <= 40 and error.float().mean() < 0.6


def test_color_jitter_is_distributed_as_torchvisions():
    n, strength = 6000, (0.4, 0.3, 1.2, 0.1)
    layers = ColorJitter(strength, seed=5).draw(0, np.arange(n))
    kinds = np.stack([layer.kind_B for layer in layers], axis=1)
    orders = Counter(tuple(row) for row in kinds.tolist())
    assert len(orders) == 24 and stats.chisquare([*orders.values()]).pvalue > 0.01
    theirs = torchvision_transforms.ColorJitter(*strength)
    torch.manual_seed(0)
    drawn = [
        theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(n)
    ]
    for column, kind in ((2, Kind.CONTRAST), (3, Kind.COLOR), (4, Kind.HUE)):
        ours = np.concatenate([layer.amount_B[layer.kind_B == kind] for layer in layers])
        expected = np.array([d[column] for d in drawn])
        if kind is Kind.HUE:  # drawn in turns, kept in whole steps
            expected = np.trunc(expected * 255)
            assert set(ours) == set(expected)
        assert len(ours) == n and stats.ks_2samp(ours, expected).pvalue > 0.01


def test_color_jitter_leaves_out_what_is_not_jittered():
    assert ColorJitter(0.0, seed=0).draw(0, np.arange(3)) == []
    layers = ColorJitter((0.0, 0.5, 0.2), seed=0).draw(0, np.arange(100))
    assert {kind for layer in layers for kind in layer.kind_B.tolist()} == {Kind.CONTRAST, Kind.COLOR}


@pytest.mark.parametrize("strength", [-0.1, (0.1, 0.2), (0.1, 0.2, -0.3), (0.1, 0.1, 0.1, 0.6), (0.1,) * 5])
def test_bad_color_jitter_is_refused(strength):
    with pytest.raises(ValueError, match="color_jitter="):
        ColorJitter(strength, seed=0)


# ---------------------------------------------------------------------------------------------- random erasing


@pytest.mark.parametrize("size", [(32, 32), (224, 160)])
def test_boxes_are_distributed_as_timms(size):
    n = 3000
    boxes = RandomErasing(0.6, "const", image_size=size, seed=2).draw(1, np.arange(n))
    timm_erasing.random.seed(0)
    theirs = timm_erasing.RandomErasing(0.6, mode="const", device="cpu")
    drawn = []
    for _ in range(n):
        rows, columns = np.nonzero(theirs(torch.ones(1, *size))[0].numpy() == 0)
        if len(rows):
            drawn.append((rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1))
    assert stats.chi2_contingency([[len(b), n - len(b)] for b in (boxes.image_E, drawn)]).pvalue > 0.01
    ours = np.stack((boxes.top_E, boxes.left_E, boxes.height_E, boxes.width_E), axis=1)
    for mine, other in zip(ours.T, np.array(drawn).T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 0.01
    area = [b[:, 2] * b[:, 3] for b in (ours, np.array(drawn))]
    assert stats.ks_2samp(*area).pvalue > 0.01
    assert (ours[:, 0] + ours[:, 2]).max() == size[0] and (ours[:, 1] + ours[:, 3]).max() == size[1]


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erasing_fills_its_boxes_and_nothing_else(mode):
    x = torch.full((200, 3, 32, 48), 255, dtype=torch.uint8)
    erasing = RandomErasing(0.5, mode, image_size=(32, 48), seed=9)
    got = Augment([], erasing, image_size=(32, 48), mean=MEAN, std=STD)(
        x, epoch=1, epoch_index=np.arange(200)
    )
    boxes = erasing.draw(1, np.arange(200))
    inside = torch.zeros(200, 32, 48, dtype=torch.bool)
    for image, top, left, height, width in zip(
        boxes.image_E, boxes.top_E, boxes.left_E, boxes.height_E, boxes.width_E, strict=True
    ):
        inside[image, top : top + height, left : left + width] = True
    assert 70 < len(boxes.image_E) < 130
    pixels = got.permute(0, 2, 3, 1)
    white = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    assert torch.allclose(pixels[~inside], white.expand(int((~inside).sum()), 3))
    if mode == "const":
        assert not pixels[inside].any()
    else:
        noise = pixels[inside].numpy()
        assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
        assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03
        first = np.stack([pixels[i][inside[i]][:30].flatten() for i in boxes.image_E])
        assert np.abs(np.corrcoef(first) - np.eye(len(first))).max() < 0.6


def test_noise_is_a_function_of_its_key():
    counter = torch.arange(-500, 500, dtype=torch.int32)
    key = [torch.tensor([k], dtype=torch.int32) for k in (123456789, -987654321)]

    def mix(bits: np.ndarray) -> np.ndarray:
        bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) % 2**32
        bits = ((bits ^ (bits >> 15)) * 0x846CA68B) % 2**32
        return bits ^ (bits >> 16)

    unsigned = [int(k) % 2**32 for k in key]
    bits = mix(mix((counter.numpy().astype(np.int64) % 2**32) ^ unsigned[0]) ^ unsigned[1])
    signed = np.where(bits < 2**31, bits, bits - 2**32) >> 8
    expected = stats.norm.ppf(((signed + 0.5) * 2.0**-23 + 1) / 2)
    np.testing.assert_allclose(hashed_normal(counter, *key).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_noise_is_uncorrelated_in_space_and_finite_at_the_ends():
    key = torch.tensor([7], dtype=torch.int32), torch.tensor([11], dtype=torch.int32)
    noise = hashed_normal(torch.arange(2**20, dtype=torch.int32), *key)
    assert noise.isfinite().all() and noise.abs().max() < 5.5
    assert stats.kstest(noise[::7].numpy(), "norm").pvalue > 0.01
    for lag in (1, 3, 96, 672):
        assert abs(torch.corrcoef(torch.stack((noise[:-lag], noise[lag:])))[0, 1]) < 0.004


# ---------------------------------------------------------------------------------------------- the whole


def build(data: DataConfig | str, size: tuple[int, int], seed: int = 0, fused: bool = False) -> Augment:
    if isinstance(data, DataConfig):
        return build_augment(data, image_size=size, seed=seed, fused=fused)
    rand = parse_rand_augment("rand-m9-n3-p0.9-mstd2-inc1")
    policies = [
        RandAugment(rand, image_size=size, interpolation="random", seed=seed),
        ColorJitter((0.4, 0.3, 0.2, 0.1), seed=seed),
    ]
    erasing = RandomErasing(0.7, "pixel", image_size=size, seed=seed)
    return Augment(policies, erasing, image_size=size, mean=MEAN, std=STD, fused=fused)


def test_without_augmentation_it_normalises(thumbnails):
    x = to_tensor(thumbnails)
    got = build(NONE, (32, 32))(x, epoch=0, epoch_index=np.arange(64))
    expected = (x.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("spec", [DEIT, DEIT_III, EVERYTHING], ids=["deit", "deit_iii", "everything"])
def test_an_image_does_not_depend_on_its_batch(spec, images):
    x = to_tensor(images)
    epoch_index = np.arange(len(x)) * 12345 + 7
    augment = build(spec, tuple(x.shape[2:]))
    whole = augment(x, epoch=3, epoch_index=epoch_index)
    assert torch.equal(
        whole, augment(x, epoch=3, epoch_index=torch.from_numpy(epoch_index))
    )  # repeats itself

    order = np.random.default_rng(1).permutation(len(x))
    shuffled = augment(x[torch.from_numpy(order)], epoch=3, epoch_index=epoch_index[order])
    assert torch.equal(shuffled, whole[torch.from_numpy(order)])
    for part in ([0], [3, 4, 5], [6, 2]):
        assert torch.equal(augment(x[part], epoch=3, epoch_index=epoch_index[part]), whole[part])


def test_what_comes_from_outside_has_the_mean_colour():
    text, epoch_index = "rand-m10-n1-p1-inc1", np.arange(300)
    policy = RandAugment(parse_rand_augment(text), image_size=(32, 32), interpolation="bicubic", seed=0)
    (layer,) = policy.draw(0, epoch_index)
    to_the_left = (layer.kind_B == Kind.SHIFT_ROWS) & (layer.matrix_B6[:, 2] > 5)
    assert to_the_left.sum() > 3
    x = torch.full((300, 3, 32, 32), 255, dtype=torch.uint8)
    got = build(replace(NONE, rand_augment=text), (32, 32))(x, epoch=0, epoch_index=epoch_index)
    outside = got[torch.from_numpy(to_the_left)][..., -5:].transpose(1, 3)
    expected = torch.tensor([(round(255 * m) / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    torch.testing.assert_close(outside, expected.expand_as(outside), rtol=0, atol=2e-6)


def test_epoch_seed_and_index_each_change_the_result(thumbnails):
    x, epoch_index = to_tensor(thumbnails), np.arange(64)
    results = [
        build(EVERYTHING, (32, 32), seed)(x, epoch=epoch, epoch_index=epoch_index + offset)
        for seed, epoch, offset in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1000))
    ]
    for other in results[1:]:
        changed = (results[0] != other).flatten(1).any(1)
        assert changed.float().mean() > 0.9


@pytest.mark.parametrize("spec", [DEIT, DEIT_III, EVERYTHING], ids=["deit", "deit_iii", "everything"])
def test_strides_of_the_input_do_not_matter_and_it_is_not_changed(spec, thumbnails):
    x = to_tensor(thumbnails)[:, :, :, :24]  # higher than wide
    augment, epoch_index = build(spec, (32, 24)), np.arange(64)
    assert not x.is_contiguous(memory_format=torch.channels_last)
    before = x.clone()
    expected = augment(x.contiguous(), epoch=0, epoch_index=epoch_index)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(x, epoch=0, epoch_index=epoch_index), expected)
    assert torch.equal(x, before)
    twice = x.repeat_interleave(2, 0)[::2]
    assert torch.equal(augment(twice, epoch=0, epoch_index=epoch_index.tolist()), expected)


@pytest.mark.parametrize("spec", [NONE, DEIT, DEIT_III], ids=["none", "deit", "deit_iii"])
def test_an_empty_batch_gives_an_empty_batch(spec):
    got = build(spec, (16, 16))(torch.empty(0, 3, 16, 16, dtype=torch.uint8), epoch=0, epoch_index=[])
    assert got.shape == (0, 3, 16, 16) and got.dtype == torch.float32


def test_autocast_does_not_reach_the_blur(photos):
    x = to_tensor(photos)
    augment = build(DEIT_III, tuple(x.shape[2:]))
    expected = augment(x, epoch=0, epoch_index=np.arange(len(x)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(x, epoch=0, epoch_index=np.arange(len(x))), expected)


@pytest.mark.parametrize(
    ("images", "epoch_index"),
    [
        (torch.zeros(2, 3, 32, 32), [0, 1]),
        (torch.zeros(2, 3, 32, 31, dtype=torch.uint8), [0, 1]),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), [0, 1]),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), [0]),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0, 1, 2]),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0.5, 1.5]),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0, -1]),
    ],
)
def test_bad_batches_are_refused(images, epoch_index):
    with pytest.raises(ValueError, match=r"images must be uint8|epoch_index must be"):
        build(DEIT, (32, 32))(images, epoch=0, epoch_index=epoch_index)


@pytest.mark.parametrize(
    ("changes", "side", "message"),
    [({}, 4, "image_size=4"), ({"rand_augment": "auto"}, 32, "rand_augment='auto'")],
)
def test_bad_builds_are_refused(changes, side, message):
    with pytest.raises(ValueError, match=message):
        build_augment(replace(NONE, **changes), image_size=side, seed=0)


def test_arrays_reach_the_device_as_they_are():
    arrays = {
        "bool": np.array([True, False, True]),
        "empty": np.empty((0, 4), dtype=np.float32),
        "float64": np.linspace(0, 1, 6).reshape(2, 3),
        "strided": np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
        "words": np.array([1, 2**32 - 1], dtype=np.uint32),
    }
    sent = to_device(arrays, torch.device("cpu"))
    assert sent["words"].tolist() == [1, -1]
    for name in ("bool", "empty", "float64", "strided"):
        assert torch.equal(sent[name], torch.from_numpy(arrays[name].copy()))


def test_the_package_needs_only_torch_and_numpy():
    package = Path(sys.modules[build_augment.__module__].__file__).parent
    imported = set()
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {n if n.startswith("lape_ray") else n.split(".")[0] for n in names}
    outside = {n for n in imported if not n.startswith("lape_ray.data.augment")} - set(
        sys.stdlib_module_names
    )
    assert outside == {
        "lape_ray.config",
        "numpy",
        "torch",
        "triton",
    }  # the last in a module that only GPUs need


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spec", [DEIT, DEIT_III, EVERYTHING], ids=["deit", "deit_iii", "everything"])
def test_a_gpu_gives_the_cpus_images_and_is_never_waited_for(spec, fused, thumbnails):
    x, epoch_index = to_tensor(thumbnails), np.arange(64)
    expected = build(spec, (32, 32))(x, epoch=0, epoch_index=epoch_index)
    augment = build(spec, (32, 32), fused=fused)
    on_gpu = x.cuda()
    augment(on_gpu, epoch=0, epoch_index=epoch_index)  # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(on_gpu, epoch=0, epoch_index=epoch_index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ((got.cpu() - expected).abs() > 0.02).float().mean() < 0.01
