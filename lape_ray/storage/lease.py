"""The right to write into a folder, which one process has at a time: on a disk, on a shared disk or on S3.

The folder's `lease.json` names its owner, whose heartbeat replaces the file every `BEAT_S` seconds. On S3 it is
replaced by conditional puts, on a disk under a lock of the kernel. A process that wants the folder watches the file:

    it is absent, or its owner gave it back         take it
    its owner is known to be dead                   take it (a process of this machine that has ended)
    it beats                                        refused
    it has not changed for `STALE_S` seconds        take it, by no clock but the watcher's own

An owner that could not beat, because storage was away or the machine asleep, continues if nobody took the lease
meanwhile, and must end where somebody did. So it is asked again before anything is committed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lape_ray.storage import objects
from lape_ray.storage.address import absolute, is_remote, join
from lape_ray.storage.files import read_text, write_text
from lape_ray.storage.s3 import CHECK_TIMEOUT_S
from lape_ray.values.typed import from_json

LEASE = "lease.json"
LEASE_FILES = (LEASE, f".{LEASE}.lock")
BEAT_S = 5.0
STALE_S = 60.0
ANCIENT_S = 900.0
"""A heartbeat that is as old by this machine's clock is stale without watching: no clocks differ that much."""
SETTLE_S = 3.0
"""The time after which the last writer has won, where the storage has neither conditions nor locks."""
_OWN: set[str] = set()
"""Tokens of the leases that this process holds."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class LeaseLostError(RuntimeError):
    """Another process owns the folder now; this one must not write there any more."""

    exit_code = 1


class LeaseHeldError(ValueError):
    """Another process is at work in the folder."""


@dataclass(frozen=True)
class _Found:
    """A lease file: its text, and the ETag by which S3 knows it (on a disk, the text again)."""

    text: str
    tag: str


class Lease:
    """A folder that this process owns; made by `leased`.

    Attributes:
        token: names this owner; other processes of its run check the lease by it.
    """

    def __init__(self, folder: str, what: str) -> None:
        self.folder, self.token = folder, uuid.uuid4().hex
        self._values = {"owner": self.token, "what": what, **_identity(), "beat": 0, "released": False}
        self._storage: _Bucket | _Disk = _Bucket(folder) if is_remote(folder) else _Disk(folder)
        self._tag = ""
        self._lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._on_lost: Callable[[], object] | None = None

    def take(self) -> None:
        """Take the lease, or wait until its owner shows whether it lives.

        Raises:
            LeaseHeldError: it does.
        """
        watched: _Found | None = None
        since = time.monotonic()
        while True:
            found = self._storage.read()
            if watched is None or found != watched:
                if watched is not None and found is not None and not _free(found, self._storage.address):
                    raise LeaseHeldError(self._refusal(found))
                watched, since = found, time.monotonic()
            stale = time.monotonic() - since > STALE_S
            if found is None or stale or _free(found, self._storage.address):
                if self._write(found.tag if found else None, settle=True):
                    _OWN.add(self.token)
                    self._thread.start()
                    return
                continue
            if time.monotonic() - since < 1:
                print(f"{self._owner(found)}; watching for {STALE_S:g} s whether that lives", flush=True)
            time.sleep(1)

    def check(self) -> None:
        """Ask the storage whether this process still owns the folder; a LeaseLostError says who does."""
        if self._lost:
            raise LeaseLostError(self._lost)
        check_lease(self.folder, self.token)

    def call_when_lost(self, call: Callable[[], object]) -> None:
        """Call this once, from the heartbeat's thread, if the lease is lost."""
        self._on_lost = call

    def give_back(self) -> None:
        """End the heartbeat and let the next process have the folder immediately."""
        self._ended.set()
        self._thread.join(2 * CHECK_TIMEOUT_S)
        _OWN.discard(self.token)
        self._values["released"] = True
        with contextlib.suppress(OSError):  # where storage is away, the lease gets stale by itself
            if self._thread.ident is not None and not self._lost:
                self._write(self._tag)

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # storage is away; what it holds then decides
                if not self._write(self._tag):
                    self._regain()
            if self._lost:
                if self._on_lost is not None:
                    self._on_lost()
                return

    def _regain(self) -> None:
        """Look whose text the file holds, where it is not this process's last.

        It is its own, where an answer was lost, or another process's. Without a file this process writes it again.
        """
        found = self._storage.read()
        if found is None:  # the folder was deleted; what comes next to be committed makes it again
            self._write(None)
        elif self._is_ours(found):
            self._tag = found.tag
        else:
            self._lost = f"{self._owner(found)}, which took it over; this process ends without writing more"

    def _write(self, tag: str | None, *, settle: bool = False) -> bool:
        """Replace the file that `tag` names by this owner's; False where another one has its place."""
        self._values |= {"beat": int(self._values["beat"]) + 1, "beat_at": time.time()}
        text = json.dumps(self._values, indent=1)
        new = self._storage.replace(text, tag)
        if new is None:
            found = self._storage.read()
            if found is None or found.text != text:  # else the answer to an earlier try was lost
                return False
            new = found.tag
        self._tag = new
        if settle and not self._storage.is_exclusive():
            time.sleep(SETTLE_S)
            found = self._storage.read()
            return found is not None and self._is_ours(found)
        return True

    def _is_ours(self, found: _Found) -> bool:
        return _values(found, self._storage.address).get("owner") == self.token

    def _owner(self, found: _Found) -> str:
        values = _values(found, self._storage.address)
        who = f"process {values.get('pid')} on {values.get('host')}" if values else "an unreadable lease"
        return f"{self.folder} belongs to {who} ({values.get('what') or 'unknown'})"

    def _refusal(self, found: _Found) -> str:
        return f"{self._owner(found)}, which is at work there: wait for its end, end it, or choose another --run.name"


