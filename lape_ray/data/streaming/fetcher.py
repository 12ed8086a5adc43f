"""The process that fetches what a run's workers on one node train on; `start.Fetcher` starts it.

    python -m lape_ray.data.streaming.fetcher

It reads two lines of JSON, {"addresses", "host"} and {"peers", "own", "token"}, and ends when its input does, which is
when the process that started it ends, however. In between it prints {"port"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any

from lape_ray.data.remote import RemoteSet
from lape_ray.data.streaming.download import Download
from lape_ray.data.streaming.peers import Peers, serve
from lape_ray.storage.s3 import CONNECTIONS

THREADS = CONNECTIONS // 2  # the others of a client are for what other nodes ask
SWEEPERS = THREADS // 4
"""The threads that fetch on in the file's order while readers need something: many small requests leave a fast network
idle, and what they fetch is needed soon."""
LOOK_S, IDLE_S = 0.02, 0.01


class Fetcher:
    """The sets that are fetched, in the order of the config, and the threads that do it."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.downloads: dict[str, Download] = {}
        self._opened: list[Download] = []
        self._failed = threading.Event()

    def run(self, addresses: list[str]) -> None:
        """Fetch all sets; returns when all are whole, or one has failed."""
        for number in range(THREADS):
            threading.Thread(target=self._work, args=(number < SWEEPERS,), daemon=True).start()
        opening = threading.Thread(target=self._open, args=(addresses,), daemon=True)
        opening.start()
        while not self._failed.is_set():
            for download in list(self._opened):
                if not download.whole:
                    with self._failing(download):
                        download.look_for_wants()
                        download.finish()
            if not opening.is_alive() and all(download.whole for download in self._opened):
                return
            time.sleep(LOOK_S)

    def _open(self, addresses: list[str]) -> None:
        for address in addresses:
            found = RemoteSet.find(address)  # what is wrong there, the workers find too
            if not found.can_stream:
                continue  # the workers copy it whole
            download = self.downloads[found.place.folder.name] = Download(found, self.peers)
            with self._failing(download):
                download.open()
                self._opened.append(download)

    def give(self, name: str, first: int, count: int) -> bytes | None:
        """Return blocks of a set to another node; None: they are not to be had here."""
        deadline = time.monotonic() + 10
        while name not in self.downloads and time.monotonic() < deadline:
            time.sleep(IDLE_S)
        download = self.downloads.get(name)
        try:
            return None if download is None else download.give(first, count)
        except (OSError, ValueError):  # its own threads find that, too
            return None

    def _work(self, sweeps: bool) -> None:
        """Bring in what is needed next, or while nothing is, what is missing; `sweeps`: the other way round."""
        while not self._failed.is_set():
            if not self._bring_next(sweeps):
                time.sleep(IDLE_S)

    def _bring_next(self, sweeps: bool) -> bool:
        active = [download for download in self._opened if not download.whole]
        for wanted in (False, True) if sweeps else (True, False):
            for download in active:
                with self._failing(download):
                    if claimed := download.next_wanted() if wanted else download.next_missing():
                        download.bring(*claimed, swept=not wanted)
                        return True
        return False

    @contextlib.contextmanager
    def _failing(self, download: Download) -> Any:
        """Tell the readers of all sets what goes wrong in the block: nothing more will come of any.

        Where a full disk keeps that from them, the process ends, which they notice by its locks.
        """
        try:
            yield
        except Exception as error:
            self._failed.set()
            try:
                download.fail(error)
                for other in self._opened:
                    if not other.whole:
                        other.fail(error)
            except OSError:
                print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(1)


def main() -> None:
    """Fetch what the first line names, until the input ends."""
    asked = json.loads(sys.stdin.readline())
    peers, token = Peers(), [""]
    fetcher, port = Fetcher(peers), None
    if asked["host"] is not None:
        port = serve(asked["host"], lambda: token[0], fetcher.give).server_address[1]
    print(json.dumps({"port": port}), flush=True)
    if line := sys.stdin.readline():
        told = json.loads(line)
        if told["peers"]:
            peers.join(tuple(told["peers"]), told["own"], told["token"])
        token[0] = told["token"]
        threading.Thread(target=fetcher.run, args=(asked["addresses"],), daemon=True).start()
    sys.stdin.read()
    for download in fetcher.downloads.values():
        download.close()
    os._exit(0)  # what the threads still wait for is of no use


if __name__ == "__main__":
    main()
