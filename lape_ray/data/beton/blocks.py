"""Checksums of a .beton's blocks, by which a part of the file is verified before the rest of it is there.

Between the last image and the allocation table lie the sha256 of each block of the bytes before them; FFCV does not
look there. The manifest holds the sha256 of these.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from lape_ray.values.typed import Count, Sha256

SMALLEST_BLOCK, MOST_BLOCKS = 16 << 10, 1 << 20
DIGEST_BYTES = 32


class Digest(Protocol):
    """A running checksum of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a file as its manifest describes them.

    Attributes:
        bytes: of a block; the last may be shorter
        end: where the last one ends, and their checksums begin
        sha256: of the checksums
    """

    bytes: Count
    end: Count
    sha256: Sha256

    def __post_init__(self) -> None:
        if self.bytes < SMALLEST_BLOCK or not self.end:
            raise ValueError(f"blocks of {self.bytes} bytes up to {self.end} are none")

    @property
    def count(self) -> int:
        return -(-self.end // self.bytes)

    @property
    def table(self) -> int:
        """The place behind the checksums, where the allocation table begins."""
        return self.end + self.count * DIGEST_BYTES


def block_bytes(end: int) -> int:
    """Choose the size of a block: about an image's, as images are fetched one by one, in random order."""
    size = SMALLEST_BLOCK
    while -(-end // size) > MOST_BLOCKS:
        size *= 2
    return size


def hash_blocks(file: BinaryIO, end: int, size: int) -> tuple[bytes, Digest]:
    """Hash the blocks of a file up to `end`; returns their sha256 one after the other, and the running one of all."""
    file.seek(0)
    digests, whole = [], hashlib.sha256()
    for start in range(0, end, size):
        block = file.read(min(size, end - start))
        digests.append(hashlib.sha256(block).digest())
        whole.update(block)
    return b"".join(digests), whole
