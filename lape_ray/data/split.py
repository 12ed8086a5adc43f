"""Describe a split before any of its images is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lape_ray.config import DataConfig
from lape_ray.data.beton import check_beton
from lape_ray.data.remote import remote_manifest
from lape_ray.data.sources import Source, open_source
from lape_ray.storage import is_remote
from lape_ray.values.program import program


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The description of a split.

    Attributes:
        path: as the config has it
        num_samples: images, over all ranks
        classes: name of each label
        largest_side: of any image, in pixels; None: not known without reading them
        sha256: of the file, or of a set of files; None: a source has none
        source: the source, open; None: the split is read as a .beton
    """

    path: str
    num_samples: int
    classes: tuple[str, ...]
    largest_side: int | None
    sha256: str | None
    source: Source | None = field(default=None, repr=False, compare=False)


def split_path(data: DataConfig, split: Literal["train", "val"]) -> str:
    """Return the path of the split; ValueError if the config does not say."""
    path = data.train if split == "train" else data.val
    if not path:
        raise ValueError(
            f"no {split} data: data.{split} is empty; give --data.{split} FILE.beton "
            f"({program('write-data')} makes one)"
        )
    return path


def read_split_info(data: DataConfig, split: Literal["train", "val"]) -> SplitInfo:
    """Read a split's description from manifests with which its files agree; files on S3 are not fetched for it.

    Raises:
        FileNotFoundError, ValueError: the data is missing or damaged; says what and how to mend it.
    """
    path = split_path(data, split)
    if _reads_source(data, path):
        source = open_source(path)
        return SplitInfo(
            path=path,
            num_samples=len(source),
            classes=source.classes,
            largest_side=None,
            sha256=None,
            source=source,
        )
    manifest = remote_manifest(path) if is_remote(path) else check_beton(path)
    return SplitInfo(
        path=path,
        num_samples=manifest.num_samples,
        classes=manifest.classes,
        largest_side=max(manifest.width[1], manifest.height[1]),
        sha256=manifest.sha256,
    )


def _reads_source(data: DataConfig, path: str) -> bool:
    """Tell whether the split is read as a source, image files and all, and not as a .beton."""
    return data.backend == "torchvision" and not path.endswith(".beton") and not is_remote(path)
