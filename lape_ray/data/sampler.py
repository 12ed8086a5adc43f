"""Orders in which samples are trained on: functions of the seed and the epoch, whatever the number of ranks.

Shape suffixes: N samples of a pass, S steps, M micro-batches of a step, B samples of a batch.
"""

from __future__ import annotations

import numpy as np

_INDEX_MASK = 0xFFFFFFFF  # of a key: the sample's index
ORDER_STREAM = 1  # first word of the seed, which keeps these draws apart from mixup's


def train_keys(num_samples: int, *, step_samples: int, seed: int, epoch: int, repeats: int = 1) -> np.ndarray:
    """Draw the keys (N,) of a training epoch over all ranks, in a random order.

    N is the largest multiple of `step_samples`. With `repeats` above 1 each sample stands that often in a row and the
    epoch keeps its length, so that neighbours, which go to different ranks, are differently augmented copies (repeated
    augmentation, arXiv 1901.09335).

    A key is a sample's index in its low 32 bits and the seed of its augmentation above (int64). The samples
    that are left over differ from epoch to epoch.
    """
    if num_samples < step_samples:
        raise ValueError(
            f"the training set has {num_samples} images, fewer than the {step_samples} of one optimizer step; "
            f"set data.batch_size to {num_samples} or less"
        )
    rng = np.random.default_rng((ORDER_STREAM, seed, epoch))
    index_N = rng.permutation(num_samples).repeat(repeats)[: num_samples // step_samples * step_samples]
    return index_N | (rng.integers(2**31, size=len(index_N)) << 32)


def sample_index(keys_N: np.ndarray) -> np.ndarray:
    """Return the samples' indices in the split that the keys stand for (int64)."""
    return keys_N & _INDEX_MASK


def rank_part(keys_N: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Take the part that one rank reads. The union over the ranks is `keys_N`, each key once."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not from 0 to world_size - 1 = {world_size - 1}")
    return keys_N[rank::world_size]


def train_epoch_index(
    size: int, *, batch_size: int, micro_batches: int, rank: int, world_size: int
) -> np.ndarray:
    """Compute the epoch indices (N,), of `size` samples, that one rank trains on, in its order.

    Micro-batch m of a step holds every M-th of its samples, from the m-th on; rank r has the micro-batches r,
    r + world_size and so on of every step, which can be one more than others have.
    """
    if not 0 <= rank < world_size <= micro_batches:
        raise ValueError(
            f"rank={rank} of {world_size} has no part in the {micro_batches} micro-batches of a step"
        )
    epoch_index_SBM = np.arange(size).reshape(-1, batch_size, micro_batches)
    return epoch_index_SBM.transpose(0, 2, 1)[:, rank::world_size].reshape(-1)
