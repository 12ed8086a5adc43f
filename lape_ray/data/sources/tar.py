"""WebDataset shards: tar files in which a sample is a few files of one name, an image and its label among them.

An index is made by one pass over the headers; from then on an image is a seek and a read.

Shape suffix: N samples.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lape_ray.data.processes import processes
from lape_ray.data.sources.base import EXTENSIONS
from lape_ray.data.sources.shards import TAR_NAME, Shards, find_shards, numbered_classes

CLASSES_FILE = "classes.txt"
JSON_KEYS = ("label", "cls")
LABEL_BYTES = 2**20  # a larger label is none
NAME_BYTES = 120  # of a member's name are kept, its end
SHARDS_WORTH_PROCESSES = 16
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
UNPACKERS = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}


@dataclass(frozen=True, eq=False)
class TarShards(Shards):
    """Images in uncompressed tar files; items are (shard, offset, size in bytes, name of the member)."""

    def name(self, index: int) -> str:
        item = self.items_N[index]
        return f"{self.files[item['shard']]} member {item['member'].decode(errors='replace')}"

    def encoded(self, index: int) -> bytes:
        item = self.items_N[index]
        try:
            with Path(self.files[item["shard"]]).open("rb") as file:
                file.seek(int(item["offset"]))
                data = file.read(int(item["size"]))
        except OSError as error:
            raise ValueError(f"{self.name(index)} cannot be read: {error.strerror}") from error
        if len(data) < item["size"]:
            raise ValueError(f"{self.name(index)} ends early: the file was cut after its index was made")
        return data


def tar_shards(where: str, split: str | None = None, *, workers: int | None = None) -> TarShards:
    """Open the samples of the shards of `where` and `split` (`find_shards`), in the order in which they begin.

    As in WebDataset, a sample is the members of one folder and name up to its first dot, wherever in the shard they
    are. It has one image (`.jpg`, ... as in `EXTENSIONS`) and a label: whole-number text in `.cls`, or else the
    `label` or `cls` of the object in `.json`. Samples with none of the three, hidden files and folders do not count.

    Class names are the lines of `classes.txt` next to the shards or in the folder `where`; without one, the labels
    from 0 to the largest.

    Args:
        workers: processes that make the index; None: one for each CPU where shards are many.

    Raises:
        ValueError: a shard is missing, compressed, cut or damaged; a sample has no label, no image, two images or a
            label that is no whole number. Names the shard and the sample.
        OSError: a process died.
    """
    files = _find(where, split)
    if workers is None and len(files) < SHARDS_WORTH_PROCESSES:
        workers = 1
    with processes(workers) as mapper:
        parts = list(mapper(index_shard, files))
    names = [name for part in parts for name in part.names]
    items_N = np.empty(
        len(names),
        [
            ("shard", "<i4"),
            ("offset", "<i8"),
            ("size", "<i8"),
            ("member", f"S{max(map(len, names), default=1)}"),
        ],
    )
    items_N["shard"] = np.repeat(np.arange(len(parts)), [len(part.names) for part in parts])
    for column in ("offset", "size"):
        items_N[column] = np.concatenate([getattr(part, f"{column}_N") for part in parts])
    items_N["member"] = names
    labels_N = np.concatenate([part.labels_N for part in parts])
    return TarShards(
        origin=f"{where} ({split})" if split else where,
        classes=_classes(where, files) or numbered_classes(labels_N, where),
        labels_N=labels_N,
        items_N=items_N,
        files=files,
    )


def _find(where: str, split: str | None) -> tuple[str, ...]:
    folder = Path(where)
    if folder.is_dir() and not next(folder.rglob("*.tar"), None):
        for path in sorted(folder.rglob("*")):
            if TAR_NAME.search(path.name) and path.is_file():
                with path.open("rb") as file:
                    _refuse_compressed(str(path), file)
    return find_shards(where, split, ".tar")


class Index(NamedTuple):
    """The places of a shard's images (N), and their labels."""

    names: list[bytes]
    offset_N: np.ndarray
    size_N: np.ndarray
    labels_N: np.ndarray


class _Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


def index_shard(path: str) -> Index:
    """Read the headers and labels of the tar at `path`; see `tar_shards` for what is refused."""
    samples: dict[str, dict[str, _Member]] = {}  # key -> extension -> member
    images: list[_Member] = []
    labels: list[int] = []
    try:
        with Path(path).open("rb") as file:
            _refuse_compressed(path, file)
            for member in _members(path, file):
                folder, slash, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not stem or not dot:
                    continue
                fields = samples.setdefault(folder + slash + stem, {})
                if fields.setdefault(extension.lower(), member) is not member:
                    raise ValueError(f"{path}: {member.name!r} occurs twice; leave one of them")
            for key, fields in samples.items():
                image = _image(path, key, fields)
                if image:
                    images.append(image)
                    labels.append(_label(path, key, fields, file))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return Index(
        [image.name.encode(errors="surrogateescape")[-NAME_BYTES:] for image in images],
        np.array([image.offset for image in images], np.int64),
        np.array([image.size for image in images], np.int64),
        np.array(labels, np.int64),
    )


