"""The manifest of a .beton: what the file holds and how it was made."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lape_ray.data.beton.blocks import Blocks
from lape_ray.values.program import program
from lape_ray.values.typed import Count, Sha256, from_json, typed

MANIFEST_VERSION = 2
Content = str | bytes
REPAIR = "copy it again, or write the .beton again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a .beton, or a set of shards; kept next to each file as <name>.beton.json.

    Attributes:
        version: of this description
        num_samples: images in the file
        classes: name of each label
        class_counts: images of each label
        width, height: smallest and largest, in pixels
        bytes, sha256: of the whole file; of a set, of its files' sha256
        tables_sha256: of the records and the allocation table
        stored: how many images are kept as `original_jpeg`, encoded as `jpeg`, or `raw` pixels
        odd: how many images had which unusual format: CMYK, grey, rotated by EXIF, ...
        skipped: [name, reason] of each sample that could not be stored
        left_out: what lay in the source and was not read, and how much of it; of a set, of the whole
        made: source, options, library versions and time
        blocks: their checksums, which lie in the file; None: it has none, or it is a set of files
    """

    version: int
    num_samples: Count
    classes: tuple[str, ...]
    class_counts: tuple[Count, ...]
    width: tuple[Count, Count]
    height: tuple[Count, Count]
    bytes: Count
    sha256: Sha256
    tables_sha256: Sha256
    stored: dict[str, Count]
    odd: dict[str, Count]
    skipped: tuple[tuple[str, str], ...]
    left_out: dict[str, Count]
    made: dict[str, Any]
    blocks: Blocks | None = None

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Load the manifest of the .beton at `path`; FileNotFoundError or ValueError if it is absent or not one."""
        file = manifest_path(path)
        try:
            text = file.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{file} is missing; copy it with its .beton, or make both from the existing .beton: "
                f"{program('write-data')} {shlex.quote(str(path))} NEW.beton"
            ) from None
        return cls.parse(text, file)

    @classmethod
    def parse(cls, text: Content, file: str | Path) -> Manifest:
        """Parse `text` as a manifest; a ValueError names `file` if it is none."""
        values = from_json(dict[str, Any], text, file, REPAIR)
        if values.get("version") != MANIFEST_VERSION:
            raise ValueError(f"{file} is not a manifest of version {MANIFEST_VERSION}; {REPAIR}")
        values = {
            "left_out": {},
            "blocks": None,
            **values,
        }  # files of before it was counted, or blocks hashed
        try:
            manifest: Manifest = typed(cls, values)
        except ValueError as error:
            raise ValueError(f"{file} is not a manifest: {error}; {REPAIR}") from None
        if not 0 < len(manifest.classes) == len(manifest.class_counts):
            raise ValueError(
                f"{file} is not a manifest: it has {len(manifest.classes)} classes, and counts the images of "
                f"{len(manifest.class_counts)}; {REPAIR}"
            )
        if manifest.blocks and manifest.blocks.table > manifest.bytes:
            raise ValueError(f"{file} is not a manifest: its blocks lie outside the file; {REPAIR}")
        return manifest

    @classmethod
    def of_set(cls, shards: Sequence[Manifest], path: str | Path) -> Manifest:
        """Join the manifests of all shards of the set `path`; ValueError if their classes differ."""
        first = shards[0]
        if len(shards) == 1:
            return first
        if any(shard.classes != first.classes for shard in shards):
            raise ValueError(f"the shards of {path} do not have the same classes; write the set again")

        def total(name: str) -> dict[str, int]:
            counts: Counter[str] = Counter()
            for shard in shards:
                counts.update(getattr(shard, name))
            return dict(sorted(counts.items()))

        def span(name: str) -> tuple[int, int]:
            return min(getattr(s, name)[0] for s in shards), max(getattr(s, name)[1] for s in shards)

        def together(name: str) -> str:
            return hashlib.sha256("".join(getattr(s, name) for s in shards).encode()).hexdigest()

        return cls(
            version=first.version,
            num_samples=sum(shard.num_samples for shard in shards),
            classes=first.classes,
            class_counts=tuple(sum(counts) for counts in zip(*(s.class_counts for s in shards), strict=True)),
            width=span("width"),
            height=span("height"),
            bytes=sum(shard.bytes for shard in shards),
            sha256=together("sha256"),
            tables_sha256=together("tables_sha256"),
            stored=total("stored"),
            odd=total("odd"),
            skipped=tuple(entry for shard in shards for entry in shard.skipped),
            left_out=first.left_out,
            made=first.made,
        )

    def save(self, path: str | Path) -> None:
        """Write it next to the .beton at `path`."""
        with appearing(manifest_path(path)) as file:
            file.write((json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    def summary(self, path: str | Path) -> str:
        """Describe the file at `path` in a few lines for people."""
        (low_w, high_w), (low_h, high_h) = self.width, self.height
        stored = ", ".join(f"{count:,} {kind}" for kind, count in self.stored.items())
        lines = [
            f"{path}: {self.num_samples:,} images of {len(self.classes)} classes, {self.bytes:,} bytes",
            f"  {low_w}..{high_w} pixels wide, {low_h}..{high_h} high; stored as {stored}",
            f"  {min(self.class_counts):,}..{max(self.class_counts):,} images a class",
        ]
        empty = [name for name, count in zip(self.classes, self.class_counts, strict=True) if not count]
        if empty:
            lines.append(f"  no images of {len(empty):,} of the classes, such as {empty[0]}")
        lines += [f"  {count:,} x {unusual}" for unusual, count in self.odd.items()]
        lines += [f"  left out: {count:,} x {what}" for what, count in self.left_out.items()]
        return "\n".join(lines + [f"  skipped: {reason}" for _, reason in self.skipped])


def manifest_path(path: str | Path) -> Path:
    """Return the path of the manifest of the .beton at `path`."""
    return Path(f"{path}.json")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[io.BufferedRandom]:
    """Open a file that gets the name `path` once it is written to the end and on the disk, and else leaves nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
