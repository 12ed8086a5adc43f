"""Find the files of a source in shards: those of one kind and one split, each once, and all of them."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lape_ray.data.sources.base import EXTENSIONS
from lape_ray.data.sources.listing import LeftOut, joined, list_below, shown
from lape_ray.data.sources.splits import choose_split, split_word

Kind = Literal["parquet", "tar"]
CLASSES_FILE = "classes.txt"
MOST_FILES = 10**6
# Compressed tars too: that they must be unpacked is better said than that there are none.
NAMES: dict[Kind, re.Pattern[str]] = {
    "parquet": re.compile(r"\.parquet$", re.IGNORECASE),
    "tar": re.compile(r"\.(tar|tar\.\w+|t[gbx]z|tzst)$", re.IGNORECASE),
}
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def kind_of_shards(where: str) -> Kind | None:
    """Tell which kind of shards `where` names, or which a folder has anywhere below it; None: it has none.

    Raises:
        ValueError: a folder has shards of both kinds, or shards and folders of images; names one of each.
    """
    if not Path(where).is_dir():
        return next((kind for kind, pattern in NAMES.items() if pattern.search(where)), None)
    first: dict[str, str] = {}
    for folder, names in list_below(where).files.items():
        siblings = frozenset(names)
        for name in names:
            kind = _kind(name, siblings) or (
                "image" if folder and name.lower().endswith(EXTENSIONS) else None
            )
            if kind:
                first.setdefault(kind, joined(folder, name))
    if len(first) > 1:
        kinds = sorted(first, reverse=True)[:2]
        paths = " and ".join(shown(f"{where}/{first[kind]}") for kind in kinds)
        raise ValueError(
            f"{where} holds {' and '.join(kinds)} files, such as {paths}; move those that are not meant out of it, "
            "or give the folder or a glob of those that are"
        )
    return next((kind for kind in NAMES if kind in first), None)


def _kind(name: str, siblings: Collection[str]) -> Kind | None:
    """Tell which kind of shard a file is. The parquet file that img2dataset writes about a tar beside it is none."""
    kind = next((kind for kind, pattern in NAMES.items() if pattern.search(name)), None)
    if kind == "parquet" and f"{name[: -len('.parquet')]}.tar" in siblings:
        return None
    return kind


class Found(NamedTuple):
    """The files of a split, sorted, and what lies among them and is not read."""

    files: tuple[str, ...]
    left_out: LeftOut


def find_shards(where: str, split: str | None, kind: Kind) -> Found:
    """Find the files that `where` names.

    Args:
        where: a file, a folder (searched with all below it), a glob, or names with ranges in braces, such as
            `train-{0000..0146}.tar`, each of which must exist.
        split: which files: those with that split word (`split_word`) in their name, or else in the nearest folder's;
            where several names have one word, and where none does, the name without its number. None: all, if they
            are of one split.

    Raises:
        ValueError: a file does not exist, the split must be chosen, or a folder has it in several places or not all
            of its files; says which.
    """
    is_folder = Path(where).is_dir()
    found, left_out = _below(where, kind) if is_folder else (_named(where), LeftOut())
    missing = [file for file in found if not file.is_file()]
    if missing or not found:
        others = f" ({len(missing)} of {len(found)} are missing)" if len(found) > 1 else ""
        raise ValueError(f"{missing[0] if missing else where} is not there{others}; no {kind} shards to read")
    if odd := [file for file in found if shown(file) != str(file)]:
        raise ValueError(
            f"the name of {shown(odd[0])} is not UTF-8; rename the file, or the folder that it lies in"
        )
    by_split = _by_split(found, Path(where) if is_folder else _fixed_part(where), is_folder)
    places = by_split[choose_split(by_split, split, where)]
    files = sorted(file for files in places.values() for file in files)
    if is_folder:
        _refuse_several_places(where, places)
    _refuse_or_note_lost(where, files, left_out)
    _refuse_same_file(files)
    return Found(tuple(str(file) for file in files), left_out)


def _by_split(found: Sequence[Path], base: Path, is_folder: bool) -> dict[str, dict[Path, list[Path]]]:
    """Group files by split and place. In a folder, several names with one word are as many splits."""
    parts = [_part_of(file, base, is_folder) for file in found]
    names: dict[str, set[str]] = {}
    for part in parts:
        names.setdefault(part.word, set()).add(part.name)
    by_split: dict[str, dict[Path, list[Path]]] = {}
    for file, part in zip(found, parts, strict=True):
        split = part.name if is_folder and len(names[part.word]) > 1 else part.word
        by_split.setdefault(split, {}).setdefault(part.place, []).append(file)
    return by_split


def _below(where: str, kind: Kind) -> tuple[list[Path], LeftOut]:
    listing = list_below(where)
    left_out, found = listing.left_out(), []
    for folder, names in listing.files.items():
        siblings = frozenset(names)
        for name in names:
            if _kind(name, siblings) == kind:
                found.append(Path(where, folder, name))
            elif name != CLASSES_FILE:
                left_out.add_file(joined(folder, name))
    return found, left_out


def _named(where: str) -> list[Path]:
    path = Path(where)
    if "{" in where and not path.exists():
        return expand_ranges(where)
    if any(c in where for c in "*?[") and not path.exists():
        return sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    return [path]


def _fixed_part(where: str) -> Path:
    """Return the folder up to which the paths of all files of a file's name, glob or range are the same."""
    folders = Path(where).parent.parts
    return Path(*itertools.takewhile(lambda part: not any(c in part for c in "*?[{"), folders))


