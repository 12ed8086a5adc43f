"""The checkpoints of one trial: written whole or not at all, and no more of them than are needed."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lape_ray import storage
from lape_ray.config import TrainConfig
from lape_ray.search.record import Epoch, Lineage
from lape_ray.training import checkpoint
from lape_ray.training.checkpoint import MARKER, DamagedError
from lape_ray.values.typed import from_json

PREFIX = "checkpoint-"
HISTORY = "history.json"


@dataclass(frozen=True, kw_only=True)
class History:
    """Record what lies beside the weights of a checkpoint of a trial: all epochs up to it, and what it was cloned from.

    Attributes:
        lineage: of the weights of the checkpoint that holds it
        loaded: of each clone the epoch, the source, and the sha256 of the weights
    """

    lineage: Lineage = ()
    epochs: tuple[Epoch, ...] = ()
    loaded: tuple[Mapping[str, Any], ...] = ()

    def of(self, lineage: Lineage) -> History:
        """Return the part that a trial of this lineage has in common with it."""
        parted = min((epoch for epoch, _ in {*self.lineage} ^ {*lineage}), default=math.inf)
        epochs = tuple(one for one in self.epochs if one.epoch <= parted)
        loaded = tuple(one for one in self.loaded if (one["epoch"], one["source"]) in lineage)
        return History(lineage=lineage, epochs=epochs, loaded=loaded)


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

    def opened(self, name: str) -> AbstractContextManager[Path]:
        """Open a checkpoint as a local folder."""
        return storage.opened(self.address(name))

    def drop_all_but(self, names: set[str]) -> None:
        for name in {*self.names()} - names:
            storage.delete_folder(self.address(name), first=MARKER)

    def _whole(self) -> Iterator[tuple[str, Path, checkpoint.Metadata]]:
        """Yield the name, a local copy and the facts of each whole checkpoint, newest first."""
        for name in self.names():
            with contextlib.suppress(*checkpoint.DAMAGE), self.opened(name) as folder:
                checkpoint.verify(folder)
                yield name, folder, checkpoint.read_metadata(folder)

    def newest(self, config: TrainConfig, lineage: Lineage) -> tuple[str | None, History]:
        """Find the newest whole checkpoint of this config and lineage, and what is known of the epochs so far.

        The name is None where there is no such checkpoint; epochs may be known from those of a longer lineage.
        """
        known = History(lineage=lineage)
        for name, folder, meta in self._whole():
            with contextlib.suppress(DamagedError):
                history = read_history(folder)
                if not known.epochs:
                    known = history.of(lineage)
                if history.lineage == lineage and not checkpoint.differences(meta.config, config):
                    return name, known
        return None, known

    def clone(self, source: TrialFolder, config: TrainConfig, history: History) -> tuple[str, History]:
        """Take over the checkpoint of `source` after the epoch of the last clone in `history`, as one of `config`.

        Returns its name, and the history with the sha256 of its weights.

        Raises:
            DamagedError: the source has no whole checkpoint of that epoch.
        """
        epoch, number = history.lineage[-1]
        for _, folder, meta in source._whole():
            if meta.epochs_done == epoch and not meta.progress.step:
                loaded = {"epoch": epoch, "source": number, "weights": checkpoint.weights_sha256(folder)}
                history = replace(history, loaded=(*history.loaded, loaded))
                return self.put(meta.steps_done, partial(_rewrite, folder, config), history), history
        raise DamagedError(f"{source.folder} has no whole checkpoint of epoch {epoch} to be cloned")


def name_of(steps_done: int) -> str:
    return f"{PREFIX}{steps_done:09}"


def read_history(folder: Path) -> History:
    """Read what lies beside a checkpoint; a DamagedError says why it cannot be."""
    file = folder / HISTORY
    try:
        return from_json(History, file.read_text(), file, "use another checkpoint")
    except (FileNotFoundError, ValueError) as error:
        raise DamagedError(str(error)) from None


def _rewrite(source: Path, config: TrainConfig, target: Path) -> None:
    """Copy a checkpoint under another config, whose learning rate and weight decay the optimizer then has."""
    for file in source.iterdir():
        if file.name not in (MARKER, HISTORY):
            shutil.copy(file, target)
    meta = replace(checkpoint.read_metadata(source), config=config)
    (target / MARKER).write_text(meta.to_json(checkpoint.file_checksums(target)))
