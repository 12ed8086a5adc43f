"""Batches of a .beton through our own decoder: no compilation at start, Pillow's pixels, keyed draws.

Shape suffixes: N samples of a pass, B of a batch, S the side of a crop in pixels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

from lape_ray.config import DataConfig
from lape_ray.data.augment.draws import Stream, uniform
from lape_ray.data.beton import ALLOCATION, HEADER, read_records
from lape_ray.data.native import FILTERS, Decoder, center_crops, check, flips, random_resized_crops

BATCHES_AHEAD = 2


class NativeReader:
    """One file's images; a pass decodes ahead in a thread of its own, which ends with the pass."""

    reuses_buffers = False

    def __init__(
        self,
        path: str,
        data: DataConfig,
        split: Literal["train", "val"],
        *,
        image_size: int,
        batch_size: int,
        threads: int,
        seed: int,
        pin_memory: bool,
    ) -> None:
        records_N = read_records(path)
        self.path, self.data, self.split = path, data, split
        self.image_size, self.batch_size, self.seed, self.pin_memory = (
            image_size,
            batch_size,
            seed,
            pin_memory,
        )
        self.labels_N = np.ascontiguousarray(records_N["label"])
        self.images_N = np.ascontiguousarray(records_N["image"])
        self.lengths_N = _lengths(path, self.images_N["data_ptr"])
        self.file = np.memmap(path, np.uint8, "r")
        self.decoder = Decoder(threads)

    def batches(
        self, keys_N: np.ndarray, positions_N: np.ndarray, epoch: int
    ) -> Generator[np.ndarray, None, None]:
        """One pass over the samples of `keys_N` (index in the low 32 bits): uint8 (B, S, S, 3), the last batch short.

        Args:
            positions_N: each sample's place in the order of the epoch over all ranks, which keys its draws.

        Raises:
            ValueError: images cannot be read; names them by their index in the file.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="decode")
        pending: deque[Future[np.ndarray]] = deque()
        index_N = keys_N & 0xFFFFFFFF
        try:
            for start in range(0, len(index_N), self.batch_size):
                part = slice(start, start + self.batch_size)
                pending.append(pool.submit(self._decode, index_N[part], positions_N[part], epoch))
                if len(pending) > BATCHES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, index_B: np.ndarray, positions_B: np.ndarray, epoch: int) -> np.ndarray:
        side, data, images_B = self.image_size, self.data, self.images_N[index_B]
        shape = (len(index_B), side, side, 3)
        out_BSS3 = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory).numpy()
        widths_B, heights_B = images_B["width"], images_B["height"]
        filters_B = np.full(
            len(index_B), FILTERS["bilinear" if data.interpolation == "bilinear" else "bicubic"]
        )
        if self.split == "train":
            boxes_B4 = random_resized_crops(
                self.seed,
                epoch,
                positions_B,
                widths_B,
                heights_B,
                scale=data.crop_scale,
                ratio=data.crop_ratio,
            )
            flips_B = flips(self.seed, epoch, positions_B, data.flip)
            if data.interpolation == "random":
                chance_B = uniform(self.seed, epoch, positions_B, Stream.INTERPOLATION, 1)[:, 0]
                filters_B = np.where(chance_B < 0.5, FILTERS["bicubic"], FILTERS["bilinear"])
        else:
            resize = max(side, math.floor(side / data.eval_crop))
            boxes_B4 = center_crops(widths_B, heights_B, resize=resize, size=side)
            flips_B = np.zeros(len(index_B), bool)
        statuses_B = self.decoder.decode_batch(
            self.file,
            images_B["data_ptr"],
            self.lengths_N[index_B],
            images_B["mode"],
            widths_B,
            heights_B,
            boxes_B4,
            flips_B,
            out_BSS3,
            interpolation=filters_B,
            crop_first=self.split == "train",
        )
        check(statuses_B, lambda i: f"{self.path} image {index_B[i]}")
        return out_BSS3


def _lengths(path: str, pointers_N: np.ndarray) -> np.ndarray:
    """Bytes of each image, from the file's allocation table, which may be in any order."""
    header = np.fromfile(path, HEADER, 1)[0]
    table = np.fromfile(path, ALLOCATION, len(pointers_N), offset=int(header["alloc_table_ptr"]))
    order = np.argsort(table["ptr"])
    found = order[np.searchsorted(table["ptr"], pointers_N, sorter=order).clip(max=len(order) - 1)]
    if not np.array_equal(table["ptr"][found], pointers_N):
        raise ValueError(f"{path} is damaged: images lie outside its allocation table; write it again")
    return table["size"][found]
