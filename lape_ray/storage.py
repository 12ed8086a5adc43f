"""Where runs are kept: a folder or an s3:// address, through one small set of functions.

Credentials, region and endpoint of S3 come from the usual environment variables and profiles (AWS_*).
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from pyarrow import fs


def home() -> Path:
    """The folder of everything this package keeps by default: $LAPE_RAY_HOME, else ~/lape_ray.

    A job that `ray job submit` runs has no folder of its own to come back to, so the current directory is no
    place to keep anything.
    """
    return Path(os.environ.get("LAPE_RAY_HOME") or Path.home() / "lape_ray").expanduser().absolute()


def is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file://")


def absolute(address: str) -> str:
    """An address that means the same in every process: remote ones as they are, local ones absolute."""
    if is_remote(address):
        return address.rstrip("/")
    return str(Path(address.removeprefix("file://")).expanduser().absolute())


def join(address: str, *parts: str) -> str:
    """`address/part/...`, keeping the options after `?` of a remote address at the end."""
    base, question, options = address.partition("?")
    return "/".join([base.rstrip("/"), *parts]) + question + options


def _open(address: str) -> tuple[fs.FileSystem, str]:
    if not is_remote(address):
        return fs.LocalFileSystem(), absolute(address)
    try:
        filesystem, path = fs.FileSystem.from_uri(address)
    except Exception as error:  # pyarrow raises its own, undocumented kinds
        raise ValueError(f"storage address {address!r} cannot be opened: {error}") from None
    return filesystem, path


def exists(address: str) -> bool:
    filesystem, path = _open(address)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def read_text(address: str) -> str:
    """The text of a file; FileNotFoundError where there is none."""
    filesystem, path = _open(address)
    with filesystem.open_input_stream(path) as stream:
        return stream.read().decode()


def write_text(address: str, text: str) -> None:
    """Write a small file whole; a local one appears all at once, under its name only when it is complete."""
    filesystem, path = _open(address)
    if is_remote(address):
        with filesystem.open_output_stream(path) as stream:
            stream.write(text.encode())
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def delete_folder(address: str) -> None:
    """Delete a folder and all in it; nothing happens where there is none."""
    filesystem, path = _open(address)
    if filesystem.get_file_info(path).type != fs.FileType.NotFound:
        filesystem.delete_dir(path)


def check_writable(address: str) -> None:
    """Write and delete a small file; a ValueError says why that failed."""
    probe = join(address, f".probe-{uuid.uuid4().hex}")
    try:
        write_text(probe, "probe")
        filesystem, path = _open(probe)
        filesystem.delete_file(path)
    except OSError as error:
        raise ValueError(
            f"storage {address!r} is not writable: {error}; choose another with --run.storage"
        ) from None


def filesystem(address: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's filesystem of an address, and the path in it; a ValueError says why there is none."""
    return _open(address)


def upload_folder(source: Path, address: str) -> None:
    """Copy every file of a local folder, and of those in it, to `address`."""
    target, path = _open(address)
    target.create_dir(path, recursive=True)
    fs.copy_files(str(source), path, fs.LocalFileSystem(), target)
