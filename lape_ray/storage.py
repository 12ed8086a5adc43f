"""Where runs are kept: a folder or an s3:// address, through one small set of functions.

Credentials, region and endpoint of S3 come from the usual environment variables and profiles (AWS_*).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def staging(filesystem: fs.FileSystem, path: str) -> Iterator[Path]:
    """An empty local folder for what `publish` will bring to `path`; it is gone at the end."""
    if isinstance(filesystem, fs.LocalFileSystem):
        folder = Path(path).with_name(f".{Path(path).name}.partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="lape-staging-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, filesystem: fs.FileSystem, path: str) -> None:
    """Bring a staged folder to its place, and replace what is there.

    A local one appears all at once. A remote one is whole when this returns: the sizes of its files are compared.

    Raises:
        OSError: it could not be stored.
    """
    if filesystem.get_file_info(path).type != fs.FileType.NotFound:
        filesystem.delete_dir(path)
    if isinstance(filesystem, fs.LocalFileSystem):
        folder.replace(path)
        parent = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        return
    fs.copy_files(str(folder), path, destination_filesystem=filesystem)
    for file in folder.iterdir():
        info = filesystem.get_file_info(f"{path}/{file.name}")
        if info.size != file.stat().st_size:
            raise OSError(
                f"{path}/{file.name} has {info.size} bytes after its upload, not {file.stat().st_size}"
            )


def patiently(work: Callable[[], None], seconds: float, tell: Callable[[str], None]) -> None:
    """Do `work`, again and again for `seconds` where storage is away; `tell` hears of the first failure.

    Raises:
        OSError: the last failure, and at once one that waiting does not mend: no space, no permission.
    """
    deadline, pause = time.monotonic() + seconds, 1.0
    while True:
        try:
            return work()
        except OSError as error:
            hopeless = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
            if hopeless or time.monotonic() + pause > deadline:
                raise
            if pause == 1.0:
                tell(f"warning: storage fails, trying again for {seconds:g} s: {error}")
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


def folders(address: str) -> list[str]:
    """Names of the folders in a folder; none where it does not exist."""
    filesystem, path = _open(address)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)


def free_bytes(address: str) -> int | None:
    """Space left where `address` lies or will lie; None: that is not known, as for s3://."""
    if is_remote(address):
        return None
    folder = Path(absolute(address))
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def filesystem(address: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's filesystem of an address, and the path in it; a ValueError says why there is none."""
    return _open(address)


def upload_folder(source: Path, address: str) -> None:
    """Copy every file of a local folder, and of those in it, to `address`."""
    target, path = _open(address)
    target.create_dir(path, recursive=True)
    fs.copy_files(str(source), path, fs.LocalFileSystem(), target)
