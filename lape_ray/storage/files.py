"""The same few verbs for folders of this machine and for S3."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from lape_ray.storage import objects
from lape_ray.storage.address import absolute, is_remote, join
from lape_ray.storage.s3 import HASTE_S
from lape_ray.storage.transfer import upload, upload_folder


def exists(address: str) -> bool:
    """Whether a file or folder is there."""
    if is_remote(address):
        return objects.exists(address)
    return Path(absolute(address)).exists()


def read_text(address: str) -> str:
    """The text of a file; FileNotFoundError where there is none."""
    if is_remote(address):
        return objects.get_text(address)
    return Path(absolute(address)).read_text()


def write_text(address: str, text: str) -> None:
    """Write a small file whole: it appears all at once, under its name only when it is complete."""
    if is_remote(address):
        objects.put(address, text.encode())
        return
    target = Path(absolute(address))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def delete_folder(address: str) -> None:
    """Delete a folder and all in it; nothing happens where there is none."""
    if is_remote(address):
        objects.delete_below(address)
    elif (folder := Path(absolute(address))).exists():
        shutil.rmtree(folder)


def check_writable(address: str) -> None:
    """Write and delete a small file; a ValueError says why that failed."""
    probe = join(absolute(address), f".probe-{uuid.uuid4().hex}")
    try:
        if is_remote(address):
            objects.put(probe, b"probe", patience_s=HASTE_S)
            objects.delete(probe, patience_s=HASTE_S)
            objects.check_region(address, patience_s=HASTE_S)
        else:
            write_text(probe, "probe")
            Path(probe).unlink()
    except OSError as error:
        raise ValueError(
            f"storage {address!r} is not writable: {error}; choose another with --run.storage"
        ) from None


@contextlib.contextmanager
def written_path(address: str | Path) -> Iterator[Path]:
    """A path to write one file at; a remote address gets the file when the block ends without an error."""
    if not is_remote(address):
        yield Path(address)
        return
    with tempfile.TemporaryDirectory(prefix="lape-written-") as folder:
        path = Path(folder, str(address).rpartition("/")[2])
        yield path
        upload(path, str(address))


@contextlib.contextmanager
def written_folder(address: str | Path) -> Iterator[Path]:
    """A folder to write into; a remote address gets its files when the block ends without an error."""
    if not is_remote(address):
        yield Path(address)
        return
    with tempfile.TemporaryDirectory(prefix="lape-written-") as temporary:
        folder = Path(temporary, str(address).rstrip("/").rpartition("/")[2])
        folder.mkdir()
        yield folder
        upload_folder(folder, str(address))
