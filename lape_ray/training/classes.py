"""Match the classes of a checkpoint with those of data by their names, and never by their places alone.

Shapes: K classes of the data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from lape_ray.storage import local
from lape_ray.training.checkpoint import read_metadata
from lape_ray.values.program import program

log = logging.getLogger(__name__)


def checkpoint_classes(checkpoint: str | Path) -> tuple[str, ...] | None:
    """Read the names of a checkpoint's classes: ours has them, other code's may in timm's config.json next to it."""
    path = local(checkpoint)
    if path.is_dir():
        return read_metadata(path).classes
    names = timm_config(path).get("label_names")
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def timm_config(file: Path) -> dict[str, object]:
    """Read timm's config.json next to a file of weights; empty where there is none, or another tool's."""
    try:
        values = json.loads((file.parent / "config.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is left out: it cannot be read (%s)", file.parent / "config.json", error)
        return {}
    return values if isinstance(values, dict) and "pretrained_cfg" in values else {}


def places_of(data: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Return the place in `known` of each class of the data (K); None where one is not among them, or not alone."""
    if tuple(data) == tuple(known):
        return list(range(len(known)))
    place = {name: index for index, name in enumerate(known)}
    if len(place) != len(known) or len(set(data)) != len(data) or not place.keys() >= set(data):
        return None
    return [place[name] for name in data]


def match_classes(
    data: Sequence[str], known: Sequence[str] | None, *, of: str, path: str
) -> tuple[list[int] | None, str]:
    """Find the output of the checkpoint `of` for each class (K) of the data at `path`; None: they are as they stand.

    Returns also a line for people; empty: there is nothing to say. Where the checkpoint does not name its classes
    (`known` is None) they go by their place, and the line warns where the data's were sorted as text.

    Raises:
        ValueError: the data has a class that the checkpoint has not; names it.
    """
    if known is None:
        return None, text_order(data, of=of, path=path)
    places = places_of(data, known)
    if places is None:
        raise ValueError(f"{path} {other_classes(data, known, of)}")
    if places == list(range(len(known))):
        return None, ""
    count = f"{len(data)} of the {len(known)}" if len(data) < len(known) else f"{len(known)}"
    return (
        places,
        f"{path}: its classes are matched by name with {count} of {of}, which stand in another order",
    )


def other_classes(data: Sequence[str], known: Sequence[str], of: str) -> str:
    """Say which classes of the data a checkpoint has not, and what to do."""
    foreign = [name for name in data if name not in set(known)]
    what = (
        f"{len(foreign)} of its {len(data)} classes, such as {foreign[0]!r}, are not among the {len(known)} of"
        if foreign
        else "a name stands for several classes of it or of"
    )
    return (
        f"has other classes than {of}: {what} the checkpoint, such as {known[0]!r}; write the .beton from class "
        f"folders of the checkpoint's names, or with {program('write-data')} --class-names FILE, lines 'FOLDER NAME'"
    )


def text_order(data: Sequence[str], *, of: str, path: str) -> str:
    """Warn of classes that are whole numbers sorted as text: 0, 1, 10, 100, ..., 2; else return an empty text."""
    if not all(name.isdecimal() for name in data) or [*map(int, data)] == sorted(map(int, data)):
        return ""
    return (
        f"{path}: its classes are whole numbers sorted as text ({', '.join(data[:4])}, ...), and {of} does not name "
        "its classes: where its output K is the folder K, as for ImageNet-V2, each is taken for another; rename the "
        "folders so that they sort as numbers (0000, 0001, ...), and write the .beton again"
    )
