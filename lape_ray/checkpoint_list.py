"""Which checkpoints of a run count: its list, its folders, and what may be deleted.

    checkpoints.json        the list, oldest first: name, steps done and score of each
    checkpoints.copy.json   the same once more, from before or after the last change
    checkpoint-*/           a checkpoint; one without `meta.json`, which is written last, is none

The folders are what counts, and the list is what they are compared with before anything is deleted. A list that is
missing or damaged deletes nothing: it is made again from the folders that are whole. Only the owner of the run's lease
writes here; rank 0 of its workers, while they train, and its driver before and after.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lape_ray import storage
from lape_ray.checkpoint import MARKER

LIST, COPY = "checkpoints.json", "checkpoints.copy.json"
RAYS_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's own list, of runs from before this one existed. Ray would go on from it."""
log = logging.getLogger(__name__)
CHECKPOINT, STAGED = "checkpoint-", ".checkpoint-"
"""How the names of folders begin: of checkpoints, and of those that are being written."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint of the list.

    Attributes:
        name: of its folder
        steps_done: optimizer steps since the beginning of the run
        score: val/acc1 in percent; None where nothing was evaluated
    """

    name: str
    steps_done: int
    score: float | None = None


def read_list(folder: str, name: str = LIST) -> tuple[Listed, ...] | None:
    """Read the list of the run in `folder`, or its copy; None where there is none, or it is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        values = storage.read_record(storage.join(folder, name), way_out="")
        return tuple(_entry(**one) for one in values["checkpoints"])
    return None


def _entry(*, name: str, steps_done: int, score: float | None) -> Listed:
    """Check the values of an entry, which come from a file; a TypeError or ValueError refuses others."""
    if not isinstance(name, str) or not name.startswith(CHECKPOINT) or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} names no checkpoint")
    if not isinstance(steps_done, int) or not isinstance(score, (int, float, type(None))):
        raise TypeError(f"{name!r} has values of another kind")
    return Listed(name=name, steps_done=steps_done, score=score)


def write_list(folder: str, entries: Sequence[Listed]) -> None:
    """Write the list and its copy; one of the two is whole at every moment."""
    for name in (LIST, COPY):
        storage.write_record(
            storage.join(folder, name), {"format": 1, "checkpoints": [asdict(one) for one in entries]}
        )


def add(folder: str, entries: Sequence[Listed], new: Listed, *, keep: int) -> tuple[Listed, ...]:
    """List a checkpoint that was stored just now, then delete those that it supersedes; returns the new list.

    Args:
        entries: the list so far.
        keep: how many of the best are kept, beside the newest.
    """
    kept = retained([*entries, new], keep=keep)
    write_list(folder, kept)
    for one in entries:
        if one not in kept:
            try:
                storage.delete_folder(storage.join(folder, one.name), first=MARKER)
            except OSError as error:  # the run can go on; its next start tries again
                log.warning("%s is superseded and could not be deleted: %s", one.name, error)
    return kept


def retained(entries: Sequence[Listed], *, keep: int) -> tuple[Listed, ...]:
    """Return the newest entry and the `keep` best (of equals the later ones), in their order."""
    order = sorted(
        range(len(entries)), key=lambda i: (-math.inf if entries[i].score is None else entries[i].score, i)
    )
    kept = {*order[-keep:], len(entries) - 1}
    return tuple(one for i, one in enumerate(entries) if i in kept)


def best(entries: Sequence[Listed]) -> Listed | None:
    """Return the checkpoint with the highest score, the newest of equals; None where none has a score."""
    found = None
    for one in entries:
        if one.score is not None and (found is None or one.score >= (found.score or 0)):
            found = one
    return found


def recover(folder: str, tell: Callable[[str], None], *, before: float | None = None) -> tuple[Listed, ...]:
    """Hold the list against the folders, mend it, and return it; `tell` hears in one line of what was found.

    Whole folders that are newer than what is listed are added, entries without a whole folder are left out. Where the
    list cannot be read, its copy serves, or else all whole folders are listed; and no whole folder is deleted.

    Args:
        before: delete what interrupted processes left behind: folders without `meta.json` whose files are all older
            than this, in seconds since 1970 by the storage's clock, and whole ones that a list which was read
            supersedes. None: delete nothing.
    """
    folders = _checkpoint_folders(folder)
    whole, damaged = _whole(folder, folders)
    listed = read_list(folder)
    known = listed if listed is not None else read_list(folder, COPY) or ()
    entries = [one for one in known if one.name in whole]
    newest = entries[-1].steps_done if entries else -1
    names = {one.name for one in entries}
    found = [one for one in whole.values() if one.name not in names and one.steps_done > newest]
    entries += sorted(found, key=lambda one: (one.steps_done, one.name))
    if told := _in_words(known, entries, found, damaged, readable=listed is not None):
        tell(f"{folder}: {told}")
    if tuple(entries) != (listed or ()):
        write_list(folder, entries)
    storage.delete_file(storage.join(folder, RAYS_LIST))
    if before is not None:
        superseded = set(whole) - {one.name for one in entries} if listed is not None else set()
        litter = {name for name, files in folders.items() if _is_litter(name, files, before)}
        for name in superseded | litter:
            storage.delete_folder(storage.join(folder, name), first=MARKER)
        storage.sweep_temporaries(folder, before)
    return tuple(entries)


def newest_meta(folder: str) -> dict[str, Any] | None:
    """Read the meta.json of the checkpoint with the most steps; None where no folder is whole."""
    whole, _ = _whole(folder, _checkpoint_folders(folder))
    if not whole:
        return None
    newest = max(whole.values(), key=lambda one: one.steps_done)
    return storage.read_record(storage.join(folder, newest.name, MARKER), way_out="")


def _checkpoint_folders(folder: str) -> dict[str, dict[str, storage.Stored]]:
    """The files of each checkpoint's folder, staged ones included."""
    found = storage.files_of_folders(folder)
    return {name: files for name, files in found.items() if name.startswith((CHECKPOINT, STAGED))}


