"""Prints a digest of crops that the compiled decoder makes of photographs: the same on all processors."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from lape_ray.data.native import FILTERS, Decoder, check, flips, random_resized_crops


def digest(path: Path, crops: int = 64) -> str:
    """Of random crops of a JPEG, resized by either filter; B crops."""
    file = np.frombuffer(path.read_bytes(), np.uint8)
    index_B, zeros_B = np.arange(crops), np.zeros(crops, int)
    width_B, height_B = (zeros_B + side for side in Image.open(path).size)
    out_BHW3 = np.empty((crops, 224, 224, 3), np.uint8)
    statuses_B = Decoder(2).decode_batch(
        file, zeros_B, zeros_B + len(file), zeros_B, width_B, height_B,
        random_resized_crops(0, 0, index_B, width_B, height_B), flips(0, 0, index_B), out_BHW3,
        interpolation=index_B % len(FILTERS),
    )  # fmt: skip
    check(statuses_B)
    return hashlib.sha256(out_BHW3.data).hexdigest()


for name in sys.argv[1:]:
    print(name, digest(Path(name)))
