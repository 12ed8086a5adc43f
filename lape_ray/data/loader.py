"""Batches of a .beton on the device, in an order that is known beforehand.

The order of an epoch is a function of (seed, epoch) alone. Every rank computes it whole and takes its part of it, so
that no process group is needed, any number of ranks sees the same images at the same step, and a run that resumes at
an epoch sees what it would have seen. Crops and flips are keyed the same way.

The batch of a training step consists of M micro-batches, whose images do not depend on the number of ranks either: the
ranks share them out.

Shape suffixes: N samples of a pass, S steps, M micro-batches of a step, B samples of a batch, H and W pixels, C
channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from typing import Literal

import numpy as np
import torch

from lape_ray.config import DataConfig
from lape_ray.data.batch import Batch
from lape_ray.data.processes import usable_cpus
from lape_ray.data.readers import READERS
from lape_ray.data.readers.reader import Reader, ReaderOptions, build_crop
from lape_ray.data.remote import local_split
from lape_ray.data.sampler import rank_part, sample_index, train_epoch_index, train_keys
from lape_ray.data.split import SplitInfo, read_split_info, split_path


class Loader:
    """One rank's batches of a split; made once for a run by `build_loader`.

    Attributes:
        info: the split's description
        num_samples: images of the whole split, over all ranks
    """

    def __init__(
        self,
        reader: Reader,
        info: SplitInfo,
        *,
        split: Literal["train", "val"],
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        micro_batches: int | None = None,
        repeats: int = 1,
    ) -> None:
        self.reader = reader
        self.info = info
        self.num_samples = info.num_samples
        self.split = split
        self.micro_batches = micro_batches or world_size
        self.rank, self.world_size, self.seed, self.device = rank, world_size, seed, device
        self.repeats = repeats
        self.labels_N = reader.labels_N
        self._length = -(-len(self.part(0)[0]) // reader.batch_size)

    def part(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's samples as they are delivered: keys (N,) and epoch indices (N,)."""
        if self.split == "val":
            epoch_index_N = rank_part(np.arange(self.num_samples), self.rank, self.world_size)
            return epoch_index_N, epoch_index_N
        keys_N = train_keys(
            self.num_samples,
            step_samples=self.reader.batch_size * self.micro_batches,
            seed=self.seed,
            epoch=epoch,
            repeats=self.repeats,
        )
        epoch_index_N = train_epoch_index(
            len(keys_N),
            batch_size=self.reader.batch_size,
            micro_batches=self.micro_batches,
            rank=self.rank,
            world_size=self.world_size,
        )
        return keys_N[epoch_index_N], epoch_index_N

    def __len__(self) -> int:
        """Return the batches of an epoch on this rank. Evaluation: ranks may differ by one; the last batch is short."""
        return self._length

    def resize(self, image_size: int) -> None:
        """Deliver images of `image_size` x `image_size` pixels from the next epoch on."""
        self.reader.image_size = image_size

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of one epoch: images uint8 (B, 3, H, W), channels last in memory, and what belongs to them.

        They are the caller's to keep. What goes wrong in the loader's thread is raised here, and the thread
        ends with the loop, however that ends (close the generator if it is not in a `for`).

        Args:
            start: batches to leave out at the beginning; those that follow are what they would have been.
        """
        keys_N, epoch_index_N = self.part(epoch)
        if not 0 <= start <= len(self):
            raise ValueError(f"start={start} must be from 0 to the {len(self)} batches of an epoch")
        rest = slice(start * self.reader.batch_size, None)
        keys_N, epoch_index_N = keys_N[rest], epoch_index_N[rest]
        if len(keys_N) == 0:  # nothing is left, or the ranks are more than the images
            return
        labels_N = torch.from_numpy(self.labels_N[sample_index(keys_N)])
        if self.reader.on_device:
            labels_N = labels_N.to(self.device)
        size = self.reader.batch_size
        parts = np.split(epoch_index_N, range(size, len(epoch_index_N), size))
        batches = self.reader.batches(keys_N, epoch_index_N, epoch)
        try:
            read = (
                Batch(torch.as_tensor(images).permute(0, 3, 1, 2), labels, epoch_index_B)
                for images, labels, epoch_index_B in zip(batches, labels_N.split(size), parts, strict=True)
            )
            if self.device.type != "cpu" and not self.reader.on_device:
                yield from to_gpu(read, self.device)
            elif self.reader.reuses_buffers:
                yield from (batch._replace(images=batch.images.clone()) for batch in read)
            else:
                yield from read
        finally:
            batches.close()


def to_gpu(host: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy the batches of `host` to `device`; each copy is made while the caller works on the one before.

    The copies run on a separate stream, so that they overlap with the caller's kernels, which wait for theirs.
    The next batch is taken from `host`, which may then write over the memory of the one before, only when that has
    been copied. Images must be in pinned memory.
    """
    side = torch.cuda.Stream(device)
    ready: Batch | None = None
    copied: torch.cuda.Event | None = None
    while True:
        if copied is not None:
            copied.synchronize()  # the copy has had the time of a whole step
        batch = next(host, None)
        nxt, event = None, None
        if batch is not None:
            with torch.cuda.stream(side):
                nxt = Batch(
                    batch.images.to(device, non_blocking=True),
                    batch.labels.pin_memory().to(device, non_blocking=True),
                    batch.epoch_index,
                )
                event = torch.cuda.Event()
                event.record(side)
        if ready is not None:
            yield ready
        if nxt is None or event is None:
            return
        stream = torch.cuda.current_stream(device)
        stream.wait_event(event)
        for tensor in (nxt.images, nxt.labels):
            # its memory is not given to the next copy while the caller's kernels run
            tensor.record_stream(stream)
        ready, copied = nxt, event


def build_loader(
    data: DataConfig,
    split: Literal["train", "val"],
    *,
    image_size: int,
    batch_size: int,
    micro_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> Loader:
    """Build a loader of `data.train` or `data.val`, over a copy of what lies on S3.

    Make it once for a run: each costs seconds of compilation.

    Args:
        split: `train`: random resized crops and flips, whole optimizer steps only. `val`: the centre crop, every
            image exactly once over all ranks, whatever their number and the batch size.
        image_size: side of the square that is delivered, in pixels.
        batch_size: images of one batch of this rank.
        micro_batches: batches of an optimizer step over all ranks; None: one for each rank.
        seed: of order, crops and flips. All ranks must pass the same.
        device: where batches are delivered. On a GPU, the current stream's work is respected.
        threads: decoding threads where `data.threads` does not say; None: the CPUs this process may use, within
            what it is pinned to and its container's share.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, or holds fewer images than one step.
    """
    path = local_split(split_path(data, split), arriving=data.backend in ("native", "resident"))
    data = dataclasses.replace(data, train=path) if split == "train" else dataclasses.replace(data, val=path)
    info, device = read_split_info(data, split), torch.device(device)
    options = ReaderOptions(
        crop=build_crop(data, split),
        image_size=image_size,
        batch_size=batch_size,
        threads=data.threads or threads or usable_cpus(),
        seed=seed,
        device=device,
    )
    return Loader(
        READERS[data.backend](info, options),
        info,
        split=split,
        micro_batches=micro_batches,
        rank=rank,
        world_size=world_size,
        seed=seed,
        device=device,
        repeats=data.repeats,
    )
