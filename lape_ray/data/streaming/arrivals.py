"""Tell a reader which bytes of a file on its way are there, and let it say which it needs next.

Shape suffixes: N images of a pass, B of a batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lape_ray.data.beton.format import CHECKSUM_BYTES, Contents
from lape_ray.data.streaming.blocks import FETCHING, MAP, WHOLE, Layout, blocks_between
from lape_ray.storage.copies import ARRIVING, LOCK, is_held
from lape_ray.storage.s3 import RETRY_TIMEOUT_S

ERROR, WANTS = "error", "wants-"
GIVE_UP_S = 300.0
"""The time without a single new block after which a reader no longer waits; a request to S3 is retried for less."""
GONE_S = 20.0
"""The time that another process has to take over where the one that fetched has ended."""
TELL_S = 10.0
POLL_S = 0.002


class Arrivals:
    """The blocks of one set that is on its way to this machine, as a process that reads them sees it."""

    def __init__(self, contents: Contents, layout: Layout) -> None:
        self.folder, self.contents = contents.files[0].parent, contents
        self._have = np.memmap(self.folder / MAP, np.uint8, "r")
        start_N = contents.images_N["data_ptr"].astype(np.int64)
        stop_N = start_N + contents.lengths_N + CHECKSUM_BYTES
        self._first_N, self._last_N = layout.span(contents.file_N, start_N, stop_N)

    @classmethod
    def of(cls, path: str | Path, contents: Contents) -> Arrivals | None:
        """Look where the set `path` of these contents lies; None: it is no copy that is on its way."""
        if Path(path).parent.name != ARRIVING:
            return None
        layout = Layout.read(Path(path))
        return None if layout is None else cls(contents, layout)

    @property
    def whole(self) -> bool:
        """Tell whether nothing is missing, and nothing will be written any more."""
        return bool(self._have[0] == WHOLE)

    @contextlib.contextmanager
    def wanted(self, index_N: np.ndarray, batch_size: int) -> Iterator[Callable[[np.ndarray], None]]:
        """Say in which order images are read in the block.

        Yields what waits until all bytes of a batch's images are here, and verified; see `wait_for` for what it raises.
        """
        if self.whole:
            yield lambda index_B: None
            return
        ended = threading.Event()
        path = self.folder / f"{WANTS}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        spans = np.stack([self._first_N[index_N], self._last_N[index_N]], 1).astype(np.int64)
        hidden = path.with_name(f".{path.name}")
        with hidden.open("wb") as file:
            file.write(np.array([0, batch_size], np.int64).tobytes() + spans.tobytes())
        place = np.memmap(hidden, np.int64, "r+", shape=(1,))
        hidden.replace(path)

        def wait(index_B: np.ndarray) -> None:
            self._wait(index_B, ended)
            place[0] += 1

        try:
            yield wait
        finally:
            ended.set()
            path.unlink(missing_ok=True)

    def _wait(self, index_B: np.ndarray, ended: threading.Event) -> None:
        """Wait until all bytes of these images are here, and verified, or until nobody needs them any more."""
        if self.whole:
            return
        places = 1 + blocks_between(self._first_N[index_B], self._last_N[index_B])
        wait_for(
            self.folder,
            lambda: ended.is_set() or bool(self._have[places].all()),
            lambda: int(np.count_nonzero(self._have)),
        )


def wait_until_ready(folder: Path, whole: Callable[[], bool]) -> None:
    """Wait until a copy in `folder` may be opened, as its tables are here, or until it is `whole` and elsewhere.

    See `wait_for` for what is raised.
    """

    def ready() -> bool:
        if whole():
            return True
        with contextlib.suppress(OSError), (folder / MAP).open("rb") as file:
            return is_held(folder / LOCK) and file.read(1) not in (b"", bytes([FETCHING]))
        return False

    wait_for(
        folder, ready, lambda: 0, locks=(folder / LOCK, folder.parent / LOCK), gone_s=2 * RETRY_TIMEOUT_S
    )


def wait_for(
    folder: Path,
    arrived: Callable[[], bool],
    count: Callable[[], int],
    *,
    locks: Sequence[Path] = (),
    gone_s: float | None = None,
) -> None:
    """Wait until `arrived`.

    Args:
        count: returns how many blocks are here, so that a process that hangs is told from a slow network.
        locks: of which a process that fetches holds one; none: the copy's own.
        gone_s: the time for which none of them may be held.

    Raises:
        ValueError: the object on S3 is damaged.
        OSError: nothing more will come; says why.
    """
    gone_s = GONE_S if gone_s is None else gone_s
    began = last = looked = time.monotonic()
    gone, told, before = 0.0, False, count()
    while not arrived():
        time.sleep(POLL_S)
        now = time.monotonic()
        if now - looked < 0.1:
            continue
        if not any(map(is_held, locks or (folder / LOCK,))):
            gone += now - looked
        else:
            gone = 0.0
            _raise_error(folder)
        looked = now
        if (here := count()) != before:
            before, last = here, now
        if locks and not gone:
            last = now  # whoever copies all of it first, takes its time
        if gone > gone_s or now - last > GIVE_UP_S:
            raise OSError(
                f"the data in {folder} stopped coming: the process that fetched them from S3 "
                f"{'has ended' if gone > gone_s else f'brought nothing for {GIVE_UP_S:g} s'}; start again"
            )
        if not told and now - began > TELL_S:
            told = True
            print(f"waiting for data that come from S3 to {folder}", file=sys.stderr, flush=True)


def _raise_error(folder: Path) -> None:
    """Raise what the process that fetches has failed with, if it has."""
    try:
        told = json.loads((folder / ERROR).read_text())
    except (OSError, ValueError):
        return
    raise (ValueError if told["for_good"] else OSError)(told["text"])
