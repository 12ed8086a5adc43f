"""What `loader` measures. Needs no torch, so that bad input is refused at once."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from lape_ray.bench.inputs import ORIGINAL, RAW, SMALL_JPEG


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; the command line sets the first few.

    Attributes:
        images: a source (see `open_source`), or None for drawn images
        side: of the crops, in pixels
        count: images that are taken of the source
        batches: of an epoch with up to two threads, for each input; more threads get as many more
        inputs: of the whole loaders
        memory_epochs: epochs, and early exits, over which memory must stay flat
        start_rounds: fresh processes that are started
        training: whether training steps are fed, and `round_s`, for how long in a round
        shrink: scales the sides of drawn images
    """

    images: str | None = None
    split: str | None = None
    side: int = 224
    rounds: int = 3
    threads: int = dataclasses.field(default_factory=lambda: min(16, len(os.sched_getaffinity(0))))
    device: str = "cpu"
    count: int = 200
    batch_size: int = 256
    batches: int = 8
    inputs: tuple[str, ...] = (SMALL_JPEG, ORIGINAL, RAW)
    memory_epochs: int = 50
    start_rounds: int = 1
    training: bool = False
    round_s: float = 3.0
    shrink: float = 1.0

    def __post_init__(self) -> None:
        for name in ("side", "rounds", "threads", "count", "batch_size", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")

    def quick(self) -> Settings:
        """The same sections in seconds, for tests: its times mean nothing."""
        return dataclasses.replace(
            self, side=min(self.side, 64), rounds=1, count=12, batch_size=32, batches=3, inputs=(SMALL_JPEG,),
            memory_epochs=3, start_rounds=1, round_s=0.2, shrink=0.5,
        )  # fmt: skip