def _members(path: str, file: BinaryIO) -> Iterator[_Member]:
    """Yield the plain files of a tar that is whole: what `tarfile` takes for the end must be one."""
    end = 0
    with _opened(path, file) as tar:
        while (member := _next(path, tar)) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every one
            if member.size < 0 or member.offset < end:
                raise ValueError(
                    f"{path} is damaged: member {member.name!r} has a size or place that cannot be"
                )
            end = member.offset_data + member.size
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise ValueError(
                    f"{path}: member {member.name!r} is a link or no plain file; pack the files themselves "
                    "(tar --dereference --hard-dereference)"
                )
            yield _Member(member.name, member.offset_data, member.size)
        rest = tar.offset  # of what tarfile took for the end
    file.seek(rest)
    padding, only_zeros = 0, True
    while block := file.read(2**20):
        padding += len(block)
        only_zeros = only_zeros and block.count(0) == len(block)
    if padding < tarfile.BLOCKSIZE:
        raise ValueError(f"{path} is cut: it has no end mark; copy it again, or pack it to the end")
    if not only_zeros:
        raise ValueError(
            f"{path} continues after byte {rest}, where it should end: a damaged header, or files joined without "
            "tar -A; copy it again, or give the parts as shards"
        )


# What tarfile raises for headers that make no sense.
_TAR_ERRORS = (tarfile.TarError, ValueError, RecursionError, OverflowError, EOFError)


def _opened(path: str, file: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except _TAR_ERRORS as error:
        raise _damaged(path, error) from error


def _next(path: str, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except _TAR_ERRORS as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: BaseException) -> ValueError:
    return ValueError(f"{path} is no tar file, or cut or damaged ({error}); copy it again")


def _refuse_compressed(path: str, file: BinaryIO) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"{path} is compressed with {kind}, and images are read in place; unpack it with "
                f"`{UNPACKERS[kind]}` to a plain .tar"
            )


def _image(path: str, key: str, fields: dict[str, _Member]) -> _Member | None:
    """Return the image of a sample; None if the key has nothing of a sample; ValueError if it is one by half."""
    has = f"it has {', '.join(f'.{extension}' for extension in fields)}"
    images = [member for extension, member in fields.items() if f".{extension}" in EXTENSIONS]
    if len(images) > 1:
        raise ValueError(
            f"{path}: {images[0].name!r} and {images[1].name!r} are two images of one sample; rename one of them"
        )
    if images and not LABELS.keys() & fields.keys():
        raise ValueError(
            f"{path}: sample {key!r} has no label; {has}, and needs .cls, or .json with label or cls"
        )
    if not images and LABELS.keys() & fields.keys():
        raise ValueError(
            f"{path}: sample {key!r} has no image; {has}, and needs one of {', '.join(EXTENSIONS)}"
        )
    return images[0] if images else None


def _label(path: str, key: str, fields: dict[str, _Member], file: BinaryIO) -> int:
    """Read the label of a sample that has one."""
    extension = next(extension for extension in LABELS if extension in fields)
    member = fields[extension]
    try:
        if member.size > LABEL_BYTES:
            raise ValueError(f"it has {member.size:,} bytes")
        file.seek(member.offset)
        return LABELS[extension](file.read(member.size))
    except ValueError as error:
        raise ValueError(f"{path}: {member.name!r} holds no label: {error}") from error


def _cls_label(text: bytes) -> int:
    if not re.fullmatch(rb"[+-]?[0-9]{1,18}", text.strip()):
        raise ValueError(f"{text[:40]!r} is not a whole number in digits")
    return int(text)


def _json_label(text: bytes) -> int:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    found = [value[name] for name in JSON_KEYS if name in value] if isinstance(value, dict) else []
    if not found:
        raise ValueError(f"it is no object with {' or '.join(JSON_KEYS)}")
    if type(found[0]) is not int or abs(found[0]) >= 10**18:
        raise ValueError(f"{found[0]!r:.40} is not a whole number")
    return found[0]


# By extension; the first that a sample has counts.
LABELS: dict[str, Callable[[bytes], int]] = {"cls": _cls_label, "json": _json_label}


def _classes(where: str, files: tuple[str, ...]) -> tuple[str, ...] | None:
    for folder in (Path(files[0]).parent, Path(where)):
        file = folder / CLASSES_FILE
        if file.is_file():
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            names = tuple(line.strip() for line in lines)
            if not names or not all(names):
                raise ValueError(f"{file} must have the name of a class on each line; it has an empty one")
            return names
    return None
