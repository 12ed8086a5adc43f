"""The split that a file or folder belongs to, by the words in its name."""

from __future__ import annotations

import re
from collections.abc import Collection

WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(WORDS, key=len, reverse=True))})(?![a-z])")
JOINS = ("-", "_", "+", ".", "")
MOST_NAMES = 8  # are listed in an error


def split_word(name: str) -> str | None:
    """Return the split word in a name, the last if there are more; None: it has none.

    Two different words side by side are one split: `train_val-0000` is of `train_val`. Letters on either side make a
    word another one (`latest`, `trainer`), digits do not (`train2017`), nor does a change of case (`cifarTrain`).
    """
    lower = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
    found = list(WORD.finditer(lower))
    if not found:
        return None
    word = found[-1][1]
    for before, after in zip(found[-2::-1], found[:0:-1], strict=False):
        if lower[before.end() : after.start()] not in JOINS or WORDS[before[1]] == WORDS[after[1]]:
            break
        word = f"{before[1]}_{word}"
    return word


def is_split_word(name: str) -> bool:
    """Tell whether a name is a split word and nothing else, but for digits behind it: `val`, `train2017`."""
    return re.sub(r"[-_]?\d+$", "", name).lower() in WORDS


def choose_split(known: Collection[str], split: str | None, where: str) -> str:
    """Choose the split of that name, or of the same meaning (`val` finds `validation`); None: the only one.

    Raises:
        ValueError: there are several or none; lists them.
    """
    names = sorted(known)
    listed = ", ".join(names[:MOST_NAMES]) + (f", ... ({len(names)})" if len(names) > MOST_NAMES else "")
    if split is None:
        fits = names
    else:
        asked = split.lower()
        fits = [name for name in names if name == split] or [name for name in names if name.lower() == asked]
        fits = fits or [name for name in names if _meaning(name) == _meaning(asked)]
    if len(fits) == 1:
        return fits[0]
    if split is None or fits:
        listed = ", ".join(fits) if split else listed
        raise ValueError(
            f"{where} holds several splits; choose one of {listed} with --split, or give its files alone"
        )
    alone = ", or leave --split out" if len(names) == 1 else " with --split"
    raise ValueError(f"{where} holds no split {split!r}; choose one of {listed}{alone}")


def _meaning(name: str) -> str:
    word = split_word(name)
    return WORDS.get(word or "", word or name.lower())
