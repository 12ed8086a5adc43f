"""RandAugment (Cubuk et al., arXiv 1909.13719) as timm draws it, on which DeiT and Compact Transformers train.

Each of n layers picks one of 15 transforms, applies it with probability p, and draws its magnitude from a normal
distribution around m, clipped to 0..max. Half of the transforms get a random sign.

Shapes: B images; N of them, with one transform; n layers; 6 numbers drawn for each layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lape_ray.config import Interpolation
from lape_ray.data.augment import color
from lape_ray.data.augment.draws import Stream, box_muller, uniform
from lape_ray.data.augment.layers import Kind, Layer

TRANSFORMS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
INCREASING_TRANSFORMS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """The values of a timm config string; `parse_rand_augment` reads one.

    Attributes:
        magnitude: m, of 10.
        layers: n, transforms picked for each image.
        probability: p, that a picked transform is applied.
        magnitude_std: mstd, standard deviation of the magnitude; infinite: uniform from 0 to m.
        magnitude_max: mmax, upper bound of the magnitude.
        increasing: inc, transforms whose severity always grows with the magnitude.
    """

    magnitude: int = 10
    layers: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    magnitude_max: int = 10
    increasing: bool = False

    @property
    def transforms(self) -> tuple[str, ...]:
        return INCREASING_TRANSFORMS if self.increasing else TRANSFORMS


_GRAMMAR = "rand[-m<0..>][-n<1..>][-p<0..1>][-mstd<0..>][-mmax<1..>][-inc<0|1>], as in rand-m9-mstd0.5-inc1"
_SECTIONS: dict[str, tuple[str, Callable[[str], float]]] = {
    "m": ("magnitude", int),
    "n": ("layers", int),
    "p": ("probability", float),
    "mstd": ("magnitude_std", float),
    "mmax": ("magnitude_max", int),
    "inc": ("increasing", lambda text: bool(("0", "1").index(text))),
}


def parse_rand_augment(text: str) -> RandAugmentConfig:
    """Read timm's notation, such as `rand-m9-mstd0.5-inc1`; timm's defaults stand for what is left out.

    Raises:
        ValueError: for a part that is unknown, twice there or out of range. (timm ignores some of these.)
    """
    head, *sections = text.split("-")
    if head != "rand":
        raise ValueError(f"rand_augment={text!r} must start with 'rand'; the notation is {_GRAMMAR}")
    values: dict[str, float] = {}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)([0-9.]+)", section)
        if match is None or match[1] not in _SECTIONS:
            raise ValueError(f"rand_augment={text!r}: {section!r} is not known; the notation is {_GRAMMAR}")
        name, convert = _SECTIONS[match[1]]
        if name in values:
            raise ValueError(f"rand_augment={text!r} says {match[1]!r} twice")
        try:
            values[name] = convert(match[2])
        except ValueError:
            raise ValueError(
                f"rand_augment={text!r}: {section!r} has a bad number; the notation is {_GRAMMAR}"
            ) from None
    if values.get("magnitude_std", 0) > 100:  # timm's way to write a uniform distribution
        values["magnitude_std"] = math.inf
    values["magnitude_max"] = values.get("magnitude_max") or 10
    config = RandAugmentConfig(**values)  # type: ignore[arg-type]
    if config.layers < 1 or config.probability > 1:
        raise ValueError(f"rand_augment={text!r} is out of range; the notation is {_GRAMMAR}")
    return config


def transform_argument(name: str, magnitude_N: np.ndarray, negative_N: np.ndarray) -> np.ndarray:
    """Compute the argument of the transform `name` for a magnitude.

    It is in degrees, a share, bits, a threshold, an addend or a factor.

    Args:
        magnitude_N: float64 from 0; 10 is the whole range.
        negative_N: bool, the random sign; unused by the transforms that have none.

    Returns:
        float64 (N,), whole numbers for bits, threshold and addend.
    """
    share_N = magnitude_N / 10
    signed_N = np.where(negative_N, -share_N, share_N)
    match name:
        case "AutoContrast" | "Equalize" | "Invert":
            return np.zeros_like(share_N)
        case "Rotate":
            return signed_N * 30
        case "ShearX" | "ShearY":
            return signed_N * 0.3
        case "TranslateXRel" | "TranslateYRel":
            return signed_N * 0.45
        case "Posterize":
            return np.trunc(share_N * 4)
        case "PosterizeIncreasing":
            return 4 - np.trunc(share_N * 4)
        case "Solarize":
            return np.minimum(256, np.trunc(share_N * 256))
        case "SolarizeIncreasing":
            return 256 - np.minimum(256, np.trunc(share_N * 256))
        case "SolarizeAdd":
            return np.minimum(128, np.trunc(share_N * 110))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return share_N * 1.8 + 0.1
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return np.maximum(0.1, 1 + signed_N * 0.9)
    raise ValueError(
        f"transform {name!r} is not known; known are {', '.join({*TRANSFORMS, *INCREASING_TRANSFORMS})}"
    )


def rotation_matrix(degrees_N: np.ndarray, height: int, width: int) -> np.ndarray:
    """Make (N, 6) matrices that turn images counter-clockwise about their centre, as PIL.Image.rotate does."""
    radians_N = -np.radians(degrees_N % 360)
    cos_N, sin_N = np.round(np.cos(radians_N), 15), np.round(np.sin(radians_N), 15)
    c_N = cos_N * (-width / 2) + sin_N * (-height / 2) + width / 2
    f_N = -sin_N * (-width / 2) + cos_N * (-height / 2) + height / 2
    return np.stack((cos_N, sin_N, c_N, -sin_N, cos_N, f_N), axis=1)


def set_transform(
    layer: Layer, rows: np.ndarray, name: str, argument_N: np.ndarray, image_size: tuple[int, int]
) -> None:
    """Make the transform `name` the operation of the images `rows` of `layer`, whose `cubic_B` is set.

    Args:
        rows: (N,) integers, or a mask.
        argument_N: of `transform_argument`.
        image_size: (height, width) in pixels.
    """
    height, width = image_size
    base = name.removesuffix("Increasing")
    match base:
        case "AutoContrast":
            layer.kind_B[rows] = Kind.AUTOCONTRAST
        case "Equalize":
            layer.kind_B[rows] = Kind.EQUALIZE
        case "Color" | "Contrast" | "Sharpness":
            layer.kind_B[rows] = Kind[base.upper()]
            layer.amount_B[rows] = argument_N
        case "Rotate":
            layer.kind_B[rows] = np.where(layer.cubic_B[rows], Kind.AFFINE_BICUBIC, Kind.AFFINE_BILINEAR)
            layer.matrix_B6[rows] = rotation_matrix(argument_N, height, width)
        case "ShearX":
            layer.kind_B[rows] = Kind.SHIFT_ROWS
            layer.matrix_B6[rows, 1] = argument_N
        case "TranslateXRel":
            layer.kind_B[rows] = Kind.SHIFT_ROWS
            layer.matrix_B6[rows, 2] = argument_N * width
        case "ShearY":
            layer.kind_B[rows] = Kind.SHIFT_COLUMNS
            layer.matrix_B6[rows, 3] = argument_N
        case "TranslateYRel":
            layer.kind_B[rows] = Kind.SHIFT_COLUMNS
            layer.matrix_B6[rows, 5] = argument_N * height
        case _:
            layer.kind_B[rows] = Kind.TABLE
            layer.table_BV[rows] = _TABLES[base](argument_N)


_TABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Invert": lambda argument_N: color.invert_table(),
    "Posterize": color.posterize_table,
    "Solarize": color.solarize_table,
    "SolarizeAdd": color.solarize_add_table,
    "Brightness": color.brightness_table,
}


class RandAugment:
    """Draw the layers of RandAugment for batches of images of one size."""

    def __init__(
        self,
        config: RandAugmentConfig,
        *,
        image_size: tuple[int, int],
        interpolation: Interpolation,
        seed: int,
    ) -> None:
        self.config = config
        self.image_size = image_size
        self.interpolation = interpolation
        self.seed = seed

    def draw(self, epoch: int, epoch_index: np.ndarray) -> list[Layer]:
        """Draw the layers for the images at `epoch_index`, (B,), of the epoch's order."""
        n = self.config.layers
        u_BnD = uniform(self.seed, epoch, epoch_index, Stream.RAND_AUGMENT, n * 6).reshape(
            len(epoch_index), n, 6
        )
        return [self._layer(u_BnD[:, i].T) for i in range(n)]

    def _layer(self, u_DB: np.ndarray) -> Layer:
        choice_u, apply_u, normal_u, angle_u, sign_u, interpolation_u = u_DB
        config = self.config
        if math.isinf(config.magnitude_std):
            magnitude_B = config.magnitude * normal_u
        else:
            magnitude_B = config.magnitude + config.magnitude_std * box_muller(normal_u, angle_u)
        magnitude_B = np.clip(magnitude_B, 0, config.magnitude_max)

        layer = Layer(len(choice_u))
        if self.interpolation == "random":
            layer.cubic_B[:] = interpolation_u < 0.5
        else:
            layer.cubic_B[:] = self.interpolation == "bicubic"
        choice_B = (choice_u * len(config.transforms)).astype(np.int64)
        applied_B = apply_u < config.probability
        for i, name in enumerate(config.transforms):
            rows = np.flatnonzero(applied_B & (choice_B == i))
            if len(rows):
                argument_N = transform_argument(name, magnitude_B[rows], sign_u[rows] < 0.5)
                set_transform(layer, rows, name, argument_N, self.image_size)
        return layer
