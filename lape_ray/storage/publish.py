"""Folders that appear whole: written on this machine, then moved to their place in one step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lape_ray.storage.address import absolute, is_remote, join
from lape_ray.storage.files import delete_folder, exists, read_text, sync_folder
from lape_ray.storage.objects import listing
from lape_ray.storage.transfer import upload_folder

T = TypeVar("T")
FATAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST)
"""Errors that waiting does not mend: no space, no permission, a name that is taken."""
STAGED = "lape-staging-"
JUST_MADE_S = 60.0  # a folder as young may not be locked yet


@contextlib.contextmanager
def staging(address: str) -> Iterator[Path]:
    """Make an empty folder of this machine for what `publish` will bring to `address`; it is deleted at the end."""
    if is_remote(address):
        _sweep_staged()
        with tempfile.TemporaryDirectory(prefix=STAGED) as temporary, _locked(temporary):
            folder = Path(temporary, address.rpartition("/")[2])
            folder.mkdir()
            yield folder
        return
    target = Path(absolute(address))
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(temporary: str | Path) -> Iterator[None]:
    """Hold the lock of a temporary folder, which goes with the process that holds it; an OSError where another does."""
    folder = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(folder)


def _sweep_staged() -> None:
    """Delete the temporary folders of processes that were killed as they staged: each has the size of a checkpoint."""
    for temporary in Path(tempfile.gettempdir()).glob(f"{STAGED}*"):
        with contextlib.suppress(OSError):  # another process sweeps, or another user's
            if time.time() - temporary.stat().st_mtime < JUST_MADE_S:
                continue
            with _locked(temporary):
                shutil.rmtree(temporary)


def publish(folder: Path, address: str, *, last: str = "") -> None:
    """Bring a staged folder to its place, and replace what an interrupted call left there.

    A local one appears in one step; of a remote one the file `last`, which marks it as whole, comes last. A folder with
    such a mark is never replaced: it may be all that is left of a run. If its mark is the staged one's, an earlier try
    succeeded, and nothing is left to do.

    Raises:
        FileExistsError: another whole folder has this address.
        OSError: it could not be stored.
    """
    if last and exists(mark := join(address, last)):
        if read_text(mark) == (folder / last).read_text():
            return
        raise FileExistsError(errno.EEXIST, f"{address} holds another whole folder, which is not replaced")
    delete_folder(address)
    if is_remote(address):
        upload_folder(folder, address, last=last)
        return
    target = Path(absolute(address))
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)
    folder.replace(target)
    sync_folder(target.parent)


def retry(work: Callable[[], T], timeout_s: float, warn: Callable[[str], None]) -> T:
    """Return what `work` does, repeated for `timeout_s` seconds while storage is away; `warn` gets the first failure.

    Raises:
        OSError: the last failure; one of `FATAL_ERRNOS` immediately.
    """
    deadline, pause, warned = time.monotonic() + timeout_s, 1.0, False
    while True:
        try:
            return work()
        except OSError as error:
            if error.errno in FATAL_ERRNOS or time.monotonic() + pause > deadline:
                raise
            if not warned:
                warn(f"warning: storage fails, trying again for {timeout_s:g} s: {error}")
            warned = True
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


def folders(address: str) -> list[str]:
    """List the names of the folders in a folder; none where it does not exist."""
    if is_remote(address):
        below = f"{address.rstrip('/')}/"
        rest = (one.address.removeprefix(below) for one in listing(below))
        return sorted({name.partition("/")[0] for name in rest if "/" in name})
    folder = Path(absolute(address))
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def free_bytes(address: str) -> int | None:
    """Return the space left where `address` lies or will lie; None: that is not known, as for s3://."""
    if is_remote(address):
        return None
    folder = Path(absolute(address))
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
