"""Copies of S3 objects on this machine: fetched once, then used by all its processes and by later runs.

<cache>/<digest>/           one set of objects; the digest is of their names, sizes and checksums
<cache>/<digest>/.complete  written last: the names and sizes of all files
<cache>/<digest>/.lock      held by the process that fetches; the kernel lets go of it when that process ends
<cache>/<digest>/.arriving/ what is used while it is fetched (`data.streaming`)
<cache>/<digest>/.passing   the set is deleted by the last process that has it open; these hold .lock together
<cache>/.deleted-*/         sets that are being deleted, moved away: who opens a set finds all of it, or nothing
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

from lape_ray.storage.address import home, is_remote, safe_relative
from lape_ray.storage.hub import fetch, is_hub
from lape_ray.storage.objects import Object, listing
from lape_ray.storage.transfer import download

SPARE_BYTES = 1 << 30
"""The space that must stay free on the disk of the cache."""
POLL_S = 0.05
COMPLETE = ".complete"
ARRIVING = ".arriving"
LOCK = ".lock"
PASSING = ".passing"
DELETED = ".deleted-"


def cache() -> Path:
    """Return the folder of the copies: $LAPE_RAY_CACHE, else $LAPE_RAY_HOME/cache.

    It belongs on a disk of this machine.
    """
    return Path(os.environ.get("LAPE_RAY_CACHE") or home() / "cache").expanduser().absolute()


def local(address: str | Path) -> Path:
    """Return the file or folder that an address means, on this machine.

    It is a copy of what lies on S3 or the hub, else the path itself.

    Raises:
        FileNotFoundError: nothing exists at the address.
        ValueError, OSError: see `s3.call_with_retry`, `stage` and `hub.fetch`.
    """
    return _local(address, passing=False)


def _local(address: str | Path, *, passing: bool) -> Path:
    if is_hub(address):
        return fetch(str(address))
    if not is_remote(address):
        return Path(str(address).removeprefix("file://")).expanduser()
    address = str(address).rstrip("/")
    found = listing(address)
    objects = [one for one in found if one.address == address]
    objects += [
        one for one in found if one.address.startswith(f"{address}/") and not one.address.endswith("/")
    ]
    if not objects:
        raise FileNotFoundError(f"{address} does not exist")
    below, _, name = address.rpartition("/")
    return stage(objects, below=below, passing=passing) / name


@contextlib.contextmanager
def opened(address: str) -> Iterator[Path]:
    """Open the folder that an address means, on this machine.

    The last process that has a copy from S3 open deletes it, unless `local` has asked for it as well.

    Raises:
        FileNotFoundError: nothing exists at the address.
        ValueError, OSError: see `local`.
    """
    if not is_remote(address) or is_hub(address):
        yield local(address)
        return
    while (found := _held_copy(address)) is None:
        pass
    path, lock = found
    with lock:
        _delete_abandoned()
        try:
            yield path
        finally:
            _delete_unless_open(path.parent, lock)


def _held_copy(address: str) -> tuple[Path, TextIO] | None:
    """Fetch what an address means and hold it, by its lock; None: another process took it away just now."""
    path = _local(address, passing=True)
    lock = _shared(path.parent)
    return None if lock is None else (path, lock)


def _shared(folder: Path) -> TextIO | None:
    """Hold a whole copy's lock together with others; None: there is no whole copy any more."""
    try:
        lock = (folder / LOCK).open("a")
    except FileNotFoundError:
        return None
    fcntl.flock(lock, fcntl.LOCK_SH)
    if _is_current(lock, folder / LOCK) and (folder / COMPLETE).exists():
        return lock
    lock.close()
    return None


def _delete_abandoned() -> None:
    """Delete the copies whose last process was killed before it could."""
    for gone in cache().glob(f"{DELETED}*"):
        shutil.rmtree(gone, ignore_errors=True)
    for mark in cache().glob(f"*/{PASSING}"):
        with contextlib.suppress(OSError), (mark.parent / LOCK).open("a") as lock:  # it may be another user's
            _delete_unless_open(mark.parent, lock)


