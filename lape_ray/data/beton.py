"""Writes a source as a .beton, the file format of FFCV 1.x (version 2), and checks such files.

FFCV's own writer waits for ever when one of its processes dies, and stores whatever label it is given. This
one writes the same format without ffcv: processes encode, the parent writes in order, so the same source and
options give the same bytes whatever the number of processes; every image is decoded and every label checked
first; and the file appears under its name only when it is whole, with a manifest beside it.

A .beton holds, in order: a header; a description of each field; a record for each sample (`RECORD`); the
images' bytes, none across the boundary of a page; a table (`ALLOCATION`) of where each image's bytes are.
Shape suffix: N samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import PIL
from PIL import Image

import lape_ray
from lape_ray.data.sources import Source, load_image, to_rgb

Mode = Literal["auto", "jpg", "raw", "proportion"]
MANIFEST_VERSION = 1
FORMAT_VERSION = 2
PAGE_BYTES = 8 << 20
SMALL_SIDE = 64  # up to this side, pixels are smaller than the time it takes to decode them
PART_SAMPLES = 32  # samples that a process encodes at a time

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = np.array([(2, b"image", 0), (1, b"label", 0)], FIELD)  # RGBImageField, IntField
JPEG, RAW = 0, 1  # IMAGE["mode"]
RECORDS_START = HEADER.itemsize + FIELDS.nbytes

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a .beton holds, kept beside it as <name>.beton.json.

    Attributes:
        version: of this description
        num_samples: images in the file
        classes: name of each label
        class_counts: images of each label
        width, height: smallest and largest, in pixels
        bytes, sha256: of the whole .beton
        stored: how many images are kept as `original_jpeg`, encoded as `jpeg`, or `raw` pixels
        skipped: [name, reason] of each sample that was left out
        made: source, options, library versions and time
    """

    version: int
    num_samples: int
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    width: tuple[int, int]
    height: tuple[int, int]
    bytes: int
    sha256: str
    stored: dict[str, int]
    skipped: tuple[tuple[str, str], ...]
    made: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """The manifest of the .beton at `path`; FileNotFoundError or ValueError if it is absent or not one."""
        file = manifest_path(path)
        try:
            values = json.loads(file.read_text())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{file} is missing; copy it with its .beton, or write both again"
            ) from None
        except ValueError as error:
            raise ValueError(f"{file} is not a manifest ({error}); write the .beton again") from error
        names = [field.name for field in dataclasses.fields(cls)]
        if (
            not isinstance(values, dict)
            or values.get("version") != MANIFEST_VERSION
            or set(values) != set(names)
        ):
            raise ValueError(
                f"{file} is not a manifest of version {MANIFEST_VERSION}; write the .beton again"
            )
        return cls(**{name: _tuples(values[name]) for name in names})

    def save(self, path: str | Path) -> None:
        """Write it beside the .beton at `path`."""
        with _appearing(manifest_path(path)) as file:
            file.write((json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    def summary(self, path: str | Path) -> str:
        """The file at `path` in a few lines for people."""
        (low_w, high_w), (low_h, high_h) = self.width, self.height
        stored = ", ".join(f"{count:,} {kind}" for kind, count in self.stored.items())
        lines = [
            f"{path}: {self.num_samples:,} images of {len(self.classes)} classes, {self.bytes:,} bytes",
            f"  {low_w}..{high_w} pixels wide, {low_h}..{high_h} high; stored as {stored}",
            f"  {min(self.class_counts):,}..{max(self.class_counts):,} images a class",
        ]
        return "\n".join(lines + [f"  skipped: {reason}" for _, reason in self.skipped])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of the .beton at `path` lies."""
    return Path(f"{path}.json")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are stored; see `write_beton`."""

    max_size: int | None = None
    quality: int = 90
    mode: Mode = "auto"
    raw_share: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is not known; choose one of {', '.join(get_args(Mode))}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} is out of range; it must be from 1 to 100")
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"max_size={self.max_size} must be a number of pixels, or none")
        if not 0 <= self.raw_share <= 1:
            raise ValueError(f"raw_share={self.raw_share} is out of range; it must be from 0 to 1")


class Encoded(NamedTuple):
    """One image as it goes into the file; `kind` is a key of Manifest.stored."""

    kind: str
    width: int
    height: int
    data: bytes


class Rejected(NamedTuple):
    """One sample that cannot be stored."""

    name: str
    reason: str


