"""Nothing is timed before our pixels are Pillow's: on the same crops, from the decoder and out of a whole loader.

Shape suffixes: B images, S the side of a crop in pixels, H and W pixels of an image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from lape_ray.bench.inputs import Stored, make_inputs
from lape_ray.config import DataConfig
from lape_ray.data import native
from lape_ray.data.loader import build_loader

MEAN_LIMIT, MAX_LIMIT = 0.05, 4  # of 255 levels: libjpeg-turbo and Pillow's copy of it may differ in rounding
CHECKED = 48  # images of an input
SEED = 5


class WrongPixelsError(ValueError):
    """What we decode is not what Pillow decodes: times would mean nothing."""


def decoder_gate(files: Sequence[bytes], side: int) -> list[dict[str, Any]]:
    """Compare our decoder with Pillow on random crops of every input made of `files`: rows of `compare`."""
    rows = []
    decoder = native.Decoder(1)
    for name, inputs in make_inputs(files[:CHECKED]).items():
        data = np.frombuffer(b"".join(inputs), np.uint8)
        lengths_B = np.array([len(item) for item in inputs])
        sizes_B2 = np.array([Image.open(io.BytesIO(item)).size for item in inputs])
        boxes_B4, flips_B = draws(sizes_B2)
        ours_BSS3 = np.empty((len(inputs), side, side, 3), np.uint8)
        native.check(
            decoder.decode_batch(
                data,
                np.cumsum(lengths_B) - lengths_B,
                lengths_B,
                np.zeros(len(inputs), np.uint8),
                sizes_B2[:, 0],
                sizes_B2[:, 1],
                boxes_B4,
                flips_B,
                ours_BSS3,
            )
        )
        theirs_BSS3 = [
            pillow_crop(Image.open(io.BytesIO(item)).convert("RGB"), box_4, flip, side)
            for item, box_4, flip in zip(inputs, boxes_B4.tolist(), flips_B, strict=True)
        ]
        rows.append(compare(ours_BSS3, np.stack(theirs_BSS3), f"decoder, {name}"))
    return rows


def loader_gate(stored: Stored, side: int, batch_size: int) -> dict[str, Any]:
    """Compare the first batch of a training epoch with Pillow's crops of the files; labels number the files."""
    loader = build_loader(
        DataConfig(train=stored.beton), "train", image_size=side, batch_size=batch_size, seed=SEED, threads=2
    )
    with contextlib.closing(loader.epoch(0)) as batches:
        images_BCSS, labels_B = next(batches)
    ours_BSS3 = images_BCSS.permute(0, 2, 3, 1).numpy()[:CHECKED]
    images = [Image.open(stored.paths[label]).convert("RGB") for label in labels_B[: len(ours_BSS3)].tolist()]
    boxes_B4, flips_B = draws(np.array([image.size for image in images]))
    theirs_BSS3 = [
        pillow_crop(image, box_4, flip, side)
        for image, box_4, flip in zip(images, boxes_B4.tolist(), flips_B, strict=True)
    ]
    return compare(ours_BSS3, np.stack(theirs_BSS3), f"loader, {stored.name}")


def draws(sizes_B2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (B, 4) and flips (B,) of the first images of the first epoch."""
    positions_B = np.arange(len(sizes_B2))
    boxes_B4 = native.random_resized_crops(SEED, 0, positions_B, sizes_B2[:, 0], sizes_B2[:, 1])
    return boxes_B4, native.flips(SEED, 0, positions_B)


def pillow_crop(image: Image.Image, box_4: Sequence[int], flip: bool, side: int) -> np.ndarray:
    """(S, S, 3) as torchvision's RandomResizedCrop makes it of a Pillow image: bicubic with antialiasing."""
    x, y, width, height = box_4
    crop = image.crop((x, y, x + width, y + height)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)


def compare(ours_BSS3: np.ndarray, theirs_BSS3: np.ndarray, where: str) -> dict[str, Any]:
    """What was compared (`name`, `images`) and how far it lies apart (`mean_error`, `max_error`, of 255 levels).

    Raises:
        WrongPixelsError: further than rounding.
    """
    apart_BSS3 = np.abs(ours_BSS3.astype(np.int16) - theirs_BSS3)
    mean, largest = float(apart_BSS3.mean()), int(apart_BSS3.max())
    if mean > MEAN_LIMIT or largest > MAX_LIMIT:
        worst = int(apart_BSS3.reshape(len(apart_BSS3), -1).mean(axis=1).argmax())
        raise WrongPixelsError(
            f"{where}: our pixels are not Pillow's (mean error {mean:.3f}, largest {largest} of 255, worst image "
            f"{worst} of {len(apart_BSS3)}); nothing was timed. Build the decoder again with `make setup`"
        )
    return {"name": where, "images": len(apart_BSS3), "mean_error": mean, "max_error": largest}