class _Part(NamedTuple):
    """Say what a file is a part of.

    Attributes:
        word: its split word, or the name where it has none
        name: of the file without its number, or of the folder that has the word
        place: the folder in which the file or folder of that name lies
    """

    word: str
    name: str
    place: Path


def _part_of(file: Path, base: Path, is_folder: bool) -> _Part:
    numbered = re.match(r"(.*?)[-_.]?(\d{4,}|\d+([-_]of[-_]\d+)?$)", file.stem)
    name = (numbered[1] or "numbered") if numbered else file.stem
    if word := split_word(file.stem):
        return _Part(word, name, file.parent)
    for folder in itertools.takewhile(lambda folder: folder != base, file.parents):
        if word := split_word(folder.name):
            return _Part(word, folder.name, folder.parent)
    if is_folder and file.parent != base:
        return _Part(file.parent.name, file.parent.name, file.parent.parent)
    return _Part(name, name, base)


def _refuse_several_places(where: str, places: Mapping[Path, Sequence[Path]]) -> None:
    """Refuse a split that several folders have, as those of several configurations of a hub's data set do."""
    if len(places) > 1:
        first, second = sorted(places)[:2]
        raise ValueError(
            f"{where} holds the same split in {len(places)} folders, with {places[first][0]} and {places[second][0]}; "
            "give one of the folders, or all files by a glob"
        )


def _refuse_or_note_lost(where: str, files: Sequence[Path], left_out: LeftOut) -> None:
    """Refuse a folder with fewer files than their names count, such as train-00001-of-00004; of a glob count them.

    Count numbers that are missing in between, too.
    """
    sets: dict[tuple[Path, str, str], dict[int, str]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*?[-_])(\d+)([-_]of[-_]\d+)(\D.*)", file.name):
            sets.setdefault((file.parent, match[1], match[3]), {})[int(match[2])] = match[2]
    for (folder, before, of), numbers in sets.items():
        count = int(of[4:])
        if len(numbers) >= count:
            continue
        lost = next(number for number in itertools.count() if number not in numbers)
        name = f"{folder / before}{lost:0{len(next(iter(numbers.values())))}}{of}{files[0].suffix}"
        if Path(where).is_dir():
            raise ValueError(
                f"{name} is not there, and {where} holds {len(numbers)} of {count} files; copy the others, or give "
                f"those that are there by a glob, such as '{folder}/{before}*{of}*{files[0].suffix}'"
            )
        left_out.add("file of the same set", name, count - len(numbers))
    if not sets:
        _note_gaps(files, left_out)


def _note_gaps(files: Sequence[Path], left_out: LeftOut) -> None:
    """Count the numbers that are missing between those of the files."""
    sets: dict[tuple[Path, str, str, int], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*?)(\d+)(\.\D+)", file.name):
            sets.setdefault((file.parent, match[1], match[3], len(match[2])), set()).add(int(match[2]))
    for (folder, before, after, digits), numbers in sets.items():
        gaps = max(numbers) - min(numbers) + 1 - len(numbers)
        if 0 < gaps < len(numbers):  # of more, they are no running numbers
            lost = next(number for number in itertools.count(min(numbers)) if number not in numbers)
            left_out.add(
                "number of a shard that is not there", f"{folder / before}{lost:0{digits}}{after}", gaps
            )


def _refuse_same_file(files: Sequence[Path]) -> None:
    """Refuse two names of one file, as several snapshots in a hub's cache have."""
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(os.path.realpath(file), file)
        if other is not file:
            raise ValueError(
                f"{other} and {file} are the same file; remove one name, or give the folder of one"
            )


def expand_ranges(where: str) -> list[Path]:
    """List the paths that `{first..last}` stands for, both ends included, with as many digits as `first` has."""
    pieces = RANGE.split(where)  # text, first, last, text, first, last, ..., text
    if any(c in text for text in pieces[::3] for c in "{}"):
        raise ValueError(f"{where} has braces that are no range of numbers; write them as in {{0000..0146}}")
    choices = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if not 1 <= len(numbers) <= MOST_FILES:
            raise ValueError(
                f"{where}: the range {first}..{last} is empty or has more than {MOST_FILES:,} numbers"
            )
        choices.append([f"{number:0{len(first)}}" for number in numbers])
    if math.prod(map(len, choices)) > MOST_FILES:
        raise ValueError(f"{where} stands for more than {MOST_FILES:,} files")
    names = []
    for chosen in itertools.product(*choices):
        texts = itertools.zip_longest(pieces[::3], chosen, fillvalue="")
        names.append(Path("".join(text + number for text, number in texts)))
    return names