def encode(source: Source, index: int, encoding: Encoding, position: int) -> Encoded:
    """Sample `index` of `source` as it is stored at `position` of the file; ValueError if it cannot be."""
    encoded, name = source.encoded(index), source.name(index)
    original = load_image(encoded, name)
    image = to_rgb(original, name)
    shrink = (encoding.max_size or max(image.size)) / max(image.size)
    if shrink < 1:
        width, height = (max(1, round(side * shrink)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Decoders of FFCV give the pixels of any three-channel JPEG, and apply no EXIF rotation, as `to_rgb`.
    # MPO is a JPEG with more pictures behind it.
    reusable = shrink >= 1 and original.mode == "RGB" and original.format in ("JPEG", "MPO")
    # Evenly spread along the file, and exact: a raw image wherever position * share passes a whole number.
    turn = int((position + 1) * encoding.raw_share) > int(position * encoding.raw_share)
    raw = encoding.mode == "raw" or (encoding.mode == "proportion" and turn)
    if encoding.mode == "auto":
        raw = not reusable and max(image.size) <= SMALL_SIDE
    if raw:
        kind, data = "raw", image.tobytes()
    elif reusable and encoding.mode != "jpg":
        kind, data = "original_jpeg", encoded
    else:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=encoding.quality, optimize=True)
        kind, data = "jpeg", file.getvalue()
    if len(data) > PAGE_BYTES or max(image.size) > 0xFFFF:
        raise ValueError(
            f"{name} is {image.width}x{image.height} pixels and {len(data):,} bytes; a .beton takes "
            f"{0xFFFF} pixels a side and {PAGE_BYTES:,} bytes; set max_size"
        )
    return Encoded(kind, image.width, image.height, data)


def write_beton(
    source: Source,
    path: str | Path,
    *,
    max_size: int | None = None,
    quality: int = 90,
    mode: Mode = "auto",
    raw_share: float = 0.5,
    workers: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write `source` to `path` in the source's order, with its manifest; if that fails, what was there stays.

    Args:
        max_size: longest side in pixels; larger images are resized once, bicubic with antialiasing. None: never.
        quality: of the JPEGs that are encoded here, 4:2:0; original bytes keep theirs.
        mode: `auto` loses nothing it need not: the original bytes of a three-channel JPEG that is small enough;
            else pixels if no side is above 64, where JPEG hurts most; else a JPEG. `jpg` encodes every image
            at `quality`, which on ImageNet halves the file and the time to decode it. `raw` stores pixels.
            `proportion` stores `raw_share` of the images as pixels, the rest as original bytes or JPEG.
        workers: encoding processes; None: one for each CPU there is; 1: none, all is done here.
        on_error: a sample that cannot be decoded or stored ends the writing with a ValueError that names it
            (`stop`), or is left out and listed in the manifest (`skip`).
        progress: called with the samples done and their total.

    Raises:
        ValueError: an option or an image is bad; nothing is left behind.
        OSError: the disk is full, or a process died.
    """
    encoding = Encoding(max_size=max_size, quality=quality, mode=mode, raw_share=raw_share)
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r} is not known; choose stop or skip")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(source), PART_SAMPLES)
    tasks = ((source.take(slice(start, start + PART_SAMPLES)), encoding, start) for start in starts)
    records_N = np.zeros(len(source), RECORD)
    allocations_N = np.zeros(len(source), ALLOCATION)
    stored: Counter[str] = Counter()
    skipped: list[Rejected] = []
    count = 0

    with _appearing(path) as file:
        end = RECORDS_START + records_N.nbytes
        for results in _ordered_map(_encode_part, tasks, workers):
            for sample in results:
                if isinstance(sample, Rejected):
                    if on_error == "stop":
                        raise ValueError(sample.reason)
                    skipped.append(sample)
                    continue
                if end % PAGE_BYTES + len(sample.data) > PAGE_BYTES:
                    end += -end % PAGE_BYTES
                file.seek(end)
                file.write(sample.data)
                label = source.label(count + len(skipped))
                image = (RAW if sample.kind == "raw" else JPEG, sample.width, sample.height, end)
                records_N[count] = (image, label)
                allocations_N[count] = (count, end, len(sample.data))
                end += len(sample.data)
                stored[sample.kind] += 1
                count += 1
            if progress:
                progress(count + len(skipped), len(source))
        if not count:
            raise ValueError(
                f"none of the {len(skipped)} images of {source.origin} can be stored: {skipped[0].reason}"
            )
        records_N, allocations_N = records_N[:count], allocations_N[:count]
        file.seek(end)
        file.write(allocations_N.tobytes())
        file.seek(0)
        header = np.array([(FORMAT_VERSION, len(FIELDS), PAGE_BYTES, count, end)], HEADER)
        file.write(header.tobytes() + FIELDS.tobytes() + records_N.tobytes())
        file.flush()
        os.fsync(file.fileno())  # a full disk may show only now, and the old pair is still whole
        file.seek(0)
        images_N, labels_N = records_N["image"], records_N["label"]
        manifest = Manifest(
            version=MANIFEST_VERSION,
            num_samples=count,
            classes=source.classes,
            class_counts=tuple(np.bincount(labels_N, minlength=len(source.classes)).tolist()),
            width=(int(images_N["width"].min()), int(images_N["width"].max())),
            height=(int(images_N["height"].min()), int(images_N["height"].max())),
            bytes=end + allocations_N.nbytes,
            sha256=hashlib.file_digest(file, "sha256").hexdigest(),
            stored=dict(sorted(stored.items())),
            skipped=tuple((sample.name, sample.reason) for sample in skipped),
            made={
                "source": source.origin,
                **dataclasses.asdict(encoding),
                "versions": {
                    "lape_ray": lape_ray.__version__,
                    "pillow": PIL.__version__,
                    "numpy": np.__version__,
                },
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            },
        )
        # A manifest never lies beside a file that it does not describe: the old one goes first.
        manifest_path(path).unlink(missing_ok=True)
    manifest.save(path)
    return manifest


def _encode_part(task: tuple[Source, Encoding, int]) -> list[Encoded | Rejected]:
    source, encoding, start = task
    results: list[Encoded | Rejected] = []
    for index in range(len(source)):
        try:
            results.append(encode(source, index, encoding, start + index))
        except ValueError as error:
            results.append(Rejected(source.name(index), str(error)))
    return results


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[io.BufferedRandom]:
    """A file that has the name `path` once it is written to the end and on the disk, and else leaves nothing.

    Readers that have the old file open keep it: a mapped file that is rewritten in place kills them (SIGBUS).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _ordered_map(function: Callable[[T], R], tasks: Iterable[T], workers: int | None) -> Iterator[R]:
    """`map` over processes, with a bounded number of results in memory; OSError if a process dies."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the parent may hold threads (arrow, torch) whose locks a fork would copy.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        pending: deque[Future[R]] = deque()
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a process died, most likely killed for want of memory; use fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def check_beton(
    path: str | Path, *, num_classes: int | None = None, deep: bool = False, workers: int | None = None
) -> Manifest:
    """The manifest of the .beton at `path`, if the file agrees with it; cheap (tens of ms for ImageNet).

    Args:
        num_classes: outputs of the model that will be trained; every label must lie below.
        deep: also compare the sha256 and decode every image, with `workers` processes.

    Raises:
        FileNotFoundError: the file or its manifest is missing.
        ValueError: the file is truncated, damaged, of another format, or its labels do not fit; says the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; write it with jobs/write_beton.py")
    manifest = Manifest.load(path)
    if path.stat().st_size != manifest.bytes:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes but its manifest says {manifest.bytes:,}; copy or write it again"
        )
    records_N = read_records(path)
    if len(records_N) != manifest.num_samples:
        raise ValueError(
            f"{path} holds {len(records_N)} samples but its manifest says {manifest.num_samples}; write it again"
        )
    highest = min(num_classes or len(manifest.classes), len(manifest.classes)) - 1
    low, high = int(records_N["label"].min()), int(records_N["label"].max())
    if low < 0 or high > highest:
        raise ValueError(
            f"{path} has labels from {low} to {high}, outside 0..{highest}; it has {len(manifest.classes)} classes"
            + (
                f": set model.num_classes={len(manifest.classes)}"
                if 0 <= low <= high < len(manifest.classes)
                else ""
            )
        )
    if deep:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.sha256:
                raise ValueError(
                    f"{path} is damaged: its sha256 is not its manifest's; copy or write it again"
                )
        parts = (
            range(i, min(i + PART_SAMPLES, len(records_N))) for i in range(0, len(records_N), PART_SAMPLES)
        )
        for reason in _ordered_map(_decode_part, ((path, part) for part in parts), workers):
            if reason:
                raise ValueError(f"{path} {reason}; write it again")
    return manifest


def read_records(path: str | Path) -> np.ndarray:
    """The records (N,) of dtype `RECORD` of a .beton; ValueError if it is none, or not of image and label."""
    size = Path(path).stat().st_size
    if size >= RECORDS_START:
        header = np.fromfile(path, HEADER, 1)[0]
        fields = np.fromfile(path, FIELD, len(FIELDS), offset=HEADER.itemsize)
        known = header["version"] == FORMAT_VERSION and header["num_fields"] == len(FIELDS)
        if known and np.array_equal(fields[["type_id", "name"]], FIELDS[["type_id", "name"]]):
            count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
            if count and table + count * ALLOCATION.itemsize == size:
                return np.fromfile(path, RECORD, count, offset=RECORDS_START)
            raise ValueError(
                f"{path} is truncated: {size:,} bytes do not hold its {count} samples; copy it again"
            )
    raise ValueError(f"{path} is not an FFCV file of images and labels; write it with jobs/write_beton.py")


def _decode_part(task: tuple[Path, range]) -> str | None:
    """What is wrong with the first bad image among `part`; None if all decode to their recorded size."""
    path, part = task
    table = int(np.fromfile(path, HEADER, 1)[0]["alloc_table_ptr"])
    images = np.fromfile(path, RECORD, len(part), offset=RECORDS_START + part.start * RECORD.itemsize)[
        "image"
    ]
    allocations = np.fromfile(path, ALLOCATION, len(part), offset=table + part.start * ALLOCATION.itemsize)
    with path.open("rb") as file:
        for index, image, (_, start, size) in zip(part, images, allocations, strict=True):
            file.seek(int(start))
            data = file.read(int(size))
            if image["mode"] == RAW:
                sound = len(data) == 3 * int(image["width"]) * int(image["height"])
            else:
                try:
                    decoded = load_image(data, f"image {index}")
                except ValueError as error:
                    return str(error)
                sound = decoded.mode == "RGB" and decoded.size == (image["width"], image["height"])
            if not sound or int(start) != int(image["data_ptr"]):
                return f"image {index} is not as its record says"
    return None