def _is_litter(name: str, files: Mapping[str, storage.Stored], before: float) -> bool:
    staged_or_torn = name.startswith(STAGED) or MARKER not in files
    return staged_or_torn and all(file.modified <= before for file in files.values())


def _whole(
    folder: str, folders: Mapping[str, Mapping[str, storage.Stored]]
) -> tuple[dict[str, Listed], list[str]]:
    """Return those of `folders` whose files are there in their sizes, by name, and what is wrong with others.

    Checksums are compared by the workers that load a checkpoint.
    """
    whole: dict[str, Listed] = {}
    damaged: list[str] = []
    for name, files in folders.items():
        if MARKER not in files or name.startswith(STAGED):
            continue
        try:
            meta = storage.read_record(storage.join(folder, name, MARKER), way_out="it is left where it is")
            whole[name] = _described(name, meta, files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append(f"{name} is damaged ({error or type(error).__name__})")
    return whole, damaged


def _described(name: str, meta: Mapping[str, Any], files: Mapping[str, storage.Stored]) -> Listed:
    """Make the entry of a checkpoint from its meta.json; a ValueError names a file that is another than that says."""
    for file, facts in meta["files"].items():
        if file not in files or files[file].size != facts["bytes"]:
            raise ValueError(f"{file} is missing or has another size")
    score = meta["metrics"].get("val/acc1") if not meta["progress"]["step"] else None
    return _entry(name=name, steps_done=meta["steps_done"], score=score)


def _in_words(
    known: Sequence[Listed],
    entries: Sequence[Listed],
    found: Sequence[Listed],
    damaged: Sequence[str],
    *,
    readable: bool,
) -> str:
    """Say what differs between the list and the folders; nothing where nothing does."""
    told = []
    if not readable and (entries or damaged):
        told.append(f"no list of checkpoints that can be read; {len(entries)} whole folders are listed now")
    elif found:
        told.append(f"{', '.join(one.name for one in found)} is whole, and is listed now")
    names = {one.name for one in entries}
    if missing := [one.name for one in known if one.name not in names]:
        told.append(f"{', '.join(missing)} is listed, and has no whole folder")
    return "; ".join((*told, *damaged))
