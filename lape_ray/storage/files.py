"""Read, write, list and delete files in folders of this machine and on S3."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from lape_ray.storage import objects
from lape_ray.storage.address import absolute, is_remote, join
from lape_ray.storage.s3 import CHECK_TIMEOUT_S
from lape_ray.storage.transfer import upload, upload_folder

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


def exists(address: str) -> bool:
    """Tell whether a file or folder exists."""
    if is_remote(address):
        return objects.exists(address)
    return Path(absolute(address)).exists()


def read_text(address: str) -> str:
    """Read the text of a file; FileNotFoundError where it does not exist. Bytes that are no text become U+FFFD."""
    if is_remote(address):
        return objects.get_text(address)
    return Path(absolute(address)).read_text(encoding="utf-8", errors="replace")


def write_text(address: str, text: str) -> None:
    """Write a small file and bring it to the disk; after any failure its name holds the old text or the new."""
    if is_remote(address):
        objects.put(address, text.encode())
        return
    target = Path(absolute(address))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep_temporaries(address: str, before: float) -> None:
    """Delete the temporary files of `write_text` in a folder that are older than `before`, in seconds since 1970."""
    if is_remote(address):
        return  # objects appear whole
    for path in Path(absolute(address)).glob(".*"):
        if TEMPORARY.fullmatch(path.name) and path.stat().st_mtime <= before:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a local folder to the disk, so that no power loss takes a rename back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_file(address: str) -> None:
    """Delete one file; nothing happens where it does not exist."""
    if is_remote(address):
        objects.delete(address)
    else:
        Path(absolute(address)).unlink(missing_ok=True)


def delete_folder(address: str, *, first: str = "") -> None:
    """Delete a folder and all in it; nothing happens where it does not exist.

    Args:
        first: a file that marks the folder as whole. It goes first, so that what an interrupted call leaves behind is
            never taken for whole.
    """
    if first:
        delete_file(join(address, first))
    if is_remote(address):
        objects.delete_below(address)
    elif (folder := Path(absolute(address))).is_dir():
        shutil.rmtree(folder)


def empty_folder(address: str, *, but: Container[str]) -> None:
    """Delete all that is in a folder, except what has one of the names `but`, if the folder exists."""
    for name in names(address):
        if name not in but:
            entry = join(address, name)
            delete_folder(entry)
            delete_file(entry)


def names(address: str) -> list[str]:
    """List the names of the files and folders in a folder; none where it does not exist."""
    if is_remote(address):
        below = f"{address.rstrip('/')}/"
        return sorted({one.address.removeprefix(below).partition("/")[0] for one in objects.listing(below)})
    folder = Path(absolute(address))
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@dataclass(frozen=True)
class Stored:
    """A file below a folder: its size in bytes, and when it was written, in s since 1970 by the storage's clock."""

    size: int
    modified: float


def modified(address: str) -> float:
    """Return when a file was written, by the clock of its storage, in seconds since 1970."""
    if is_remote(address):
        return objects.modified(address)
    return Path(absolute(address)).stat().st_mtime


def files_of_folders(address: str) -> dict[str, dict[str, Stored]]:
    """List the files below each folder of a folder, by their names relative to it; nothing where it does not exist."""
    found: dict[str, dict[str, Stored]] = {}
    if is_remote(address):
        below = f"{address.rstrip('/')}/"
        for one in objects.listing(below):
            folder, slash, name = one.address.removeprefix(below).partition("/")
            if slash:
                found.setdefault(folder, {})[name] = Stored(one.size, one.modified)
        return dict(sorted(found.items()))
    parent = Path(absolute(address))
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            found[path.name] = {
                str(file.relative_to(path)): Stored(facts.st_size, facts.st_mtime)
                for file in path.rglob("*")
                if file.is_file() and (facts := file.stat())
            }
    return found


def check_writable(address: str) -> None:
    """Write and delete a small file; a ValueError says why that failed."""
    probe = join(absolute(address), f".probe-{uuid.uuid4().hex}")
    try:
        if is_remote(address):
            objects.put(probe, b"probe", timeout_s=CHECK_TIMEOUT_S)
            objects.delete(probe, timeout_s=CHECK_TIMEOUT_S)
            objects.check_region(address, timeout_s=CHECK_TIMEOUT_S)
        else:
            write_text(probe, "probe")
            Path(probe).unlink()
    except OSError as error:
        raise ValueError(
            f"storage {address!r} is not writable: {error}; choose another with --run.storage"
        ) from None


@contextlib.contextmanager
def written_path(address: str | Path) -> Iterator[Path]:
    """Give a path to write one file at; a remote address gets the file when the block ends without an error."""
    if not is_remote(address):
        yield Path(address)
        return
    with _temporary(str(address)) as path:
        yield path
        upload(path, str(address))


@contextlib.contextmanager
def written_folder(address: str | Path) -> Iterator[Path]:
    """Give a folder to write into; a remote address gets its files when the block ends without an error."""
    if not is_remote(address):
        yield Path(address)
        return
    with _temporary(str(address)) as folder:
        folder.mkdir()
        yield folder
        upload_folder(folder, str(address))


@contextlib.contextmanager
def _temporary(address: str) -> Iterator[Path]:
    """Give a path on this machine with the last name of `address`; it is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="lape-written-") as folder:
        yield Path(folder, address.rstrip("/").rpartition("/")[2])