def _delete_unless_open(folder: Path, lock: TextIO) -> None:
    """Delete a passing copy, by its lock, where no other process has it open."""
    if not (_take(lock) and _is_current(lock, folder / LOCK) and (folder / PASSING).exists()):
        return
    gone = tempfile.mkdtemp(prefix=DELETED, dir=folder.parent)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)  # another process may do the same


def stage(
    objects: Sequence[Object],
    *,
    below: str,
    sha256: Mapping[str, str] | None = None,
    passing: bool = False,
) -> Path:
    """Make a folder with copies of the objects, under their names below the address `below`.

    The first process fetches them; others wait for it. One that died leaves what it had for the next.

    Args:
        sha256: of objects, by address; what is fetched is compared with it. Others by what was stored with them.
        passing: the last process that has the copies open deletes them.

    Raises:
        DownloadError: an object is not what it should be.
        ValueError: the name of an object is none for a file in that folder (`safe_relative`); nothing is fetched.
        OSError: the disk has too little space, or see `s3.call_with_retry`.
    """
    place = Place.of(objects, below=below, sha256=sha256)
    folder = place.folder
    while not (place.is_complete() and (passing or _keep(folder))):
        # Those that have the whole copy open hold the lock too, and may wait for this very process.
        with held(folder / LOCK, f"{below}/{min(place.names.values())}", unless=place.is_complete) as alone:
            if alone and not place.is_complete():  # no other process was faster
                if passing:
                    (folder / PASSING).touch()
                _fetch(place, objects, below, sha256 or {})
    return folder


def _keep(folder: Path) -> bool:
    """Let no process delete a copy when it closes it; False: it was deleted just now."""
    if not (folder / PASSING).exists():
        return (folder / COMPLETE).exists()
    if (lock := _shared(folder)) is None:
        return False
    with lock:
        (folder / PASSING).unlink(missing_ok=True)
    return True


def _fetch(place: Place, objects: Sequence[Object], below: str, sha256: Mapping[str, str]) -> None:
    """Fetch what the folder lacks, whose lock this process holds alone."""
    folder, names = place.folder, place.names
    shutil.rmtree(folder / ARRIVING, ignore_errors=True)
    missing = [one for one in objects if _size(folder / names[one.address]) != one.size]
    need = sum(one.size for one in missing)
    for one in missing:  # what an interrupted fetch has taken already
        target = folder / names[one.address]
        need -= taken(target.parent / f".{target.name}.part")
    require_space(folder, need)
    began, total = time.monotonic(), sum(one.size for one in missing)
    where = f"on {os.uname().nodename}"
    _tell(f"fetching {len(missing)} objects of {total / 1e9:.3g} GB from {below} to {folder} {where}")
    for one in missing:
        target = folder / names[one.address]
        target.parent.mkdir(parents=True, exist_ok=True)
        download(one, target, sha256=sha256.get(one.address))
    seconds = time.monotonic() - began
    _tell(f"fetched {total / 1e9:.3g} GB in {seconds:.0f} s ({total / 1e6 / seconds:.0f} MB/s) {where}")
    place.mark_complete()


