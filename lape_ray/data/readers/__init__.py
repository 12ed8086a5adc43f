"""Read batches of a split: one file for each `data.backend`, chosen by `READERS`.

reader       `Reader`: the interface that they share, and the options that each of them takes
buffers      memory for batches that is used again
ahead        `read_ahead`: batches that are started before they are needed
simple       the crop `simple`: squares of a resized image with reflected borders
native       a pass over a .beton through our own decoder, `native/` (C++); the default backend
resident     a pass over small images that lie on the device as a whole
torchvision  a pass over a source through Pillow and torchvision, the measure of the others
ffcv         FFCV's loader, made to fail loudly and to repeat itself; another backend

A reader's file is imported when it is opened: each needs what the others do without, and ffcv takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lape_ray.config import Backend
from lape_ray.data.installed import check_backend
from lape_ray.data.readers.reader import Reader, ReaderOptions
from lape_ray.data.sources import open_source
from lape_ray.data.split import SplitInfo


def _native(split: SplitInfo, options: ReaderOptions) -> Reader:
    from lape_ray.data.readers.native import NativeReader

    return NativeReader(split.path, options)


def _resident(split: SplitInfo, options: ReaderOptions) -> Reader:
    from lape_ray.data.readers.resident import ResidentReader

    return ResidentReader(split.path, options)


def _torchvision(split: SplitInfo, options: ReaderOptions) -> Reader:
    from lape_ray.data.readers.torchvision import TorchvisionReader

    source = open_source(split.path) if split.source is None else split.source
    return TorchvisionReader(source, options)


def _ffcv(split: SplitInfo, options: ReaderOptions) -> Reader:
    check_backend("ffcv")
    threads = torch.get_num_threads()
    from lape_ray.data.readers.ffcv import BatchLoader

    torch.set_num_threads(threads)  # importing ffcv leaves torch with one
    return BatchLoader(split.path, options)


READERS: dict[Backend, Callable[[SplitInfo, ReaderOptions], Reader]] = {
    "native": _native,
    "resident": _resident,
    "torchvision": _torchvision,
    "ffcv": _ffcv,
}
