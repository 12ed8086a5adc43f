"""The checkpoints of one trial: written whole or not at all, and no more of them than are needed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

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

PREFIX = "checkpoint-"
CLONED = "clone.json"


class Shelf:
    """Checkpoint folders `checkpoint-STEP` below `folder`, a local path or a remote address."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def address(self, name: str) -> str:
        return storage.join(self.folder, name)

    def names(self) -> list[str]:
        """List the checkpoints, newest first."""
        found = (name for name in storage.folders(self.folder) if name.startswith(PREFIX))
        return sorted(found, reverse=True)

    def put(self, step: int, write: Callable[[Path], None]) -> str:
        """Keep what `write(folder)` writes as the checkpoint after `step`; returns its name."""
        name = f"{PREFIX}{step:09}"
        address = self.address(name)
        with storage.staging(address) as folder:
            write(folder)
            storage.delete_folder(
                address, first=MARKER
            )  # the trial goes on from before it, and makes it again
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

    def newest_whole(self, config: TrainConfig, clone: Mapping[str, Any] | None) -> str | None:
        """Find the newest checkpoint that is whole and of `config`; None: none.

        After a clone, only what came from it counts.
        """
        for name in self.names():
            with contextlib.suppress(DamagedError, OSError), self.opened(name) as folder:
                verify(folder)
                meta = read_metadata(folder)
                if differences(meta.config, config):
                    continue
                if clone is not None and meta.epochs_done <= clone["epoch"] and not _is_clone(folder, clone):
                    continue
                return name
        return None

    def clone(self, source: Shelf, config: TrainConfig, clone: Mapping[str, Any]) -> tuple[str, str]:
        """Take over the checkpoint of `source` after the clone's epoch, as one of `config`.

        Returns its name and the sha256 of its weights.

        Raises:
            DamagedError: the source has no whole checkpoint of that epoch.
        """
        for name in source.names():
            with source.opened(name) as folder:
                try:
                    verify(folder)
                    meta = read_metadata(folder)
                except DamagedError:
                    continue
                if meta.epochs_done != clone["epoch"] or meta.progress.step:
                    continue

                def write(target: Path, folder: Path = folder) -> None:
                    _rewrite(folder, target, config, clone)

                kept = self.put(meta.steps_done, write)
                files = json.loads((folder / "meta.json").read_text())["files"]
                return kept, str(files["model.safetensors"]["sha256"])
        raise DamagedError(f"{source.folder} has no whole checkpoint of epoch {clone['epoch']} to be cloned")


def _is_clone(folder: Path, clone: Mapping[str, Any]) -> bool:
    file = folder / CLONED
    return file.exists() and json.loads(file.read_text()) == {key: clone[key] for key in ("epoch", "source")}


def _rewrite(source: Path, target: Path, config: TrainConfig, clone: Mapping[str, Any]) -> None:
    """Copy a checkpoint under another config; the optimizer's weight decay is the new one."""
    for file in source.iterdir():
        if file.name not in ("meta.json", CLONED, "optimizer.pt"):
            shutil.copy(file, target)
    state = torch.load(source / "optimizer.pt", map_location="cpu", weights_only=True)
    # All of the optimizer's groups but the last are decayed; loading would bring the source's decay back.
    for group in state["param_groups"][:-1]:
        group["weight_decay"] = config.optim.weight_decay
    torch.save(state, target / "optimizer.pt")
    files = file_checksums(target)
    meta = replace(read_metadata(source), config=config)
    (target / CLONED).write_text(json.dumps({key: clone[key] for key in ("epoch", "source")}))
    (target / "meta.json").write_text(meta.to_json(files))