@dataclass(frozen=True)
class Place:
    """The place of a set of objects' copies on this machine.

    Attributes:
        folder: of this set alone, named by what the objects are
        names: of each object's copy in the folder, by address
        wanted: size of each copy, by name
    """

    folder: Path
    names: Mapping[str, str]
    wanted: Mapping[str, int]

    @classmethod
    def of(cls, objects: Sequence[Object], *, below: str, sha256: Mapping[str, str] | None = None) -> Place:
        """Find the place; see `stage` for the arguments and the ValueError."""
        names, known = _names(objects, below), sha256 or {}
        facts = sorted((names[one.address], one.size, known.get(one.address) or one.etag) for one in objects)
        folder = cache() / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return cls(folder, names, {name: size for name, size, _ in facts})

    def is_complete(self) -> bool:
        try:
            complete = json.loads((self.folder / COMPLETE).read_text()) == self.wanted
        except (OSError, ValueError, RecursionError):  # whatever else it holds, all is fetched again
            return False
        return complete and all(_size(self.folder / name) == size for name, size in self.wanted.items())

    def mark_complete(self) -> None:
        mark = self.folder / f"{COMPLETE}.{os.getpid()}"
        mark.write_text(json.dumps(self.wanted))
        mark.replace(self.folder / COMPLETE)

    def arriving(self) -> Path | None:
        """Return the folder of a copy that a process of this machine fetches now, while others use what is there."""
        folder = self.folder / ARRIVING
        return folder if is_held(folder / LOCK) else None


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, which another process may delete meanwhile; an OSError says what to do."""
    while True:
        try:
            return folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and not os.path.lexists(folder):
                continue
            raise OSError(
                f"{folder} cannot be made: {error.strerror}; set LAPE_RAY_CACHE to a folder on a disk"
            ) from error


def _names(objects: Sequence[Object], below: str) -> dict[str, str]:
    """Name each object's copy in the folder, by address.

    A person who writes to the bucket must not be able to choose a file outside.
    """
    fix = "rename or delete that object"
    names = {
        one.address: safe_relative(one.address.removeprefix(f"{below}/"), f"the object {one.address!r}", fix)
        for one in objects
    }
    folders = {str(folder) for name in names.values() for folder in PurePosixPath(name).parents}
    for address, name in names.items():
        if name in folders:
            raise ValueError(
                f"{address} is an object, and there are objects below it: no file can be both; {fix}"
            )
    return names


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


@contextlib.contextmanager
def held(lock: Path, what: str, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Hold a lock for the block, once no other process of this machine does; or not, as soon as `unless` is true.

    The block is told whether it holds the lock. The lock's folder is made, and again where another process deletes it.
    """
    told = False
    while True:
        with _opened_lock(lock) as file:
            while not (alone := _take(file)) and not unless():
                if not told:
                    _tell(f"another process of {os.uname().nodename} fetches {what}; waiting for it")
                told = True
                time.sleep(POLL_S)
            if not alone or _is_current(file, lock):
                yield alone
                return


def _opened_lock(lock: Path) -> TextIO:
    while True:
        make_folder(lock.parent)
        with contextlib.suppress(FileNotFoundError):
            return lock.open("a")


def _is_current(file: TextIO, lock: Path) -> bool:
    """Tell whether an open lock is that of the folder still: it may have been deleted, and made anew."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False


def _take(file: TextIO) -> bool:
    """Take a lock if no other process holds it; returns whether it was taken."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(lock: Path) -> bool:
    """Tell whether a process holds the lock."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def taken(file: Path) -> int:
    """Return the bytes that a file takes on its disk; 0: it is none."""
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0


def require_space(folder: Path, need: int) -> None:
    """Raise an OSError that says what to delete, where `need` bytes and some to spare are not free."""
    have = shutil.disk_usage(folder).free
    need += SPARE_BYTES
    if need > have:
        others = sorted(
            (path for path in folder.parent.iterdir() if path != folder and path.is_dir()), key=_last_use
        )
        old = f"; the copy that was not used for longest is {others[0]}" if others else ""
        raise OSError(
            f"{folder.parent} on {os.uname().nodename} has {have / 1e9:.3g} GB free, but {need / 1e9:.3g} GB are "
            f"needed: delete copies there that no run uses{old}, or set LAPE_RAY_CACHE to a folder on a larger disk"
        )


def _last_use(folder: Path) -> float:
    times = [max(path.stat().st_atime, path.stat().st_mtime) for path in folder.rglob("*") if path.is_file()]
    return max(times, default=0.0)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
