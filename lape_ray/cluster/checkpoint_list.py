"""The checkpoints of a run that count: its list, its folders, and what may be deleted.

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
from lape_ray.training.checkpoint import MARKER, DamagedError, Metadata, parse_metadata

LIST, COPY = "checkpoints.json", "checkpoints.copy.json"
RAYS_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's own list, of runs from before this one existed. Ray would go on from it."""
log = logging.getLogger(__name__)
CHECKPOINT, STAGED = "checkpoint-", ".checkpoint-"
"""The beginnings of folders' names: of checkpoints, and of those that are being written."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint of the list.

    Attributes:
        name: of its folder
        steps_done: optimizer steps since the beginning of the run
        score: val/acc1 in percent; None where nothing was evaluated, or not with images of the model's size
    """

    name: str
    steps_done: int
    score: float | None = None

    def __post_init__(self) -> None:
        if not self.name.startswith(CHECKPOINT) or "/" in self.name:
            raise ValueError(f"{self.name!r} names no checkpoint")
        storage.safe_relative(self.name, "the name of a checkpoint", "choose another")


@dataclass(frozen=True, kw_only=True)
class _List:
    format: int
    checkpoints: tuple[Listed, ...]

    def __post_init__(self) -> None:
        if len({one.name for one in self.checkpoints}) < len(self.checkpoints):
            raise ValueError("a checkpoint is listed twice")


def read_list(folder: str, name: str = LIST) -> tuple[Listed, ...] | None:
    """Read the list of the run in `folder`, or its copy; None where it does not exist or is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found: _List = storage.read_record(_List, storage.join(folder, name), way_out="")
        return found.checkpoints
    return None


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
    """Compare the list with the folders, mend it, and return it; `tell` hears in one line of what was found.

    Whole folders that are newer than what is listed are added, entries without a whole folder are left out. Where the
    list cannot be read, its copy serves, or else all whole folders are listed; and no whole folder is deleted.

    Args:
        before: delete what interrupted processes left behind: folders without `meta.json` whose files are all older
            than this, in seconds since 1970 by the storage's clock, and whole ones that a list which was read
            supersedes. None: delete nothing.

    Raises:
        DamagedError: the run has checkpoints, and each is damaged.
    """
    folders = _checkpoint_folders(folder)
    whole, damaged = _whole(folder, folders)
    listed = read_list(folder)
    known = listed if listed is not None else read_list(folder, COPY) or ()
    entries = [whole[one.name] for one in known if one.name in whole]  # as its own meta.json describes it
    newest = entries[-1].steps_done if entries else -1
    names = {one.name for one in entries}
    found = [one for one in whole.values() if one.name not in names and one.steps_done > newest]
    entries += sorted(found, key=lambda one: (one.steps_done, one.name))
    if (
        damaged and not entries
    ):  # to begin again from nothing would be a loss, and perhaps a copy can be restored
        raise DamagedError(
            f"no checkpoint of this run is whole ({'; '.join(damaged)}); restore one of them, or start again with "
            "--run.overwrite true"
        )
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


def newest_meta(folder: str) -> Metadata | None:
    """Read the facts of the checkpoint with the most steps; None where no folder is whole."""
    whole, _ = _whole(folder, _checkpoint_folders(folder))
    if not whole:
        return None
    return _read_meta(folder, max(whole.values(), key=lambda one: one.steps_done).name)[0]


def _read_meta(folder: str, name: str) -> tuple[Metadata, Mapping[str, Any]]:
    address = storage.join(folder, name, MARKER)
    return parse_metadata(storage.read_text(address), address)


def _checkpoint_folders(folder: str) -> dict[str, dict[str, storage.Stored]]:
    """List the files of each checkpoint's folder, staged ones included."""
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
            whole[name] = _described(folder, name, files)
        except (ValueError, FileNotFoundError) as error:
            damaged.append(f"{name} cannot be used ({error})")
    return whole, damaged


def _described(folder: str, name: str, files: Mapping[str, storage.Stored]) -> Listed:
    """Make the entry of a checkpoint from its meta.json; a ValueError names a file that is another than that says."""
    meta, described = _read_meta(folder, name)
    for file, facts in described.items():
        if file not in files or {"bytes": files[file].size} != {"bytes": facts.get("bytes")}:
            raise ValueError(f"{file} is missing or has another size")
    return Listed(name=name, steps_done=meta.steps_done, score=meta.evaluation.get("val/acc1"))


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
