"""Colour jitter as torchvision's ColorJitter draws it: brightness, contrast, saturation and hue in random order.

Shapes: B images, J jittered properties.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lape_ray.data.augment.color import brightness_table
from lape_ray.data.augment.draws import Stream, uniform
from lape_ray.data.augment.layers import Kind, Layer


def _brightness(layer: Layer, rows: np.ndarray, factor_N: np.ndarray) -> None:
    layer.kind_B[rows] = Kind.TABLE
    layer.table_BV[rows] = brightness_table(factor_N)


def _amount(kind: Kind) -> Callable[[Layer, np.ndarray, np.ndarray], None]:
    def set_amount(layer: Layer, rows: np.ndarray, amount_N: np.ndarray) -> None:
        layer.kind_B[rows] = kind
        layer.amount_B[rows] = amount_N

    return set_amount


def _hue(layer: Layer, rows: np.ndarray, turn_N: np.ndarray) -> None:
    layer.kind_B[rows] = Kind.HUE
    layer.amount_B[rows] = np.trunc(turn_N * 255)  # torchvision's steps: a half turn is 127, not 128


_PROPERTIES = (_brightness, _amount(Kind.CONTRAST), _amount(Kind.COLOR), _hue)


class ColorJitter:
    """Draw one layer for each jittered property.

    Args:
        strength: one number s for brightness, contrast and saturation; or three; or four, with the hue's last.
            Factors are uniform in [max(0, 1 - s), 1 + s], the hue's turn in [-s, s] with s at most 1/2.
        seed: of the draws.
    """

    def __init__(self, strength: float | tuple[float, ...], *, seed: int) -> None:
        strengths = strength if isinstance(strength, tuple) else (strength,) * 3
        if len(strengths) not in (3, 4) or min(strengths) < 0 or (len(strengths) == 4 and strengths[3] > 0.5):
            raise ValueError(
                f"color_jitter={strength} must be one number, or three for brightness, contrast and saturation, "
                "all from 0, or four with the hue's, from 0 to 0.5"
            )
        ranges = [(max(0.0, 1 - s), 1 + s) for s in strengths[:3]] + [(-s, s) for s in strengths[3:]]
        jittered = [(p, r) for p, r, s in zip(_PROPERTIES, ranges, strengths, strict=False) if s > 0]
        self.properties = [p for p, _ in jittered]
        self.low_J, self.high_J = np.array([r for _, r in jittered]).reshape(-1, 2).T
        self.seed = seed

    def draw(self, epoch: int, epoch_index: np.ndarray) -> list[Layer]:
        """Draw the layers for the images at `epoch_index`, (B,), of the epoch's order."""
        J = len(self.properties)
        u_BN = uniform(self.seed, epoch, epoch_index, Stream.COLOR_JITTER, 2 * J)
        order_BJ = np.argsort(u_BN[:, :J], axis=1)
        amount_BJ = self.low_J + (self.high_J - self.low_J) * u_BN[:, J:]
        layers = []
        for place in range(J):
            layer = Layer(len(epoch_index))
            for j, set_property in enumerate(self.properties):
                rows = np.flatnonzero(order_BJ[:, place] == j)
                set_property(layer, rows, amount_BJ[rows, j])
            layers.append(layer)
        return layers
