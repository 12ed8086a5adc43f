"""Convert a source to a .beton, or verify one: the steps behind jobs/write_beton.py."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lape_ray.data.beton.check import check_beton
from lape_ray.data.beton.format import set_files
from lape_ray.data.beton.manifest import Manifest, manifest_path
from lape_ray.data.beton.writer import PART_SAMPLES, write_beton
from lape_ray.data.processes import Mapper
from lape_ray.data.remote import local_split, written_beton
from lape_ray.data.sources import named, open_source, select


def convert(
    source: str,
    path: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    class_names: str | None = None,
    mapper: Callable[[], AbstractContextManager[Mapper]] | None = None,
    **options: Any,
) -> str:
    """Write the source of that name to `path`, which may be an s3:// address, and show the progress on stderr.

    Args:
        split: see `open_source`.
        subset: see `select`.
        class_names: file of readable names; see `named`.
        mapper: opens the mapper that encodes; None: this machine's processes.
        options: of `write_beton`.

    Returns:
        The manifest in words, and the name of its file.

    Raises:
        ValueError, OSError: see `open_source` and `write_beton`.
    """
    images = select(open_source(source, split), subset)
    if class_names is not None:
        images = named(images, class_names)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(written_beton(str(path)))
        progress = stack.enter_context(progress_bar())
        encoder = None if mapper is None else stack.enter_context(mapper())
        manifest = write_beton(images, file, progress=progress, mapper=encoder, **options)
        files = set_files(file)
    return _summary(manifest, str(path), files, "manifest")


def verify(path: str, *, workers: int | None = None) -> str:
    """Check the .beton or set at `path`, its images too; returns its manifest in words.

    Raises:
        ValueError, OSError: it is not what its manifest says; see `check_beton`.
    """
    file = local_split(path)
    manifest = check_beton(file, deep=True, workers=workers)
    return _summary(manifest, path, set_files(file), "agrees with")


def _summary(manifest: Manifest, path: str, files: tuple[Path, ...], relation: str) -> str:
    first, *more = [manifest_path(file).name for file in files]
    others = f" and {len(more)} more" if more else ""
    return f"{manifest.summary(path)}\n  {relation} {path.rpartition('/')[0] or '.'}/{first}{others}"


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the remaining time; where the output is no terminal, a line now and then."""
    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bars:
            earlier = done if done > PART_SAMPLES else 0  # more than one part: what an earlier command left
            if earlier:
                print(f"continuing after {earlier:,} of {total:,} images", file=sys.stderr)
            wait = 0.2 if sys.stderr.isatty() else 30
            bars.append(
                tqdm(
                    total=total,
                    initial=earlier,
                    unit=" images",
                    mininterval=wait,
                    delay=wait,
                    smoothing=0.05,
                )
            )
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()
