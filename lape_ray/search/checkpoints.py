"""The checkpoints of one trial: written whole or not at all, and no more of them than are needed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lape_ray import storage
from lape_ray.config import TrainConfig
from lape_ray.training.checkpoint import (
    MARKER,
    DamagedError,
    differences,
    file_checksums,
    read_metadata,
    verify,
)
from lape_ray.values.typed import from_json

PREFIX = "checkpoint-"
HISTORY = "history.json"
Lineage = tuple[tuple[int, int], ...]
"""Of each time that a trial was cloned: after which epoch, and from which trial."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An epoch of the trial: its metrics, its time, the optimizer steps up to its end, and the lineage it had then."""

    epoch: int
    metrics: Mapping[str, float]
    seconds: float
    steps_done: int
    lineage: Lineage


@dataclass(frozen=True, kw_only=True)
class History:
    """What lies beside the weights of every checkpoint of a trial: all epochs up to it, and what it was cloned from.

    Attributes:
        lineage: of the weights of the checkpoint that holds it
        loaded: of each clone the epoch, the source, and the sha256 of the weights
    """

    lineage: Lineage = ()
    epochs: tuple[Trained, ...] = ()
    loaded: tuple[Mapping[str, Any], ...] = field(default=())

    def of(self, lineage: Lineage) -> History:
        """Return the part that a trial of this lineage has in common with it."""

        def shared(one: Trained) -> bool:
            return one.lineage == tuple(clone for clone in lineage if clone[0] < one.epoch)

        count = next((n for n, one in enumerate(self.epochs) if not shared(one)), len(self.epochs))
        loaded = [one for one in self.loaded if (one["epoch"], one["source"]) in lineage]
        return History(lineage=lineage, epochs=self.epochs[:count], loaded=tuple(loaded))


class TrialFolder:
    """Checkpoint folders `checkpoint-STEP` below `folder`, a local path or a remote address."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def address(self, name: str) -> str:
        return storage.join(self.folder, name)

    def names(self) -> list[str]:
        """List the checkpoints, newest first."""
        found = (name for name in storage.folders(self.folder) if name.startswith(PREFIX))
        return sorted(found, reverse=True)

    def put(self, steps_done: int, write: Callable[[Path], None], history: History) -> str:
        """Keep what `write(folder)` writes as the checkpoint after `steps_done`; returns its name."""
        name = name_of(steps_done)
        address = self.address(name)
        with storage.staging(address) as folder:
            (folder / HISTORY).write_text(json.dumps(asdict(history)))
            write(folder)
            # Where one exists the trial goes on from before it, and makes it again.
            storage.delete_folder(address, first=MARKER)
            storage.publish(folder, address, last=MARKER)
        return name

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """Open a checkpoint as a local folder."""
        with storage.opened(self.address(name)) as folder:
            yield folder

    def drop_all_but(self, names: set[str]) -> None:
        for name in self.names():
            if name not in names:
                storage.delete_folder(self.address(name), first=MARKER)

    def newest(self, config: TrainConfig, lineage: Lineage) -> tuple[str | None, History]:
        """Find the newest whole checkpoint of this config and lineage, and what is known of the epochs so far.

        The name is None where there is no such checkpoint; epochs may be known from those of a longer lineage.
        """
        known = History(lineage=lineage)
        for name in self.names():
            with contextlib.suppress(DamagedError, OSError), self.opened(name) as folder:
                verify(folder)
                history = read_history(folder)
                if not known.epochs:
                    known = history.of(lineage)
                if history.lineage == lineage and not differences(read_metadata(folder).config, config):
                    return name, known
        return None, known

    def clone(self, source: TrialFolder, config: TrainConfig, history: History) -> tuple[str, History]:
        """Take over the checkpoint of `source` after the epoch of the last clone in `history`, as one of `config`.

        Returns its name, and the history with the sha256 of its weights.

        Raises:
            DamagedError: the source has no whole checkpoint of that epoch.
        """
        epoch, number = history.lineage[-1]
        for name in source.names():
            with source.opened(name) as folder:
                try:
                    verify(folder)
                    meta = read_metadata(folder)
                except DamagedError:
                    continue
                if meta.epochs_done != epoch or meta.progress.step:
                    continue
                files = json.loads((folder / MARKER).read_text())["files"]
                loaded = {"epoch": epoch, "source": number, "weights": files["model.safetensors"]["sha256"]}
                history = replace(history, loaded=(*history.loaded, loaded))

                def write(target: Path, folder: Path = folder) -> None:
                    _rewrite(folder, target, config)

                return self.put(meta.steps_done, write, history), history
        raise DamagedError(f"{source.folder} has no whole checkpoint of epoch {epoch} to be cloned")


def name_of(steps_done: int) -> str:
    return f"{PREFIX}{steps_done:09}"


def read_history(folder: Path) -> History:
    """Read what lies beside a checkpoint; a DamagedError says why it cannot be."""
    try:
        return from_json(
            History, (folder / HISTORY).read_text(), str(folder / HISTORY), "use another checkpoint"
        )
    except (OSError, ValueError) as error:
        raise DamagedError(str(error)) from None


def best_of(epochs: Sequence[Trained], metric: str, sign: int) -> str | None:
    """Return the name of the checkpoint of the best epoch, of equals the last; None where the metric is in none."""
    scores = [(sign * one.metrics[metric], one) for one in epochs if metric in one.metrics]
    scores = [(score, one) for score, one in scores if score == score]
    return name_of(max(scores, key=lambda pair: (pair[0], pair[1].epoch))[1].steps_done) if scores else None


def _rewrite(source: Path, target: Path, config: TrainConfig) -> None:
    """Copy a checkpoint under another config, whose learning rate and weight decay the optimizer then has."""
    for file in source.iterdir():
        if file.name not in (MARKER, HISTORY):
            shutil.copy(file, target)
    files = file_checksums(target)
    meta = replace(read_metadata(source), config=config)
    (target / MARKER).write_text(meta.to_json(files))
