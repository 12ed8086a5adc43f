"""Readable names for the classes of a source, such as `tench` for `n01440764`; or the classes of another."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from lape_ray.data.sources.base import Source
from lape_ray.storage import read_text


def named(source: Source, file: str) -> Source:
    """Give the same images the class names of a text file, which may lie on S3.

    Args:
        file: on each line a class as the source names it, a space or tab, and its new name, in any order; lines of
            other classes do not count. Or only names, one for each class in the order of labels; of classes that are
            called by running numbers (folders 0, 1, 10, 2), in the order of these. A name that several
            classes have gets the source's behind it.

    Raises:
        ValueError: a class has no name or two, or the names are more or fewer than the classes; says which.
        OSError: the file cannot be read.
    """
    try:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except UnicodeError as error:
        raise ValueError(f"{file} cannot be read: {error}; save it as UTF-8") from error
    pairs = [line.partition("\t" if "\t" in line else " ")[::2] for line in lines]
    if {old for old, _ in pairs}.isdisjoint(source.classes):
        if len(lines) != len(source.classes):
            raise ValueError(
                f"{file} has {len(lines)} names, but {source.origin} has {len(source.classes)} classes; give a line "
                f"for each, in the order of labels, or lines such as '{source.classes[0]} NAME'"
            )
        names = _in_order(source, lines, file)
    else:
        names = _by_class(source, pairs, file)
    count = Counter(names)
    return replace(
        source,
        classes=tuple(
            name if count[name] == 1 else f"{name} ({old})"
            for old, name in zip(source.classes, names, strict=True)
        ),
    )


def _in_order(source: Source, lines: list[str], file: str) -> list[str]:
    """Give each class the line of its label, or of its number where all classes are called by numbers."""
    if not all(name.isdecimal() for name in source.classes):
        return lines
    numbers = [int(name) for name in source.classes]
    first = min(numbers)
    if sorted(numbers) != list(range(first, first + len(numbers))):
        raise ValueError(
            f"{file} has bare names, and the classes of {source.origin} are numbers with gaps or repeats, from "
            f"{first} to {max(numbers)}; give lines such as '{source.classes[0]} NAME'"
        )
    return [lines[number - first] for number in numbers]


def with_classes(source: Source, classes: tuple[str, ...], where: str) -> Source:
    """Give the same images the labels that their classes' names have in `classes`, which is from `where`.

    Raises:
        ValueError: a class of the source is not among them; names it.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    if len(label_of) < len(classes):
        raise ValueError(f"{where} has two classes of one name; write it again with other --class-names")
    used = np.unique(source.labels_N)
    if unknown := [source.classes[label] for label in used if source.classes[label] not in label_of]:
        raise ValueError(
            f"{source.origin} has class {unknown[0]!r}, which is none of the {len(classes)} of {where}, such as "
            f"{classes[0]!r}; take its images out, or give the same --class-names as there"
        )
    new = np.array([label_of.get(name, -1) for name in source.classes], np.int64)
    return replace(source, classes=classes, labels_N=new[source.labels_N])


def _by_class(source: Source, pairs: list[tuple[str, str]], file: str) -> list[str]:
    name_of: dict[str, str] = {}
    for old, name in pairs:
        if old in name_of:
            raise ValueError(f"{file} has two lines for class {old!r}; leave one of them")
        name_of[old] = name.strip()
    nameless = [old for old in source.classes if not name_of.get(old)]
    if nameless:
        raise ValueError(
            f"{file} has no name for {len(nameless)} of the {len(source.classes)} classes of {source.origin}, "
            f"such as {nameless[0]!r}; add lines such as '{nameless[0]} NAME'"
        )
    return [name_of[old] for old in source.classes]
