"""WebDataset shards: tar files in which a sample is a few files of one name, an image and its label among them.

An index is made by one pass over the headers; from then on an image is a seek and a read.

Shape suffix: N samples.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from lape_ray.data.processes import processes
from lape_ray.data.sources.base import EXTENSIONS
from lape_ray.data.sources.find import CLASSES_FILE, find_shards
from lape_ray.data.sources.listing import LeftOut, is_hidden
from lape_ray.data.sources.shards import Shards, numbered_classes

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
        shard, offset, size, _ = self.items_N[index].item()
        try:
            with open(self.files[shard], "rb") as file:  # noqa: PTH123  # which takes less time than Path.open
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise ValueError(f"{self.name(index)} cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise ValueError(f"{self.name(index)} ends early: the file was cut after its index was made")
        return data


def tar_shards(where: str, split: str | None = None, *, workers: int | None = None) -> TarShards:
    """Open the samples of the shards of `where` and `split` (`find_shards`), in the order in which they begin.

    As in WebDataset, a sample is the members of one folder and name up to its first dot, wherever in the shard they
    are; names with more dots are read too (`_samples`). It has one image (`.jpg`, ... as in `EXTENSIONS`) and a label:
    whole-number text in `.cls`, or else the `label` or `cls` of the object in `.json`. What makes no sample is counted
    as left out, as are hidden files and folders.

    Class names are the lines of `classes.txt` next to the shards or in the folder `where`; without one, the labels
    from 0 to the largest.

    Args:
        workers: processes that make the index; None: one for each CPU where shards are many.

    Raises:
        ValueError: a shard is missing, compressed, cut or damaged; a sample has no label, no image, two images or a
            label that is no whole number. Names the shard and the sample.
        OSError: a process died.
    """
    files, left_out = find_shards(where, split, "tar")
    if workers is None and len(files) < SHARDS_WORTH_PROCESSES:
        workers = 1
    with processes(workers) as mapper:
        parts = list(mapper(index_shard, files))
    for part in parts:
        left_out.update(part.left_out)
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
        left_out=left_out.words(),
    )


class Index(NamedTuple):
    """The places of a shard's images (N), their labels, and what belongs to no sample."""

    names: list[bytes]
    offset_N: np.ndarray
    size_N: np.ndarray
    labels_N: np.ndarray
    left_out: LeftOut


class _Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


def index_shard(path: str) -> Index:
    """Read the headers and labels of the tar at `path`; see `tar_shards` for what is refused."""
    images: list[_Member] = []
    labels: list[int] = []
    left_out = LeftOut()
    try:
        with Path(path).open("rb") as file:
            _refuse_compressed(path, file)
            samples = _samples(path, file, left_out)
            for key, fields in samples.items():
                if image := _image(path, key, fields):
                    images.append(image)
                    labels.append(_label(path, key, fields, file))
                _count_rest(path, fields, bool(image), left_out)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not images:
        _refuse_tars(path, samples)
    return Index(
        [image.name.encode(errors="surrogateescape")[-NAME_BYTES:] for image in images],
        np.array([image.offset for image in images], np.int64),
        np.array([image.size for image in images], np.int64),
        np.array(labels, np.int64),
        left_out,
    )


def _samples(path: str, file: BinaryIO, left_out: LeftOut) -> dict[str, dict[str, _Member]]:
    """Read which members each sample has: key -> extension -> member.

    A name ends at its first dot, as in WebDataset; but what has an image and a label of one name up to the last dot
    (`photo v1.0.jpg`, `photo v1.0.cls`) is a sample of that name.
    """
    groups: dict[str, dict[str, _Member]] = {}  # by the name up to the last dot
    for member in _members(path, file):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.rpartition(".")
        folders = [name for name in folder.split("/") if name not in (".", "..")]
        if not dot or any(is_hidden(name) for name in (*folders, base)):
            left_out.add("member of no sample", f"{path} member {member.name}")
        else:
            _add(path, groups, folder + slash + stem, extension, member)
    whole = {
        key: fields for key, fields in groups.items() if _images(fields) and LABELS.keys() & fields.keys()
    }
    samples = {key: dict(fields) for key, fields in whole.items()}
    for key, fields in groups.items():
        for extension, member in fields.items() if key not in whole else ():
            _add(path, samples, *_owner(key, extension, whole), member)
    return dict(
        sorted(samples.items(), key=lambda sample: min(member.offset for member in sample[1].values()))
    )


