"""Tar shards of very many small JPEGs, and what it costs to write and to read them; a process for each measurement.

python many_images.py shards FOLDER IMAGES      make the shards
python many_images.py write FOLDER BETON        convert them, as jobs/write_beton.py does, with two processes
python many_images.py read BETON                open the loader of a training, order an epoch, begin in its middle

Each prints its measurement as JSON. Times are of the CPU in seconds, of all threads (`write`: and processes), as other
programs may take their part of the machine; memory is resident, in bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import statistics
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

SHARD_IMAGES = 1280
CLASSES = 1000
SEED, BATCH = 0, 256


def label(index: int | np.ndarray) -> int | np.ndarray:
    """Return the label of the image at an index."""
    return index * 31 % CLASSES


def jpegs() -> list[bytes]:
    """Make 16 JPEGs of 700 to 1,100 bytes and different sizes."""
    rng = np.random.default_rng(0)
    files = [io.BytesIO() for _ in range(16)]
    for number, file in enumerate(files):
        image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        size = 16 + 2 * number, 16 + 2 * number + number % 3
        image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return [file.getvalue() for file in files]


def make_shards(folder: Path, images: int) -> None:
    """Write shards of SHARD_IMAGES images, each of a name of its own and with a label."""
    folder.mkdir()
    stored = jpegs()
    for shard, start in enumerate(range(0, images, SHARD_IMAGES)):
        with (folder / f"train-{shard:04}.tar").open("wb") as file:
            for index in range(start, min(start + SHARD_IMAGES, images)):
                file.write(_member(f"{index:08}.jpg", stored[index * 7 % 16]))
                file.write(_member(f"{index:08}.cls", str(label(index)).encode()))
            file.write(bytes(2 * tarfile.BLOCKSIZE))


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak(pid: int | str = "self") -> int:
    """Return the most memory that a process has had since its program began (rusage would begin with its parent's)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@contextlib.contextmanager
def watched_children() -> Iterator[dict[int, int]]:
    """Yield what fills with the peak of each child's memory, by its number."""
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            for child in psutil.Process().children():
                with contextlib.suppress(OSError, IndexError):  # it has ended
                    peaks[child.pid] = peak(child.pid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()


def write(folder: str, path: str) -> dict[str, float]:
    """Measure the conversion."""
    from lape_ray.data.beton.convert import convert

    before, wall = cpu_seconds(), time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()), watched_children() as peaks:  # without the bar
        convert(folder, path, workers=2)
    return {
        "write": cpu_seconds() - before,
        "write_wall": time.perf_counter() - wall,
        "writer_bytes": peak(),
        "encoder_bytes": max(peaks.values()),
    }


def read(path: str) -> dict[str, float]:
    """Measure a training's loader: the median of three for each time."""
    from lape_ray.config import DataConfig
    from lape_ray.data.loader import Loader, build_loader

    loaders: list[Loader] = []

    def open_loader() -> None:
        loaders[:] = [
            build_loader(
                DataConfig(train=path), "train", image_size=32, batch_size=BATCH, seed=SEED, threads=2
            )
        ]

    def begin(start: int) -> None:
        with contextlib.closing(loaders[0].epoch(1, start=start)) as batches:
            next(batches)

    def median(action: Callable[[], None]) -> float:
        times = []
        for _ in range(3):
            before = cpu_seconds()
            action()
            times.append(cpu_seconds() - before)
        return statistics.median(times)

    imported = peak()
    found = {"open": median(open_loader)}
    found["order"] = median(lambda: loaders[0].part(1) and None)
    found["resume"] = median(lambda: begin(len(loaders[0]) // 2))
    return {**found, "loader_bytes": peak() - imported, "process_bytes": peak()}


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "shards":
        make_shards(Path(words[0]), int(words[1]))
    else:
        print(json.dumps(write(*words) if what == "write" else read(*words)))
