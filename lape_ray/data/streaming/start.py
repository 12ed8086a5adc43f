"""Start the process that fetches a run's data on one node, and wait until training may begin."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lape_ray.config import DataConfig
from lape_ray.data.remote import RemoteSet
from lape_ray.data.streaming.arrivals import wait_until_ready
from lape_ray.storage import is_remote
from lape_ray.storage.copies import ARRIVING, make_folder

ENDING_S = 5.0


def streams(data: DataConfig) -> bool:
    """Tell whether training begins while data come from S3: native readers alone wait for single images."""
    return data.stream and data.backend in ("native", "resident") and bool(_remote(data))


def _remote(data: DataConfig) -> list[str]:
    return [path for path in dict.fromkeys((data.train, data.val)) if is_remote(path)]


def stage_data(data: DataConfig, say: Callable[[str], None]) -> None:
    """Fetch both splits to this machine, or where they stream, what has to be there before the first step."""
    for path in _remote(data):
        found = RemoteSet.find(path)
        if not (streams(data) and found.can_stream):
            if streams(data):
                say(
                    f"{path} was written without checksums of its parts, so it is copied whole before the training "
                    "starts; write it again to train while it is on its way"
                )
            found.copied()
        elif not found.place.is_complete():
            make_folder(found.place.folder)
            wait_until_ready(found.place.folder / ARRIVING, found.place.is_complete)


class Fetcher:
    """The process that fetches the data of a run on this node; it ends with this one, however that ends.

    Args:
        host: this node's address for the others of the run; None: it has none.
    """

    def __init__(self, data: DataConfig, host: str | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lape_ray.data.streaming.fetcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )
        self._tell({"addresses": _remote(data), "host": host})
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise OSError(
                "the process that fetches data from S3 ended as it began; what it said stands above"
            )
        name = f"[{host}]" if ":" in str(host) else host
        self.address = f"{name}:{json.loads(line)['port']}"

    def begin(self, peers: Sequence[str] = (), own: int = 0, token: str = "") -> None:
        """Begin to fetch, as the node `own` of those at these addresses."""
        self._tell({"peers": list(peers), "own": own, "token": token})

    def close(self) -> None:
        """End it; what it has fetched stays for the next."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _tell(self, values: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()
