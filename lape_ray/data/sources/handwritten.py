"""scikit-learn's handwritten digits, which need no download.

Shape suffix: N samples.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lape_ray.data.sources.base import Source
from lape_ray.data.sources.subset import select

VAL_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Digits(Source):
    """scikit-learn's handwritten digits; items are the 8x8 grey images, shown as 32x32 RGB."""

    def name(self, index: int) -> str:
        return f"{self.origin} image {index}"

    def encoded(self, index: int) -> bytes:
        image = Image.fromarray(self.items_N[index]).resize((32, 32), Image.Resampling.NEAREST)
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        return file.getvalue()


def digits(split: str | None = None) -> Source:
    """Open the 1,797 handwritten digits that scikit-learn ships (no download).

    A fixed draw splits them into train, 1,438, and val, 359.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    every = Digits(
        origin="digits",
        classes=tuple(str(name) for name in data.target_names),
        labels_N=data.target.astype(np.int64),
        items_N=np.rint(data.images * (255 / 16)).astype(np.uint8),  # ink is counted from 0 to 16
    )
    held = int(VAL_SHARE * len(every))
    subsets = {None: None, "train": f"rest:{held}", "val": f"holdout:{held}"}
    if split not in subsets:
        raise ValueError(f"digits have no split {split!r}; choose train or val")
    return select(every, subsets[split])
