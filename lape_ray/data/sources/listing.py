"""List what lies below a folder, and count what a source leaves out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

# What systems put into folders by themselves; hidden names, which begin with a dot, need no list.
SYSTEM_FOLDERS = (
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
)
MOST_KINDS = 20  # of what was left out are told apart


def shown(name: str | os.PathLike[str]) -> str:
    r"""Return a file's name as text that can be printed: bytes that are not UTF-8 become \xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


@dataclass
class LeftOut:
    """Count what a source does not read: kind -> (how many, the first)."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        if kind not in self.found and len(self.found) >= MOST_KINDS:
            kind = "other files"
        before, first = self.found.get(kind, (0, example))
        self.found[kind] = (before + count, first)

    def add_file(self, path: str) -> None:
        """Count a file of an extension that is not read."""
        suffix = PurePath(path).suffix.lower()
        self.add(f"{suffix} file" if suffix else "file without extension", path)

    def update(self, other: LeftOut) -> None:
        for kind, (count, first) in other.found.items():
            self.add(kind, first, count)

    def words(self) -> dict[str, int]:
        """Say it: '.gif file, such as a/1.gif' -> 2."""
        return {f"{kind}, such as {shown(first)}": count for kind, (count, first) in self.found.items()}


@dataclass(frozen=True)
class Listing:
    """The folders below a folder, by their relative paths with slashes; the folder itself is ''.

    Attributes:
        files: names of the files in each folder, sorted
        hidden: hidden files and folders, and pipes and such, which were not looked at
        loops: links to a folder above them, which were not followed
    """

    files: dict[str, list[str]]
    hidden: list[str]
    loops: list[str]

    def paths(self) -> Iterator[str]:
        """Yield the relative path of every file, by sorted folders."""
        for folder in sorted(self.files):
            for name in self.files[folder]:
                yield joined(folder, name)

    def left_out(self, base: str = "") -> LeftOut:
        """Count hidden files and loops below the relative path `base`."""
        counts = LeftOut()
        for kind, paths in (
            ("hidden or special file or folder", self.hidden),
            ("link to a folder above it", self.loops),
        ):
            for path in sorted(paths):
                if not base or path.startswith(f"{base}/"):
                    counts.add(kind, path)
        return counts


def joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def list_below(root: str | Path) -> Listing:
    """List everything below `root`; links to folders are followed, but not to a folder above them.

    Raises:
        ValueError: a folder cannot be read; names it.
    """
    listing = Listing({}, [], [])
    _list(os.fspath(root), "", frozenset(), listing)
    return listing


def _list(folder: str, relative: str, above: frozenset[tuple[int, int]], listing: Listing) -> None:
    try:
        status = os.stat(folder)  # noqa: PTH116  # a million folders
        place = (status.st_dev, status.st_ino)
        if place in above:
            listing.loops.append(relative)
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"{shown(folder)} cannot be read: {error.strerror}; mend it, or move it away"
        ) from error
    files = listing.files.setdefault(relative, [])
    for entry in found:
        path = joined(relative, entry.name)
        if is_hidden(entry.name):
            listing.hidden.append(path)
        elif entry.is_dir():
            _list(entry.path, path, above | {place}, listing)
        elif entry.is_file() or entry.is_symlink():  # a link that leads nowhere is an error where it is read
            files.append(entry.name)
        else:  # to open a pipe may take for ever
            listing.hidden.append(path)
