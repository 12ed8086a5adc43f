"""Parts of a source that are the same each time.

Shape suffix: N samples.
"""

from __future__ import annotations

import numpy as np

from lape_ray.data.sources.base import Source

SPLIT_SEED = 0


def select(source: Source, subset: str | None) -> Source:
    """Select a part of a source, in the source's order; the same part each time.

    Args:
        subset: `per-class:N` the first N of every class; `holdout:N` a random draw of N that has the classes'
            proportions; `rest:N` what `holdout:N` leaves; several with commas between: each of what the one before
            it gives; None all.
    """
    if subset is not None:
        for part in subset.split(","):
            source = _select(source, part)
    return source


def _select(source: Source, subset: str) -> Source:
    kind, _, digits_of_count = subset.partition(":")
    kinds = ("per-class", "holdout", "rest")
    if kind not in kinds or not digits_of_count.isdecimal() or int(digits_of_count) < 1:
        raise ValueError(
            f"subset {subset!r} is not known; write one of {', '.join(f'{k}:N' for k in kinds)} with N >= 1"
        )
    count = int(digits_of_count)
    if kind == "per-class":
        chosen_N = _rank_in_class(source.labels_N) < count
    elif count >= len(source):
        raise ValueError(
            f"subset {subset!r} asks for {count} or more of the {len(source)} samples of {source.origin}"
        )
    else:
        chosen_N = np.zeros(len(source), bool)
        chosen_N[_stratified_order(source.labels_N)[:count]] = True
        chosen_N ^= kind == "rest"
    return source.take(np.flatnonzero(chosen_N), origin=f"{source.origin} [{subset}]")


def _rank_in_class(labels_N: np.ndarray) -> np.ndarray:
    """Count for each sample how many of its class come before it."""
    order_N = np.argsort(labels_N, kind="stable")
    counts = np.bincount(labels_N)
    rank_N = np.empty(len(labels_N), np.int64)
    rank_N[order_N] = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank_N


def _stratified_order(labels_N: np.ndarray) -> np.ndarray:
    """Draw a random order whose every prefix holds the classes in nearly their proportions."""
    rng = np.random.default_rng(SPLIT_SEED)
    shuffled_N = rng.permutation(len(labels_N))
    mixed_N = labels_N[shuffled_N]
    counts = np.bincount(labels_N)
    # A class of c samples is spread evenly over [0, 1) at steps of 1/c, from its class's random start.
    spread_N = (_rank_in_class(mixed_N) + rng.random(len(counts))[mixed_N]) / counts[mixed_N]
    return shuffled_N[np.argsort(spread_N, kind="stable")]
