"""3-Augment of DeiT III (Touvron et al., arXiv 2204.07118): each image is made grey, solarized or blurred.

Shapes: B images.
"""

from __future__ import annotations

import numpy as np

from lape_ray.data.augment.color import solarize_table
from lape_ray.data.augment.draws import Stream, uniform
from lape_ray.data.augment.filters import MAX_BLUR_RADIUS, blur_taps
from lape_ray.data.augment.layers import Kind, Layer

_BLUR_RADIUS = (0.1, MAX_BLUR_RADIUS)  # pixels
_SOLARIZE_THRESHOLD = 128


class ThreeAugment:
    """Draw the layer of 3-Augment."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def draw(self, epoch: int, epoch_index: np.ndarray) -> list[Layer]:
        """Draw one layer for the images at `epoch_index`, (B,), of the epoch's order."""
        choice_u, radius_u = uniform(self.seed, epoch, epoch_index, Stream.THREE_AUGMENT, 2).T
        choice_B = (choice_u * 3).astype(np.int64)
        layer = Layer(len(epoch_index))
        # Grey is the color factor 0, which the amount is.
        layer.kind_B[:] = np.array([Kind.COLOR, Kind.TABLE, Kind.BLUR])[choice_B]
        low, high = _BLUR_RADIUS
        layer.taps_BK[:] = blur_taps(low + (high - low) * radius_u)
        layer.table_BV[:] = solarize_table(np.array([_SOLARIZE_THRESHOLD]))
        return [layer]
