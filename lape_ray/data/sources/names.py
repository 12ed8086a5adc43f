"""Readable names for the classes of a source, such as `tench` for `n01440764`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lape_ray.data.sources.base import Source
from lape_ray.storage import read_text


def named(source: Source, file: str) -> Source:
    """Give the same images the class names of a text file, which may lie on S3.

    Args:
        file: on each line a class as the source names it, a space or tab, and its new name, in any order; lines of
            other classes do not count. Or only names, one for each class in the order of labels, or of numbers where
            classes are whole numbers. A name that several classes have gets the source's behind it.

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
        names = _by_number(source.classes, lines, file)
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


def _by_number(classes: Sequence[str], names: list[str], file: str) -> list[str]:
    """Give the first name to the smallest number where all classes are whole numbers, which sort as 0, 1, 10, 2."""
    if not all(name.isdecimal() for name in classes):
        return names
    numbers = [int(name) for name in classes]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{file} has bare names, but two classes are the same number; write lines such as '{classes[0]} NAME'"
        )
    name_of = dict(zip(sorted(numbers), names, strict=True))
    return [name_of[number] for number in numbers]


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
