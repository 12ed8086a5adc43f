"""Random numbers that depend only on (seed, epoch, index, stream).

So an image's augmentation does not depend on the batch, the rank or the worker it falls to.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), counted as

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (index low 32 bits, index high 32 bits, epoch, stream * 2^16 + block)

where index is the image's place in the epoch's order over all ranks, stream says what the number is for, and block
counts the groups of four 32-bit words drawn for it.

Shapes: B images; n numbers for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_SHIFT = np.uint64(32)


class Stream(IntEnum):
    """The purpose that a number is drawn for; two streams never share a counter."""

    CROP = 0
    FLIP = 1
    RAND_AUGMENT = 2
    ERASING = 3
    COLOR_JITTER = 4
    THREE_AUGMENT = 5
    MIXUP = 6
    INTERPOLATION = 7


def philox4x32(counter: Sequence[np.ndarray | np.uint64], key: tuple[int, int]) -> np.ndarray:
    """Run ten rounds of Philox4x32.

    Args:
        counter: four arrays of 32-bit values, broadcastable to one shape.
        key: two 32-bit values.

    Returns:
        Four 32-bit words for every counter, as uint32 with a last axis of 4.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    mask = np.uint64(_MASK)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0), product1 & mask
        c2, c3 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1), product0 & mask
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(seed: int, epoch: int, epoch_index: np.ndarray, stream: int, n: int) -> np.ndarray:
    """Draw (B, n) uint32 words for the images at `epoch_index`, (B,) integers from 0; n is at most 2^18."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must be from 0 to 2^64 - 1")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch={epoch} must be from 0 to 2^32 - 1")
    if (
        epoch_index.ndim != 1
        or epoch_index.dtype.kind not in "iu"
        or (epoch_index.size and epoch_index.min() < 0)
    ):
        raise ValueError(
            f"epoch_index must be one axis of integers from 0; got {epoch_index.dtype} {epoch_index.shape}"
        )
    epoch_index_B1 = epoch_index.astype(np.uint64)[:, None]
    blocks = -(-n // 4)
    counter = (
        epoch_index_B1 & np.uint64(_MASK),
        epoch_index_B1 >> _SHIFT,
        np.uint64(epoch),
        np.uint64(stream << 16) + np.arange(blocks, dtype=np.uint64),
    )
    words_BK4 = philox4x32(counter, (seed & _MASK, seed >> 32))
    return words_BK4.reshape(len(epoch_index), 4 * blocks)[:, :n]


def to_uniform(words_: np.ndarray) -> np.ndarray:
    """Map words to float64 in the open interval (0, 1): (word + 1/2) / 2^32."""
    return (words_ + 0.5) * 2.0**-32


def uniform(seed: int, epoch: int, epoch_index: np.ndarray, stream: int, n: int) -> np.ndarray:
    """Draw (B, n) float64 in the open interval (0, 1), one word for each number."""
    return to_uniform(words(seed, epoch, epoch_index, stream, n))


def box_muller(u1: np.ndarray, u2: np.ndarray) -> np.ndarray:
    """Compute standard normal numbers from two independent uniforms in (0, 1), elementwise."""
    return np.sqrt(-2.0 * np.log(u1)) * np.cos(2.0 * math.pi * u2)


def normal(seed: int, epoch: int, epoch_index: np.ndarray, stream: int, n: int) -> np.ndarray:
    """Draw (B, n) standard normal float64; number i is made of the uniforms 2i and 2i + 1."""
    u_BN2 = uniform(seed, epoch, epoch_index, stream, 2 * n).reshape(-1, n, 2)
    return box_muller(u_BN2[..., 0], u_BN2[..., 1])
