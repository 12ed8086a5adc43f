"""A file that is written over hours and outlives its writer: what is on the disk is known to a journal.

Beside x.beton two hidden files grow, .x.beton.partial and .x.beton.journal. A line of the journal is written
only after the bytes it speaks of are on the disk, so whatever ends the writer (a signal, a full disk, a lost
machine), the next one continues after the journal's last complete line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lape_ray.values.typed import typed

COMMIT_SECONDS = 5.0


class Journal:
    """The open pair of files; made by `open_journal`.

    Attributes:
        data: the .beton that is being written, positioned by the caller
        earlier: what earlier writers recorded, oldest first
    """

    def __init__(self, path: Path, fingerprint: str, *, fresh: bool) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._lines = path.with_name(f".{path.name}.journal")
        self._log = self._lines.open("a+b")
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._log.close()
            raise ValueError(f"{path} is being written by another process; wait for it or stop it") from None
        self.earlier: list[Any] = []
        self._pending: list[Any] = []
        self._committed = time.monotonic()
        header, groups = self._read()
        if fresh or header != fingerprint or not self._partial.exists():
            self._log.truncate(0)
            self._log.write(_line(fingerprint))
            self._log.flush()
            self.data = self._partial.open("w+b")
        else:
            try:
                known = typed(tuple[tuple[Any, ...], ...], groups, "lines")
            except ValueError as error:
                self._log.close()
                raise self.damaged(error) from None
            self.earlier = [entry for group in known for entry in group]
            self.data = self._partial.open("r+b")
        self._worth_keeping = bool(self.earlier)

    def _read(self) -> tuple[Any, list[Any]]:
        """Read the fingerprint and the groups of entries that are whole; the journal is cut behind them."""
        self._log.seek(0)
        lines: list[Any] = []
        end = 0
        for line in self._log:
            try:
                lines.append(json.loads(line) if line.endswith(b"\n") else _torn())
            except (ValueError, RecursionError):
                break
            end += len(line)
        self._log.truncate(end)
        header, *groups = lines or [None]
        return header, groups

    def damaged(self, reason: object) -> ValueError:
        """Make the error to raise where an entry of this file's journal cannot be one."""
        return ValueError(
            f"{self._lines} is damaged: {reason}; give --fresh to write {self.path.name} from its beginning"
        )

    def add(self, entry: Any) -> None:
        """Record what was written to `data`; it counts once it is committed, at most seconds later."""
        self._pending.append(entry)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Bring `data` to the disk, then the lines that speak of it."""
        self.data.flush()
        os.fsync(self.data.fileno())
        if self._pending:
            self._log.write(_line(self._pending))
            self._log.flush()
            os.fsync(self._log.fileno())
            self._pending = []
            self._worth_keeping = True
        self._committed = time.monotonic()

    def finish(self) -> None:
        """Give the file its name. Readers of an older one of that name keep theirs."""
        self.commit()
        self._partial.replace(self.path)

    def close(self) -> None:
        """Keep what a later writer can use, and nothing else."""
        self.data.close()
        if not self._partial.exists() or not self._worth_keeping:
            self._partial.unlink(missing_ok=True)
            self._lines.unlink(missing_ok=True)
        self._log.close()


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _torn() -> Any:
    raise ValueError("a line without its end")


@contextlib.contextmanager
def open_journal(path: Path, fingerprint: str, *, fresh: bool = False) -> Iterator[Journal]:
    """Open the journal of `path`; an earlier one is continued if it has the same fingerprint (of source and options).

    However the block ends, what it wrote stays for the next writer, unless `finish` was called.

    Raises:
        ValueError: another process is writing this file, or its journal is damaged.
    """
    journal = Journal(path, fingerprint, fresh=fresh)
    try:
        yield journal
    except BaseException:
        with contextlib.suppress(
            OSError
        ):  # of a full disk, which is what ended the block; the journal is true
            journal.commit()
        raise
    finally:
        journal.close()
