"""One set's blocks on their way to this machine's disk: from an earlier try, another node or S3, each verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter

import numpy as np

from lape_ray.data.beton.blocks import DIGEST_BYTES, SMALLEST_BLOCK, Blocks
from lape_ray.data.beton.format import RECORD, RECORDS_START
from lape_ray.data.remote import RemoteSet
from lape_ray.data.streaming.arrivals import ERROR, POLL_S
from lape_ray.data.streaming.blocks import FETCHING, MAP, READY, WHOLE, Layout, blocks_between, runs
from lape_ray.data.streaming.peers import Peers
from lape_ray.data.streaming.wants import Wanted, look_for
from lape_ray.storage.copies import ARRIVING, LOCK, held, require_space, taken
from lape_ray.storage.transfer import DownloadError, read_range

PART_BYTES = 4 << 20
"""The bytes of which one node asks S3, and all others that node: many blocks."""
FASTER_S, SLOWER_S = 0.1, 0.4
"""A request that takes less is followed by longer ones, and one that takes more by shorter."""
TRIES = 2  # a connection, and not the object, may be what changed a bit
S3, PEER, DISK = "from S3", "from other nodes", "from an earlier copy"


class Download:
    """The blocks of one set, which the threads of the fetcher bring in."""

    def __init__(self, remote: RemoteSet, peers: Peers) -> None:
        self.remote, self.peers = remote, peers
        self.objects = [file for file, _, _ in remote.files]
        blocks: list[Blocks] = [manifest.blocks for _, _, manifest in remote.files if manifest.blocks]
        self.layout = Layout(blocks)
        self.folder = remote.place.folder / ARRIVING
        self.came: Counter[str] = Counter()
        self.began = time.monotonic()
        self.opened = threading.Event()
        self.have = np.zeros(1 + len(self.layout), np.uint8)
        self._old = np.zeros(len(self.layout), bool)
        self._asked = np.zeros(len(self.layout), bool)
        self._lock = threading.Lock()
        self._wants: dict[str, Wanted] = {}
        self._sweep_bytes = SMALLEST_BLOCK  # a reader that comes soon shall not wait for much else
        self._stack, self._whole_lock = contextlib.ExitStack(), contextlib.ExitStack()
        self._digests: list[bytes] = []
        self._parts: list[tuple[int, int]] = []
        self._part = 0

    @property
    def whole(self) -> bool:
        return bool(self.have[0] == WHOLE)

    # --- the beginning and the end ------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the place of the copy, and bring in what comes before any image; waits for others that fetch it.

        Raises:
            DownloadError: the object is damaged.
            OSError: the disk has too little space, or see `s3.call_with_retry`.
        """
        place = self.remote.place
        self._whole_lock.enter_context(held(place.folder / LOCK, self.remote.address))
        if place.is_complete():
            self._open_complete()
            return
        self.folder.mkdir(exist_ok=True)
        total = sum(one.size for one in self.objects)
        require_space(place.folder, total - sum(taken(self.folder / one.name) for one in self.objects))
        self._take_earlier()
        self._stack.enter_context(held(self.folder / LOCK, self.remote.address))
        self._say(
            f"fetching {total / 1e9:.3g} GB from {self.remote.address} while training goes on, to {place.folder}"
        )
        self._descriptors = [self._open_file(file) for file in range(len(self.objects))]
        self._digests = [self._fetch_tail(file) for file in range(len(self.objects))]
        self._parts = self._order_of_parts()
        self.opened.set()
        self._fetch_records()
        self.have[0] = READY

    def _open_complete(self) -> None:
        """Serve a copy that is whole to other nodes."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._whole_lock.close()
        self.folder = self.remote.place.folder
        self._descriptors = [os.open(self.folder / one.name, os.O_RDONLY) for one in self.objects]
        self.have[:] = 1
        self.have[0] = WHOLE
        self.opened.set()

    def _take_earlier(self) -> None:
        """Note which blocks an earlier process has left, to be verified one by one, and begin the map again.

        It stays the same file, for readers that the earlier process served have it open.
        """
        (self.folder / ERROR).unlink(missing_ok=True)
        path, earlier = self.folder / MAP, self.folder / f"{MAP}.earlier"
        # The second is of a process that was ended before it had looked at all of them.
        for one in (path, earlier):
            found = np.fromfile(one, np.uint8) if one.exists() else self.have
            if len(found) == len(self.have):
                self._old |= found[1:] != 0
        np.append(FETCHING, self._old).astype(np.uint8).tofile(earlier)
        self.have = np.memmap(path, np.uint8, "r+" if path.exists() else "w+", shape=self.have.shape)
        self.have[:] = 0

    def _open_file(self, file: int) -> int:
        """Open a file as large as it will be: a full disk is found now, and not in an hour."""
        source, (_, manifest_object, _) = self.objects[file], self.remote.files[file]
        descriptor = os.open(self.folder / source.name, os.O_RDWR | os.O_CREAT, 0o644)
        self._stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, source.size)
        os.posix_fallocate(descriptor, 0, source.size)
        content = read_range(manifest_object, 0, manifest_object.size)
        (self.folder / manifest_object.name).write_bytes(content)
        return descriptor

    def _fetch_tail(self, file: int) -> bytes:
        """Bring in what lies behind the blocks: their checksums, which are returned, and the allocation table.

        The table is verified with the records, by whoever opens the file.
        """
        source, blocks = self.objects[file], self.layout.files[file]
        parts = range(blocks.end, source.size, PART_BYTES)
        for _ in range(TRIES):
            tail = b"".join(
                read_range(source, start, min(start + PART_BYTES, source.size)) for start in parts
            )
            self.came[S3] += len(tail)
            digests = tail[: blocks.table - blocks.end]
            if hashlib.sha256(digests).hexdigest() == blocks.sha256:
                os.pwrite(self._descriptors[file], tail, blocks.end)
                return digests
        raise DownloadError(f"{source.address} is damaged: the checksums of its blocks are; upload it again")

    def _order_of_parts(self) -> list[tuple[int, int]]:
        """Order the parts (first, count of blocks) for a time when no reader needs any: those of this node first."""
        parts = []
        for file, blocks in enumerate(self.layout.files):
            length, first = self._longest(file), int(self.layout.first_F[file])
            parts += [
                (first + start, min(length, blocks.count - start)) for start in range(0, blocks.count, length)
            ]
        return sorted(parts, key=lambda part: not self.peers.is_own(self._part_of(part[0])[0]))

    def _fetch_records(self) -> None:
        """Bring in the records, without which no file can be opened."""
        for file, (_, _, manifest) in enumerate(self.remote.files):
            # A manifest that says too many is refused by whoever opens the file.
            stop = min(RECORDS_START + manifest.num_samples * RECORD.itemsize, self.layout.files[file].end)
            one, zero = np.array([file]), np.array([0])
            spans = self.layout.span(one, zero, np.array([stop]))
            blocks = blocks_between(*spans)
            while not self.have[1 + blocks].all():
                self._bring_or_wait(int(blocks[0]), len(blocks))

    def finish(self) -> None:
        """Make a whole copy of the set, which every later run uses, if nothing is missing any more."""
        if not self.opened.is_set() or self.whole or not self.have[1:].all() or self.have[0] != READY:
            return
        place = self.remote.place
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        for name in place.wanted:
            (place.folder / name).unlink(missing_ok=True)
            os.link(self.folder / name, place.folder / name)  # who has found it here still opens it here
        place.mark_complete()
        self.have[0] = WHOLE
        self._whole_lock.close()
        seconds = time.monotonic() - self.began
        parts = ", ".join(f"{count / 1e9:.3g} GB {source}" for source, count in sorted(self.came.items()))
        self._say(f"all of {self.remote.address} is here after {seconds:.0f} s: {parts}")

    def close(self) -> None:
        """Let go of the set; what is there stays for the next process."""
        if self.folder.name == ARRIVING and self.whole:
            shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / ERROR).unlink(missing_ok=True)
        self._stack.close()
        self._whole_lock.close()

    def fail(self, error: BaseException) -> None:
        """Tell those who wait that nothing more will come."""
        told = {"for_good": isinstance(error, ValueError), "text": str(error)}
        hidden = self.folder / f".{ERROR}"
        hidden.write_text(json.dumps(told))
        hidden.replace(self.folder / ERROR)

    def _say(self, text: str) -> None:
        print(f"{text} on {os.uname().nodename}", file=sys.stderr, flush=True)

    # --- what to bring next ---------------------------------------------------------------------------------------

    def look_for_wants(self) -> None:
        with self._lock:
            look_for(self.folder, self._wants)

    def next_wanted(self) -> tuple[int, int] | None:
        """Claim the blocks (first, count) that a reader needs next; None: none that is not on its way."""
        with self._lock:
            for wanted in sorted(self._wants.values(), key=lambda one: one.ahead):
                found = wanted.next_runs(self._are_free, self._longest(0))
                while found:
                    first, count = found.popleft()
                    if claimed := self._claim(first, count):
                        rest = first + count - sum(claimed)  # a part of them may be on its way
                        if rest:
                            found.appendleft((sum(claimed), rest))
                        return claimed
            return None

    def next_missing(self) -> tuple[int, int] | None:
        """Claim blocks (first, count) that no reader needs soon; None: all are here or on their way."""
        with self._lock:
            while self._part < len(self._parts):
                first, count = self._parts[self._part]
                longest = max(1, self._sweep_bytes // int(self.layout.bytes_F[self.layout.file_of(first)]))
                free = first + np.flatnonzero(self._are_free(np.arange(first, first + count)))
                if len(free):
                    return self._claim(*runs(free, longest)[0])
                self._part += 1
            if not self.have[1:].all():
                self._part = 0  # what was asked for may have failed
            return None

    def _are_free(self, blocks: np.ndarray) -> np.ndarray:
        """Tell of each block whether it is neither here nor on its way."""
        return ~self._asked[blocks] & (self.have[1:][blocks] == 0)

    def _claim(self, first: int, count: int) -> tuple[int, int] | None:
        """Claim the first run of free blocks among these; the others of them stay free."""
        free = first + np.flatnonzero(self._are_free(np.arange(first, first + count)))
        if not len(free):
            return None
        first, count = runs(free, self._longest(self.layout.file_of(first)))[0]
        self._asked[first : first + count] = True
        return first, count

    def _longest(self, file: int) -> int:
        return max(1, PART_BYTES // self.layout.files[file].bytes)

    def _part_of(self, block: int) -> tuple[int, int]:
        """Return the number of a block's part, by which the nodes share out what they ask S3 for.

        The second is how many blocks of the part there are from this one on.
        """
        file = self.layout.file_of(block)
        within, longest = block - int(self.layout.first_F[file]), self._longest(file)
        return file + within // longest, min(
            longest - within % longest, self.layout.files[file].count - within
        )

    # --- how it comes ---------------------------------------------------------------------------------------------

    def bring(self, first: int, count: int, *, swept: bool = False) -> None:
        """Bring in blocks that were claimed. Where that fails, they are free again, and the error is raised."""
        began, size = time.monotonic(), count * int(self.layout.bytes_F[self.layout.file_of(first)])
        try:
            while count:
                done = self._bring_some(first, count)
                first, count = first + done, count - done
        finally:
            self._asked[first : first + count] = False
        if swept:
            self._adapt(size, time.monotonic() - began)

    def _bring_or_wait(self, first: int, count: int) -> None:
        """Bring in some of these blocks, or wait a moment for those that are all on their way."""
        with self._lock:
            claimed = self._claim(first, count)
        if claimed:
            self.bring(*claimed)
        else:
            time.sleep(POLL_S)

    def _adapt(self, size: int, seconds: float) -> None:
        """Ask for so much at once that a reader which needs other blocks waits for no more than a moment."""
        if seconds < FASTER_S:
            self._sweep_bytes = min(max(2 * size, self._sweep_bytes), PART_BYTES)
        elif seconds > SLOWER_S:
            self._sweep_bytes = max(size // 2, SMALLEST_BLOCK)

    def _bring_some(self, first: int, count: int) -> int:
        """Bring in the first of these blocks, as many as come from one place; returns their number."""
        part, left = self._part_of(first)
        old = self._old[first : first + min(count, left)]
        alike = int(np.argmin(old == old[0])) or len(old)
        if old[0]:
            if done := self._bring_from_disk(first, alike):
                return done
            alike = 1
        _, start, end = self.layout.place(first, alike)
        if not self.peers.is_own(part):
            content = self.peers.ask(part, self.remote.place.folder.name, first, alike)
            if content is not None:
                if len(content) == end - start and self._verified(first, content):
                    self.came[PEER] += len(content)
                    return self._write(first, alike, content)
                self.peers.distrust(part)
        return self._bring_from_s3(first, alike)

    def _bring_from_disk(self, first: int, count: int) -> int:
        """Take over blocks of an earlier process that are whole; returns their number, 0: the first is not."""
        for tried in (count, 1):
            file, start, end = self.layout.place(first, tried)
            content = os.pread(self._descriptors[file], end - start, start)
            if self._verified(first, content):
                self.came[DISK] += len(content)
                return self._mark(first, tried)
        self._old[first] = False
        return 0

    def _bring_from_s3(self, first: int, count: int) -> int:
        file, start, end = self.layout.place(first, count)
        source = self.objects[file]
        for _ in range(TRIES):
            content = read_range(source, start, end)
            self.came[S3] += len(content)
            if self._verified(first, content):
                return self._write(first, count, content)
        raise DownloadError(
            f"{source.address} is damaged: a block of its bytes {start} to {end} does not have its sha256; "
            "upload it again"
        )

    def _verified(self, first: int, content: bytes) -> bool:
        file, start, _ = self.layout.place(first, 1)
        size, digests = self.layout.files[file].bytes, self._digests[file]
        for place in range(0, len(content), size):
            at = (start + place) // size * DIGEST_BYTES
            if (
                hashlib.sha256(memoryview(content)[place : place + size]).digest()
                != digests[at : at + DIGEST_BYTES]
            ):
                return False
        return True

    def _write(self, first: int, count: int, content: bytes) -> int:
        file, start, _ = self.layout.place(first, count)
        os.pwrite(self._descriptors[file], content, start)
        return self._mark(first, count)

    def _mark(self, first: int, count: int) -> int:
        self.have[1 + first : 1 + first + count] = 1
        self._asked[first : first + count] = False
        return count

    # --- for other nodes --------------------------------------------------------------------------------------------

    def give(self, first: int, count: int, *, timeout_s: float = 60.0) -> bytes | None:
        """Return blocks to another node, fetched now if they are this node's to fetch; None: they are not to be had."""
        deadline = time.monotonic() + timeout_s
        if not (self.opened.wait(timeout_s / 10) and 0 <= first < first + count <= len(self.layout)):
            return None
        own = self.peers.is_own(self._part_of(first)[0])
        while not self.have[1 + first : 1 + first + count].all():
            if not own or time.monotonic() > deadline:
                return None
            self._bring_or_wait(first, count)
        file, start, end = self.layout.place(first, count)
        return os.pread(self._descriptors[file], end - start, start)