def _owner(key: str, extension: str, whole: Collection[str]) -> tuple[str, str]:
    """Return a member's sample, the longest name in `whole` or else up to the first dot, and its extension there."""
    folder, slash, base = key.rpartition("/")
    parts = [*base.split("."), extension]
    lengths = [n for n in range(len(parts) - 1, 0, -1) if folder + slash + ".".join(parts[:n]) in whole]
    length = lengths[0] if lengths else 1
    return folder + slash + ".".join(parts[:length]), ".".join(parts[length:])


def _count_rest(path: str, fields: Mapping[str, _Member], is_sample: bool, left_out: LeftOut) -> None:
    """Count the members that are not read: further images of a sample, or all that make none."""
    for extension, member in fields.items():
        name = f"{path} member {member.name}"
        if not is_sample:
            left_out.add("member of no sample", name)
        elif "." in extension and member.name.lower().endswith(EXTENSIONS):
            left_out.add("further image of a sample", name)


def _add(
    path: str, samples: dict[str, dict[str, _Member]], key: str, extension: str, member: _Member
) -> None:
    if samples.setdefault(key, {}).setdefault(extension.lower(), member) is not member:
        raise ValueError(f"{path}: {member.name!r} occurs twice; leave one of them")


def _images(fields: Mapping[str, _Member]) -> list[_Member]:
    return [member for extension, member in fields.items() if f".{extension}" in EXTENSIONS]


def _refuse_tars(path: str, samples: Mapping[str, Mapping[str, _Member]]) -> None:
    """Refuse a tar of tars, such as ImageNet's ILSVRC2012_img_train.tar."""
    tars = [
        member.name
        for fields in samples.values()
        for name, member in fields.items()
        if "tar" in name.split(".")
    ]
    if tars:
        raise ValueError(
            f"{path} is a tar of tars, such as {tars[0]!r}; unpack it, and each of them into a folder named after it"
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


# Mode, owner, size, time and checksum of a plain file, as all programs write them, up to the type.
_PLAIN = re.compile(rb"(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})[\0 ]{2}0")
_NO_DEVICE = (bytes(17), b"0000000\0" * 2 + b"\0")  # numbers of a device, and then no first part of the name


class Header(tarfile.TarInfo):
    """Read what is needed of a plain file's header, for which `tarfile` takes five times as long."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header; all that is not plain is read by `tarfile`."""
        match = _PLAIN.match(buf, 100)
        if not match or len(buf) != tarfile.BLOCKSIZE or buf[329:346] not in _NO_DEVICE:
            return super().frombuf(buf, encoding, errors)
        if int(match[2], 8) != sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
            return super().frombuf(buf, encoding, errors)
        header = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
        header.size = int(match[1], 8)
        return header


# What tarfile raises for headers that make no sense.
_TAR_ERRORS = (tarfile.TarError, ValueError, RecursionError, OverflowError, EOFError)


def _opened(path: str, file: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", tarinfo=Header)
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
                f"`{UNPACKERS[kind]}` to a plain .tar, or remove it if that is there"
            )


def _image(path: str, key: str, fields: dict[str, _Member]) -> _Member | None:
    """Return the image of a sample; None if the key has nothing of a sample; ValueError if it is one by half."""
    has = f"it has {', '.join(f'.{extension}' for extension in fields)}"
    images = _images(fields)
    if len(images) > 1:
        raise ValueError(
            f"{path}: {images[0].name!r} and {images[1].name!r} are two images of one sample; rename one of them"
        )
    if images and not LABELS.keys() & fields.keys():
        raise ValueError(
            f"{path}: sample {key!r} has no label; {has}, and needs .cls, or .json with label or cls; if "
            "its images lie in class folders, or are of one class, unpack it (into a folder named after the class)"
        )
    if not images and LABELS.keys() & fields.keys():
        raise ValueError(
            f"{path}: sample {key!r} has no image; {has}, and needs one of {', '.join(EXTENSIONS)}; add it, or "
            "remove the sample"
        )
    dotted = [member.name for member in fields.values() if member.name.lower().endswith(EXTENSIONS)]
    if dotted and not images:
        raise ValueError(
            f"{path}: image {dotted[0]!r} has no label of its name; it needs {dotted[0].rpartition('.')[0]!r} and .cls "
            "or .json, or remove it"
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
        raise ValueError(
            f"{path}: {member.name!r} holds no label: {error}; write the class's number there"
        ) from error


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
