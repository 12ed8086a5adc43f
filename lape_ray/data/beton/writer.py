"""Write a source as a .beton or as a set of shards.

FFCV's own writer waits for ever when one of its processes dies, and stores whatever label it is given. This
one writes the same format without ffcv: processes encode, the caller writes in order, so the same source and
options give the same bytes, whichever process encodes and however often the writing was interrupted; every image
is decoded and every label checked first; and the file appears under its name only when it is whole, with its manifest.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import itertools
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from PIL import Image

import lape_ray
from lape_ray.data.beton.blocks import DIGEST_BYTES, Blocks, block_bytes, hash_blocks
from lape_ray.data.beton.encode import Encoding, Mode, encode
from lape_ray.data.beton.format import (
    ALLOCATION,
    CHECKSUM_BYTES,
    FIELDS,
    FORMAT_VERSION,
    HEADER,
    IMAGE,
    JPEG,
    PAGE_BYTES,
    RAW,
    RECORD,
    RECORDS_START,
    shard_path,
    tables_sha256,
)
from lape_ray.data.beton.journal import Journal, open_journal
from lape_ray.data.beton.manifest import MANIFEST_VERSION, Manifest
from lape_ray.data.native import crc32c
from lape_ray.data.processes import Mapper, processes
from lape_ray.data.sources import Source
from lape_ray.values.typed import Count, typed

PART_SAMPLES = 32  # samples of a part, which is an entry of the journal
TASK_PARTS = (
    8  # the most that a process encodes at a time; with more of them it waits for the caller's reading
)
TASK_BYTES = 1 << 18  # about so many at most, where a part has less
KINDS = ("original_jpeg", "jpeg", "raw")

# A stored sample as the journal keeps it; `index` is the source's.
STORED = np.dtype([("index", "<u8"), ("kind", "u1"), ("image", IMAGE), ("size", "<u4")])


def write_beton(
    source: Source,
    path: str | Path,
    *,
    max_size: int | None = None,
    quality: int = 90,
    mode: Mode = "auto",
    raw_share: float = 0.5,
    markers: int = 4,
    shards: int = 1,
    workers: int | None = None,
    mapper: Mapper | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    fresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write `source` to `path` in the source's order, with its manifest.

    If that fails or is killed, an earlier file of that name stays, and the same call later continues where this
    one ended, from hidden files next to `path`.

    Args:
        max_size: longest side in pixels; larger images are resized once, bicubic with antialiasing. None: never.
        quality: of the JPEGs that are encoded here, 4:2:0; original ones keep theirs.
        mode: `auto` loses nothing it need not: the coefficients of a three-channel JPEG that is small enough;
            else pixels if no side is above 64, where JPEG hurts most; else a JPEG. `jpg` encodes every image
            at `quality`, which on ImageNet halves the file and the time to decode it. `raw` stores pixels.
            `proportion` stores `raw_share` of the images as pixels, the rest as JPEGs.
        markers: JPEGs get a restart marker after every so many MCUs (blocks of 8 or 16 pixels), without loss, so
            that a crop is decoded without what lies around it; their metadata is left out. 0: none, and original
            JPEGs keep their bytes.
        shards: files of the set; more than one are named as train-00003-of-00016.beton for `path` train.beton.
        workers: encoding processes; None: one for each CPU; 1: none, all is done here.
        mapper: who encodes instead (a cluster: `lape_ray.cluster.connection.ray_mapper`); `workers` says nothing then.
        on_error: a sample that cannot be decoded or stored ends the writing with a ValueError that names it
            (`stop`), or is left out and listed in the manifest (`skip`).
        fresh: leave unused what an interrupted call left, and write shards again that exist already.
        progress: called with the samples done and their total.

    Raises:
        ValueError: an option or an image is bad, or another process is writing the same file.
        OSError: the disk is full, or a process died.
    """
    encoding = Encoding(max_size=max_size, quality=quality, mode=mode, raw_share=raw_share, markers=markers)
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r} is not known; choose stop or skip")
    if not 1 <= shards <= min(len(source), 99999):
        raise ValueError(f"shards={shards} is out of range; it must be from 1 to the {len(source)} samples")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_two_sets(path, shards)
    if mapper is None:
        with processes(workers) as mapper:
            return _write_set(source, path, encoding, shards, mapper, on_error, fresh, progress)
    return _write_set(source, path, encoding, shards, mapper, on_error, fresh, progress)


