"""Read batches of a split: one file for each `data.backend`, chosen by `READERS`.

reader       `Reader`: the interface that they share, and the options that each of them takes
buffers      memory for batches that is used again
ahead        `read_ahead`: batches that are started before they are needed
native       a pass over a .beton through our own decoder, `native/` (C++); the default backend
resident     a pass over small images that lie on the device as a whole
torchvision  a pass over a source through Pillow and torchvision, the measure of the others
ffcv         FFCV's loader, made to fail loudly and to repeat itself; another backend

A reader's file is imported when it is opened: each needs what the others do without, and ffcv takes seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from lape_ray.config import Backend
from lape_ray.data.readers.reader import Reader, ReaderOptions
from lape_ray.data.sources import open_source
from lape_ray.data.split import SplitInfo


INSTALL_FFCV = (
    "install the system's g++, pkg-config, libopencv-dev and libturbojpeg0-dev, then the extra lape_ray[ffcv] "
    "(in a checkout: make setup)"
)


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


def check_backend(backend: Backend) -> None:
    """Raise a ValueError where what `data.backend` needs is not installed; only FFCV may be missing."""
    if backend == "ffcv" and (missing := missing_for_ffcv()):
        raise ValueError(
            f"data.backend=ffcv needs {' and '.join(missing)}, which this Python does not have: {INSTALL_FFCV}; "
            "or choose --data.backend native, which reads the same files"
        )


def missing_for_ffcv() -> list[str]:
    """List the modules that FFCV needs and that are not installed, itself among them. Nothing is imported."""
    return [name for name in ("ffcv", "distutils", "numba") if importlib.util.find_spec(name) is None]


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
