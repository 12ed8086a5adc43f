"""A reporter of the training loop that keeps what it hears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lape_ray.training.checkpoint import Snapshot
from lape_ray.training.flags import Flags


class KilledError(Exception):
    pass


class Recorder:
    """A reporter that keeps everything; checkpoints go to `folder` if there is one."""

    def __init__(
        self,
        folder: Path | None = None,
        stop_at: int | None = None,
        leaves: bool = False,
        told_at: int | None = None,
    ) -> None:
        self.folder, self.losses, self.epochs, self.lines = folder, [], [], []  # type: ignore[var-annotated]
        self.stop_at, self.leaves, self.told_at, self.asked = stop_at, leaves, told_at, 0

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        self.losses.append(metrics["train/loss"])

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        self.epochs.append({k: v for k, v in metrics.items() if "per_s" not in k})
        if self.folder is not None:
            self._keep(self.folder / f"{metrics['epoch']:.0f}", snapshot)

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        if self.folder is not None:
            self._keep(self.folder / f"step-{step}", snapshot)
        if step == self.stop_at:
            raise KilledError

    def _keep(self, folder: Path, snapshot: Callable[[], Snapshot]) -> None:
        folder.mkdir(parents=True)
        snapshot().save(folder)

    def checkpoint_stored(self) -> None: ...

    def wait_until_saved(self) -> None: ...

    def node_leaving(self) -> bool:
        return self.leaves

    def poll_flags(self) -> Flags:
        self.asked += 1
        return Flags.STOP if self.asked == self.told_at else Flags.NONE

    def line(self, text: str) -> None:
        self.lines.append(text)