def _refuse_two_sets(path: Path, shards: int) -> None:
    """Refuse a name that would be both a file and a set, or two sets: a reader could not tell them apart."""
    wanted = {path} if shards == 1 else {shard_path(path, shard, shards) for shard in range(shards)}
    others = [
        file
        for file in path.parent.glob(f"{path.stem}*{path.suffix}")
        if file not in wanted and (file == path or _is_shard(file, path))
    ]
    if others:
        raise ValueError(
            f"{others[0]} exists already, of another number of shards; remove it, or choose another name"
        )


def _is_shard(file: Path, path: Path) -> bool:
    middle = file.name[len(path.stem) : len(file.name) - len(path.suffix)]
    return len(middle) == len("-00000-of-00000") and middle[6:10] == "-of-"


def _write_set(
    source: Source,
    path: Path,
    encoding: Encoding,
    shards: int,
    mapper: Mapper,
    on_error: str,
    fresh: bool,
    progress: Callable[[int, int], None] | None,
) -> Manifest:
    manifests = []
    bounds = [len(source) * shard // shards for shard in range(shards + 1)]
    for shard, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = source if shards == 1 else source.take(slice(start, stop))
        file = path if shards == 1 else shard_path(path, shard, shards)
        fingerprint = _fingerprint(part, encoding)
        manifest = None if fresh or shards == 1 else _finished(file, fingerprint)
        if manifest is None:

            def tell(done: int, start: int = start) -> None:
                if progress:
                    progress(start + done, len(source))

            manifest = _write_file(part, file, encoding, fingerprint, mapper, on_error, fresh, tell)
        elif progress:
            progress(stop, len(source))
        if manifest.skipped and on_error == "stop":  # by an earlier call
            raise ValueError(manifest.skipped[0][1])
        manifests.append(manifest)
    return Manifest.of_set(manifests, path)


def _fingerprint(source: Source, encoding: Encoding) -> str:
    """Hash everything that decides a file's bytes, but for the pixels themselves."""
    digest = hashlib.sha256()
    items = source.items_N
    for part in (
        repr((MANIFEST_VERSION, PART_SAMPLES, source.origin, source.classes)),
        repr((encoding, PIL.__version__, Image.core.jpeglib_version)),
        items.tobytes() if items.dtype != object else "\0".join(map(str, items.ravel())),
        source.labels_N.tobytes(),
    ):
        data = (
            part.encode(errors="surrogateescape") if isinstance(part, str) else part
        )  # names need not be UTF-8
        digest.update(struct.pack("<Q", len(data)) + data)
    return digest.hexdigest()


def _finished(file: Path, fingerprint: str) -> Manifest | None:
    """Return the manifest of a shard that an earlier call finished; None if it has to be written."""
    try:
        manifest = Manifest.load(file)
        whole = file.stat().st_size == manifest.bytes
    except (OSError, ValueError):
        return None
    return manifest if whole and manifest.made.get("fingerprint") == fingerprint else None


def _write_file(
    source: Source,
    path: Path,
    encoding: Encoding,
    fingerprint: str,
    mapper: Mapper,
    on_error: str,
    fresh: bool,
    progress: Callable[[int], None],
) -> Manifest:
    with open_journal(path, fingerprint, fresh=fresh) as journal:
        file = _File(journal, len(source))
        if file.skipped and on_error == "stop":  # by an earlier call
            raise ValueError(file.skipped[0][1])
        done = min(PART_SAMPLES * len(journal.earlier), len(source))
        if done:
            progress(done)
        for part in itertools.chain.from_iterable(mapper(encode_parts, _tasks(source, encoding, file))):
            if part.skipped and on_error == "stop":
                raise ValueError(part.skipped[0][1])
            file.append(part)
            done += len(part.stored_N) + len(part.skipped)
            progress(done)
        manifest = file.close(source, encoding, fingerprint)
        # The file comes after its manifest: a writer that is killed in between finds all parts written, and the old
        # file, which its new neighbour does not describe, is refused by every reader until then.
        manifest.save(path)
        journal.finish()
    return manifest


def _tasks(source: Source, encoding: Encoding, file: _File) -> Iterator[tuple[Source, Encoding, int]]:
    """Yield the parts that are missing, several at a time once it is known that their images are small.

    A task costs time of the caller's, and while a process waits for its next one it does nothing.
    """
    start = PART_SAMPLES * len(file.parts)
    while start < len(source):
        stop = start + PART_SAMPLES * file.parts_at_a_time()
        yield source.take(slice(start, stop)), encoding, start
        start = stop


class Packed(NamedTuple):
    """The samples of a part as they go into the file.

    Attributes:
        stored_N: dtype STORED, without the images' places
        data: the images in their order, each with its checksum behind it
        skipped, odd: as the manifest's
    """

    stored_N: np.ndarray
    data: bytes
    skipped: tuple[tuple[str, str], ...]
    odd: dict[str, int]


def encode_parts(task: tuple[Source, Encoding, int]) -> list[Packed]:
    """Encode the samples of a small source, by parts; it starts at the given place of the whole one."""
    source, encoding, start = task
    indices = range(len(source))
    return [
        _encode_part(source, encoding, start, indices[first : first + PART_SAMPLES])
        for first in indices[::PART_SAMPLES]
    ]


def _encode_part(source: Source, encoding: Encoding, start: int, part: range) -> Packed:
    """Encode the samples `part` of a small source, so that not one of them is an object in what is sent back."""
    stored, data, skipped, odd = [], [], [], Counter[str]()
    for index in part:
        try:
            sample = encode(source, index, encoding, start + index)
        except ValueError as error:
            skipped.append((source.name(index), str(error)))
            continue
        data += [sample.data, struct.pack("<I", crc32c(sample.data))]
        image = (RAW if sample.kind == "raw" else JPEG, sample.width, sample.height, 0)
        stored.append((start + index, KINDS.index(sample.kind), image, len(sample.data)))
        if sample.unusual:
            odd[sample.unusual] += 1
    return Packed(np.array(stored, STORED), b"".join(data), tuple(skipped), dict(odd))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The outcome of a part's samples, as the journal keeps it.

    Attributes:
        stored: an array of STORED, in base64
        skipped: name and reason of each sample that was left out
        odd: as the manifest's
    """

    stored: str
    skipped: tuple[tuple[str, str], ...]
    odd: dict[str, Count]

    def records(self) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.stored, validate=True), STORED)


class _File:
    """A .beton between its records, which come last, and its allocation table."""

    def __init__(self, journal: Journal, samples: int) -> None:
        self.journal, self.data = journal, journal.data
        self.samples, self.begin = samples, RECORDS_START + samples * RECORD.itemsize
        self.end = self.begin
        self.parts: list[np.ndarray] = []
        self.skipped: list[tuple[str, str]] = []
        self.odd: Counter[str] = Counter()
        for number, entry in enumerate(journal.earlier):
            try:
                self._take_earlier(typed(_Part, entry), PART_SAMPLES * number)
            except ValueError as error:
                raise journal.damaged(f"entry {number}: {error}") from None

    def _take_earlier(self, part: _Part, first: int) -> None:
        """Take over a part that begins with sample `first`; a ValueError where it cannot be one."""
        stored_N = part.records()
        index_N, offsets_N = stored_N["index"], stored_N["image"]["data_ptr"]
        samples, size = range(first, min(first + PART_SAMPLES, self.samples)), self.data.seek(0, os.SEEK_END)
        if len(stored_N) + len(part.skipped) != len(samples) or not np.isin(index_N, samples).all():
            raise ValueError(f"it does not speak of the samples from {first} on")
        if (stored_N["kind"] >= len(KINDS)).any():
            raise ValueError("it has an image that is stored in no known way")
        outside_N = (offsets_N < self.end) | (
            offsets_N > size
        )  # first, so that the sum below cannot overflow
        if (outside_N | (offsets_N + stored_N["size"] + CHECKSUM_BYTES > size)).any():
            raise ValueError("it has an image outside of what was written")
        self._take(part)
        if len(stored_N):
            self.end = int(offsets_N[-1] + stored_N["size"][-1]) + CHECKSUM_BYTES

    def _take(self, part: _Part) -> None:
        self.parts.append(part.records())
        self.skipped += part.skipped
        self.odd.update(part.odd)

    def parts_at_a_time(self) -> int:
        """Choose how many parts make a task: one at first, then as many as are small together."""
        done = len(self.parts)
        return max(1, min(done // 8, TASK_PARTS, TASK_BYTES * done // (self.end - self.begin + 1)))

    def append(self, part: Packed) -> None:
        stored_N, data = part.stored_N.copy(), memoryview(part.data)  # what Ray sends is read-only
        ends_N = np.cumsum(stored_N["size"].astype(np.int64) + CHECKSUM_BYTES)
        first, begin = 0, 0  # of what is not written yet: the image, and its place in `data`
        while first < len(stored_N):
            room = PAGE_BYTES - self.end % PAGE_BYTES
            last = int(np.searchsorted(ends_N, begin + room, "right"))
            if last == first:  # no image crosses the boundary of a page
                self.end += room
                continue
            end = int(ends_N[last - 1])
            self.data.seek(self.end)
            self.data.write(data[begin:end])
            starts_N = ends_N[first:last] - CHECKSUM_BYTES - stored_N["size"][first:last]
            stored_N["image"]["data_ptr"][first:last] = self.end - begin + starts_N
            self.end += end - begin
            first, begin = last, end
        encoded = base64.b64encode(stored_N.tobytes()).decode()
        entry = _Part(stored=encoded, skipped=part.skipped, odd=part.odd)
        self._take(entry)
        self.journal.add(dataclasses.asdict(entry))

    def close(self, source: Source, encoding: Encoding, fingerprint: str) -> Manifest:
        """Write the tables and bring all of it to the disk."""
        stored_N = np.concatenate(self.parts)
        if not len(stored_N):
            raise ValueError(
                f"none of the {len(self.skipped)} images of {source.origin} can be stored: {self.skipped[0][1]}"
            )
        count = len(stored_N)
        records_N, allocations_N = np.zeros(count, RECORD), np.zeros(count, ALLOCATION)
        records_N["image"] = stored_N["image"]
        records_N["label"] = source.labels_N[stored_N["index"]]
        allocations_N["sample_id"] = np.arange(count)
        allocations_N["ptr"], allocations_N["size"] = stored_N["image"]["data_ptr"], stored_N["size"]
        size = block_bytes(self.end)
        table = self.end + DIGEST_BYTES * -(-self.end // size)
        self.data.seek(table)
        self.data.write(allocations_N.tobytes())
        self.data.truncate()  # an interrupted writer may have come further
        self.data.seek(0)
        header = np.array([(FORMAT_VERSION, len(FIELDS), PAGE_BYTES, count, table)], HEADER)
        self.data.write(header.tobytes() + FIELDS.tobytes() + records_N.tobytes())
        digests, whole = hash_blocks(self.data, self.end, size)
        self.data.seek(self.end)
        self.data.write(digests)
        self.journal.commit()  # a full disk may show only now, and the old pair is still whole
        whole.update(digests + allocations_N.tobytes())
        blocks = Blocks(bytes=size, end=self.end, sha256=hashlib.sha256(digests).hexdigest())
        made = _made(source, encoding, fingerprint)
        return self._manifest(stored_N, records_N, allocations_N, source, made, blocks, whole.hexdigest())

    def _manifest(
        self,
        stored_N: np.ndarray,
        records_N: np.ndarray,
        allocations_N: np.ndarray,
        source: Source,
        made: dict[str, Any],
        blocks: Blocks,
        sha256: str,
    ) -> Manifest:
        """Describe the file, which is complete."""
        images_N = records_N["image"]
        return Manifest(
            version=MANIFEST_VERSION,
            num_samples=len(records_N),
            classes=source.classes,
            class_counts=tuple(np.bincount(records_N["label"], minlength=len(source.classes)).tolist()),
            width=(int(images_N["width"].min()), int(images_N["width"].max())),
            height=(int(images_N["height"].min()), int(images_N["height"].max())),
            bytes=blocks.table + allocations_N.nbytes,
            sha256=sha256,
            tables_sha256=tables_sha256(records_N, allocations_N),
            stored=_kinds(stored_N["kind"]),
            odd=dict(sorted(self.odd.items())),
            skipped=tuple(self.skipped),
            left_out=source.left_out,
            made=made,
            blocks=blocks,
        )


def _kinds(kind_N: np.ndarray) -> dict[str, int]:
    """Count the images (N,) that are stored in each way."""
    counts = np.bincount(kind_N, minlength=len(KINDS)).tolist()
    return {kind: count for kind, count in sorted(zip(KINDS, counts, strict=True)) if count}


def _made(source: Source, encoding: Encoding, fingerprint: str) -> dict[str, Any]:
    """Record how a file is made, for its manifest."""
    return {
        "source": source.origin,
        **dataclasses.asdict(encoding),
        "fingerprint": fingerprint,
        "versions": {
            "lape_ray": lape_ray.__version__,
            "pillow": PIL.__version__,
            "numpy": np.__version__,
        },
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
