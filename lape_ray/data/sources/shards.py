"""The common part of sources in numbered files: which files exist, and that a part carries only its own.

Shape suffix: N samples.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lape_ray.data.sources.base import Source

MOST_FILES = 10**6
MOST_CLASSES = 10**6
# Compressed ones too: that they must be unpacked is better said than that there are no class folders.
TAR_NAME = re.compile(r"\.(tar|tar\.\w+|t[gbx]z|tzst)$")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, eq=False)
class Shards(Source):
    """Samples in several files; items are a structured array whose field `shard` is an index into `files`."""

    files: tuple[str, ...]

    def take(self, indices: np.ndarray | slice, origin: str | None = None) -> Source:
        """Take samples as from any source; files that the part does not use are dropped, so that it pickles small."""
        items_N = self.items_N[indices]
        used, shard_N = np.unique(items_N["shard"], return_inverse=True)
        if len(items_N):  # an empty part is refused below, with the source's own words
            items_N = items_N.copy()
            items_N["shard"] = shard_N
        return replace(
            self,
            origin=origin or self.origin,
            labels_N=self.labels_N[indices],
            items_N=items_N,
            files=tuple(self.files[shard] for shard in used),
        )


def kind_of_shards(where: str) -> Literal["parquet", "tar"] | None:
    """Tell which kind of shards `where` names, or which a folder has anywhere below it; parquet before tar."""
    if where.endswith(".parquet"):
        return "parquet"
    if TAR_NAME.search(where):
        return "tar"
    found: Literal["tar"] | None = None
    for _, _, files in os.walk(where):
        if any(file.endswith(".parquet") for file in files):
            return "parquet"
        if any(TAR_NAME.search(file) for file in files):
            found = "tar"
    return found


def find_shards(where: str, split: str | None, suffix: str) -> tuple[str, ...]:
    """Find the files that `where` names, sorted.

    Args:
        where: a file, a folder (searched with all below it), a glob, or names with ranges in braces, such as
            `train-{0000..0146}.tar`, each of which must exist.
        split: which files: those whose name begins with it, before `-` or `_` and a number, or, in a folder, that
            lie in a folder of that name. None: all, if they are of one split.
        suffix: such as `.parquet`.

    Raises:
        ValueError: a file does not exist, or the split must be chosen; says which exist.
    """
    path = Path(where)
    if path.is_dir():
        found = sorted(path.rglob(f"*{suffix}"))
    elif "{" in where and not path.exists():
        found = expand_ranges(where)
    elif any(c in where for c in "*?[") and not path.exists():
        found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    else:
        found = [path]
    missing = [file for file in found if not file.is_file()]
    if missing or not found:
        others = f" ({len(missing)} of {len(found)} are missing)" if len(found) > 1 else ""
        raise ValueError(
            f"{missing[0] if missing else where} is not there{others}; no {suffix[1:]} shards to read"
        )
    by_split: dict[str, list[str]] = {}
    for file in found:
        numbered = re.match(r"(.+?)[-_]\d", file.stem)
        names_split = numbered[1] if numbered else file.stem
        nested = path.is_dir() and file.parent != path
        by_split.setdefault(file.parent.name if nested else names_split, []).append(str(file))
    if split is None and len(by_split) == 1:
        return tuple(next(iter(by_split.values())))
    if split in by_split:
        return tuple(by_split[split])
    wanted = f"no split {split!r}" if split else "several splits"
    raise ValueError(f"{where} holds {wanted}; choose one of {', '.join(sorted(by_split))}")


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


def numbered_classes(labels_N: np.ndarray, where: str) -> tuple[str, ...]:
    """Name classes that have no names: the labels from 0 to the largest; ValueError if that is no class."""
    largest = int(labels_N.max(initial=-1))
    if largest >= MOST_CLASSES:
        raise ValueError(
            f"{where} has a label of {largest}, and no class names; labels number the classes from 0, up to "
            f"{MOST_CLASSES:,}"
        )
    return tuple(str(label) for label in range(largest + 1))
