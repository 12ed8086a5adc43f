"""The labels of ImageNet's validation images as Kaggle has them: all in one folder, with a table some folders above."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path, PurePath

from lape_ray.data.sources.listing import shown

TABLE = "LOC_val_solution.csv"  # ImageId,PredictionString: ILSVRC2012_val_00048981,n03995372 85 1 499 272
CLASSES = "LOC_synset_mapping.txt"  # n01440764 tench, Tinca tinca
LEVELS = 5  # from ILSVRC/Data/CLS-LOC/val up to the table, and one more


def kaggle_labels(folder: Path, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]] | None:
    """Look up the labels of the images `names` of `folder`; returns classes and labels; None: no table has any.

    Raises:
        ValueError: the table lacks an image, lists one that is not there, or names an unknown class.
    """
    above = [folder, *folder.resolve().parents][:LEVELS]
    table = next((place / TABLE for place in above if (place / TABLE).is_file()), None)
    if table is None:
        return None
    class_of, classes = _read(table)
    stems = [PurePath(name).stem for name in names]
    if class_of.keys().isdisjoint(stems):  # the test images, which have no labels
        return None
    if extra := [name for name, stem in zip(names, stems, strict=True) if stem not in class_of]:
        raise ValueError(f"{table} has no label for {shown(folder / extra[0])}; move that file away")
    if lost := sorted(class_of.keys() - set(stems)):
        raise ValueError(
            f"{table} lists {lost[0]}, which is not in {shown(folder)} ({len(lost)} of {len(class_of)} are not); "
            "copy the images again"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    if unknown := [stem for stem in stems if class_of[stem] not in label_of]:
        raise ValueError(
            f"{table} gives {unknown[0]} class {class_of[unknown[0]]!r}, which {CLASSES} does not have; copy both again"
        )
    return classes, [label_of[class_of[stem]] for stem in stems]


def _read(table: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Read the class of each image, and all classes, sorted."""
    mapping = table.with_name(CLASSES)
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row][1:]
        class_of = {row[0]: row[1].split()[0] for row in rows}
        lines = mapping.read_text(encoding="utf-8").splitlines() if mapping.is_file() else ()
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise ValueError(f"{table} or {CLASSES} beside it cannot be read: {error}; copy it again") from error
    return class_of, tuple(
        sorted({line.split()[0] for line in lines if line.strip()} or set(class_of.values()))
    )
