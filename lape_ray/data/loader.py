"""Batches of a .beton on the device, in an order that is known beforehand.

The order of an epoch is a function of (seed, epoch) alone. Every rank computes it whole and takes every
world_size-th sample, so that no process group is needed, any number of ranks sees the same images at the same
step, and a run that resumes at an epoch sees what it would have seen. Crops and flips are keyed the same way.

Shape suffixes: N samples of a pass, B of a batch, H and W pixels, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from lape_ray.config import DataConfig
from lape_ray.data.beton import Manifest, check_beton

if TYPE_CHECKING:
    from lape_ray.data.ffcv_pipeline import BatchLoader
    from lape_ray.data.native_reader import NativeReader

ORDER_STREAM = 1  # first word of the seed, which keeps these draws apart from mixup's


def train_keys(num_samples: int, *, step_samples: int, seed: int, epoch: int, repeats: int = 1) -> np.ndarray:
    """The keys (N,) of a training epoch over all ranks: a random order, N the largest multiple of `step_samples`.

    With `repeats` above 1 each sample stands that often in a row and the epoch keeps its length, so that neighbours,
    which go to different ranks, are differently augmented copies (repeated augmentation, arXiv 1901.09335).

    A key is a sample's index in its low 32 bits and the seed of its augmentation above (int64). The samples
    that are left over differ from epoch to epoch.
    """
    if num_samples < step_samples:
        raise ValueError(
            f"the training set has {num_samples} images, fewer than the {step_samples} of one optimizer step; "
            f"set data.batch_size to {num_samples} or less"
        )
    rng = np.random.default_rng((ORDER_STREAM, seed, epoch))
    index_N = rng.permutation(num_samples).repeat(repeats)[: num_samples // step_samples * step_samples]
    return index_N | (rng.integers(2**31, size=len(index_N)) << 32)


def rank_part(keys_N: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """What one rank reads. The union over the ranks is `keys_N`, each key once, whatever the world size."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not from 0 to world_size - 1 = {world_size - 1}")
    return keys_N[rank::world_size]


class Loader:
    """One rank's batches of a split; made once for a run by `build_loader`.

    Attributes:
        manifest: of the file
        num_samples: images of the whole split, over all ranks
    """

    def __init__(
        self,
        reader: BatchLoader | NativeReader,
        manifest: Manifest,
        *,
        split: Literal["train", "val"],
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        repeats: int = 1,
    ) -> None:
        self.reader = reader
        self.manifest = manifest
        self.num_samples = manifest.num_samples
        self.split = split
        self.step_samples = reader.batch_size * world_size * accumulate
        self.rank, self.world_size, self.seed, self.device = rank, world_size, seed, device
        self.repeats = repeats
        self.labels_N = reader.labels_N
        self._length = -(-len(self.keys(0)) // reader.batch_size)

    def keys(self, epoch: int) -> np.ndarray:
        """The keys (N,) of this rank's samples in `epoch`, in the order in which they are delivered."""
        if self.split == "train":
            keys_N = train_keys(
                self.num_samples,
                step_samples=self.step_samples,
                seed=self.seed,
                epoch=epoch,
                repeats=self.repeats,
            )
        else:
            keys_N = np.arange(self.num_samples)
        return rank_part(keys_N, self.rank, self.world_size)

    def __len__(self) -> int:
        """Batches of an epoch on this rank. Evaluation: ranks may differ by one, and the last batch is short."""
        return self._length

    def epoch(self, epoch: int) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """The batches of one epoch: images uint8 (B, 3, H, W), channels last in memory, and labels int64 (B,).

        They are the caller's to keep. What goes wrong in the loader's thread is raised here, and the thread
        ends with the loop, however that ends (close the generator if it is not in a `for`).
        """
        keys_N = self.keys(epoch)
        if len(keys_N) == 0:  # more ranks than images
            return
        labels_N = torch.from_numpy(self.labels_N[keys_N & 0xFFFFFFFF])
        positions_N = self.rank + self.world_size * np.arange(len(keys_N))
        batches = self.reader.batches(keys_N, positions_N, epoch)
        try:
            for images_BHWC, labels_B in zip(batches, labels_N.split(self.reader.batch_size), strict=True):
                yield from self._to_device(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2), labels_B)
        finally:
            batches.close()

    def _to_device(
        self, images_BCHW: torch.Tensor, labels_B: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield one batch that does not share memory with the loader's ring of buffers."""
        if self.device.type == "cpu":
            yield images_BCHW.clone() if self.reader.reuses_buffers else images_BCHW, labels_B
            return
        # The buffer is pinned, so the copy runs behind the host. The loader takes the buffer back when it is
        # asked for the next batch: only then must the copy be over, and the step's kernels hide the wait.
        batch = (
            images_BCHW.to(self.device, non_blocking=True),
            labels_B.pin_memory().to(self.device, non_blocking=True),
        )
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        try:
            yield batch
        finally:
            copied.synchronize()


def build_loader(
    data: DataConfig,
    split: Literal["train", "val"],
    *,
    image_size: int,
    batch_size: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> Loader:
    """A loader of `data.train` or `data.val`; make it once for a run, each costs seconds of compilation.

    Args:
        split: `train`: random resized crops and flips, whole optimizer steps only. `val`: the centre crop, every
            image exactly once over all ranks, whatever their number and the batch size.
        image_size: side of the square that is delivered, in pixels.
        batch_size: images of one batch of this rank.
        accumulate: batches of an optimizer step, for each rank.
        seed: of order, crops and flips. All ranks must pass the same.
        device: where batches are delivered. On a GPU, the current stream's work is respected.
        threads: decoding threads where `data.threads` does not say; None: the CPUs this process may use.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, or holds fewer images than one step.
    """
    path = {"train": data.train, "val": data.val}[split]
    if not path:
        raise ValueError(f"data.{split} is empty; give the path of a .beton (jobs/write_beton.py makes one)")
    manifest = check_beton(path)
    threads = data.threads or threads or len(os.sched_getaffinity(0))
    reader: BatchLoader | NativeReader
    if data.backend == "native":
        from lape_ray.data.native_reader import NativeReader  # needs the compiled decoder

        reader = NativeReader(
            path,
            data,
            split,
            image_size=image_size,
            batch_size=batch_size,
            threads=threads,
            seed=seed,
            pin_memory=torch.device(device).type == "cuda",
        )
    else:
        pipeline = _import_pipeline()
        if split == "train":
            decoder = pipeline.random_crop(image_size, data.crop_scale, data.crop_ratio, data.flip)
        else:
            decoder = pipeline.center_crop(image_size, data.eval_crop)
        reader = pipeline.BatchLoader(path, decoder, batch_size=batch_size, threads=threads)
    return Loader(
        reader,
        manifest,
        split=split,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        seed=seed,
        device=torch.device(device),
        repeats=data.repeats,
    )


def _import_pipeline() -> ModuleType:
    """Import ffcv; it would leave torch with one thread."""
    threads = torch.get_num_threads()
    from lape_ray.data import ffcv_pipeline

    torch.set_num_threads(threads)
    return ffcv_pipeline