@contextlib.contextmanager
def leased(folder: str, what: str) -> Iterator[Lease]:
    """Own `folder` while the block runs; `what` describes the owner to other people.

    Raises:
        LeaseHeldError: another process is at work in it.
        OSError: the storage cannot be read or written.
    """
    lease = Lease(folder, what)
    lease.take()
    try:
        yield lease
    finally:
        lease.give_back()


def check_lease(folder: str, token: str) -> None:
    """Ask the storage whether the owner with `token` still owns the folder; a LeaseLostError says who does.

    A folder without a lease belongs to nobody else: the file was deleted, and its owner's heartbeat writes it again.
    """
    address = join(folder, LEASE)
    try:
        values = _values(_Found(read_text(address), ""), address)
    except FileNotFoundError:
        return
    if values.get("owner") != token:
        raise LeaseLostError(
            f"{folder} belongs to process {values.get('pid')} on {values.get('host')} now ({values.get('what')}); "
            "nothing more is stored by this one"
        )


def _values(found: _Found, address: str) -> dict[str, Any]:
    """Read a lease's values; none where it is damaged, and then it is watched until it is stale."""
    try:
        values: dict[str, Any] = from_json(dict[str, Any], found.text, address, "")
        return values
    except ValueError:
        return {}


def _free(found: _Found, address: str) -> bool:
    """Tell whether nobody needs to be waited for: it was given back, or its owner is known to be dead."""
    values = _values(found, address)
    if values.get("released") is True:
        return True
    beat_at = values.get("beat_at")
    if isinstance(beat_at, (int, float)) and time.time() - beat_at > ANCIENT_S:
        return True
    ours = _identity()
    if any(values.get(key) != ours[key] for key in ("boot", "pid_namespace")):
        return False  # of another machine or container, whose processes cannot be seen from here
    if all(values.get(key) == value for key, value in ours.items()):  # this process could not give it back
        owner = values.get("owner")
        return not (isinstance(owner, str) and owner in _OWN)
    pid = values.get("pid")
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    return not _exists(pid) or _started(pid) != values.get("process_started")


def _identity() -> dict[str, Any]:
    """Identify this process among those of all machines, boots and containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": _started(os.getpid()),
        "boot": boot.read_text().strip() if boot.exists() else socket.gethostname(),
        "pid_namespace": str(namespace.readlink()) if namespace.exists() else "",
    }


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _started(pid: int) -> str | None:
    """Return when a process started, in clock ticks since the boot; None: not known.

    No setting of the clock changes them.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class _Disk:
    """A lease file in a folder of this machine, or of a disk that machines share."""

    def __init__(self, folder: str) -> None:
        self.address = join(absolute(folder), LEASE)
        self._lock = Path(absolute(folder), LEASE_FILES[1])
        self._locks = True

    def is_exclusive(self) -> bool:
        return self._locks

    def read(self) -> _Found | None:
        try:
            text = read_text(self.address)
        except FileNotFoundError:
            return None
        return _Found(text, text)

    def replace(self, text: str, tag: str | None) -> str | None:
        with self._locked():
            found = self.read()
            if (found.tag if found else None) != tag:
                return None
            write_text(self.address, text)
            return text

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._locks = False
            yield


class _Bucket:
    """A lease object on S3."""

    def __init__(self, folder: str) -> None:
        self.address = join(folder, LEASE)
        self._conditions: bool | None = None

    def is_exclusive(self) -> bool:
        """Find out once whether the server knows conditional puts: it refuses to make what exists."""
        if self._conditions is None:
            probe = join(self.address.rpartition("/")[0], f".{LEASE}.probe")
            objects.put(probe, b"probe", timeout_s=CHECK_TIMEOUT_S)
            self._conditions = objects.put_if(probe, b"probe", tag=None, timeout_s=CHECK_TIMEOUT_S) is None
            objects.delete(probe, timeout_s=CHECK_TIMEOUT_S)
        return self._conditions

    def read(self) -> _Found | None:
        try:
            return _Found(*objects.get_tagged(self.address, timeout_s=CHECK_TIMEOUT_S))
        except FileNotFoundError:
            return None

    def replace(self, text: str, tag: str | None) -> str | None:
        if not self.is_exclusive():
            found = self.read()
            if (found.tag if found else None) != tag:
                return None
        return objects.put_if(self.address, text.encode(), tag=tag, timeout_s=CHECK_TIMEOUT_S)
