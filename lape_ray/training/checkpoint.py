"""The checkpoint of a run, written and read, and weights of any origin, read. Pure torch: no Ray, no tracker.

A checkpoint is a folder:
    model.safetensors      the weights
    ema.safetensors        their moving average, where the run keeps one
    optimizer.pt           the optimizer's state
    meta.json              epoch, step, metrics, config, config hash, names of classes, world size, MLflow run, format
                           version, and the size and sha256 of every other file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lape_ray.config import TrainConfig, config_hash, from_dict, to_dict, what_is_learned
from lape_ray.storage import local, safe_relative
from lape_ray.training.host_copies import HostCopies
from lape_ray.training.weight_files import RESTORE, DamagedError, read_weight_file
from lape_ray.values.typed import Count, from_json, typed

FORMAT = 4
MARKER = "meta.json"
"""The file that is written last, so that a folder which holds it is whole."""
DAMAGE = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What a torn, changed or partly deleted checkpoint raises; other errors are of where it lies, and may pass."""
FOREIGN = ("model.safetensors", "*.safetensors", "pytorch_model.bin", "*.pth", "*.pt", "*.ckpt", "*.bin")
"""Names of other code's weights in a folder, such as a snapshot of timm's from the hub."""


@dataclass(frozen=True, kw_only=True)
class EpochProgress:
    """The progress within an epoch.

    Attributes:
        step: optimizer steps done
        logged: of these, the steps up to the last log step
        loss: sum of the steps' losses up to the last log step, mean over the workers
        window_loss: the same of the steps since
    """

    step: Count = 0
    logged: Count = 0
    loss: float = 0.0
    window_loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The small facts of a checkpoint.

    `progress` is that of the epoch after the `epochs_done` whole ones; `classes` name each label, where they are known.
    """

    epochs_done: Count
    steps_done: Count
    progress: EpochProgress = field(default_factory=EpochProgress)
    config: TrainConfig
    metrics: Mapping[str, float]
    world_size: Count
    classes: tuple[str, ...] | None = None
    mlflow_run_id: str | None = None

    @property
    def evaluation(self) -> dict[str, float]:
        """Return the metrics of these weights on validation images of the model's size; empty where there are none."""
        if self.progress.step or not self.config.has_last_size(self.epochs_done - 1):
            return {}
        return {key: value for key, value in self.metrics.items() if key.startswith(("val/", "val_ema/"))}

    def to_json(self, files: Mapping[str, Mapping[str, Any]]) -> str:
        """Return the text of meta.json, with the size and sha256 of the checkpoint's other files."""
        return json.dumps(
            {
                "format": FORMAT,
                "files": files,
                "epochs_done": self.epochs_done,
                "steps_done": self.steps_done,
                "progress": asdict(self.progress),
                "config": to_dict(self.config),
                "config_hash": config_hash(self.config),
                "metrics": dict(self.metrics),
                "world_size": self.world_size,
                "classes": self.classes,
                "mlflow_run_id": self.mlflow_run_id,
            },
            indent=1,
        )


def read_metadata(folder: Path) -> Metadata:
    """Read the facts of the checkpoint in `folder`.

    Raises:
        DamagedError: it holds none that are whole.
        ValueError: they are of another version.
    """
    return _read_meta(folder)[0]


def _read_meta(folder: Path) -> tuple[Metadata, Mapping[str, Any]]:
    try:
        return parse_metadata((folder / MARKER).read_bytes(), str(folder / MARKER))
    except FileNotFoundError:
        files = [file for name in FOREIGN for file in sorted(folder.glob(name))]
        other = f"; for the weights in it give {files[0]}" if files else ""
        raise DamagedError(f"{folder} is no checkpoint of ours: it has no {MARKER}{other}") from None


def parse_metadata(text: str | bytes, address: str) -> tuple[Metadata, Mapping[str, Any]]:
    """Read the text of the meta.json at `address`; returns its facts, and size and sha256 of each other file.

    Raises:
        DamagedError: it is damaged.
        ValueError: it is of another version.
    """
    try:
        values: dict[str, Any] = from_json(dict[str, Any], text, address, RESTORE)
    except ValueError as error:
        raise DamagedError(str(error)) from None
    try:
        version = typed(int, values.pop("format", None), "format")
        if version == 3:  # held metrics that MLflow had not taken, which the tracker keeps itself today
            values.pop("notes", None)
        if version in (3, FORMAT):
            files = typed(dict[str, dict[str, Any]], values.pop("files", None), "files")
            typed(str, values.pop("config_hash", None), "config_hash")
            values["config"] = from_dict(TrainConfig, values.get("config"), "config")
            # Older checkpoints of this format do not name classes.
            return typed(Metadata, {"classes": None, **values}), files
    except ValueError as error:
        raise DamagedError(f"{address} is damaged: {error}; {RESTORE}") from None
    raise ValueError(f"{address} has checkpoint format {version}; this version reads 3 and {FORMAT}")


def verify(folder: Path) -> None:
    """Compare every file with what meta.json says of it; a DamagedError names the first that differs."""
    _, files = _read_meta(folder)
    for name in sorted({"model.safetensors", *files}):
        try:
            file = folder / safe_relative(name, f"the entry of {folder}/meta.json for a file", RESTORE)
        except ValueError as error:
            raise DamagedError(str(error)) from None
        if not file.is_file():
            raise DamagedError(f"{file} is missing; {RESTORE}")
        if _size_and_hash(file) != files.get(name):
            raise DamagedError(
                f"{file} is damaged: its size or sha256 is not the one in meta.json; {RESTORE}"
            )


def _size_and_hash(file: Path) -> dict[str, Any]:
    """Return a file's entry in meta.json: its `bytes`, and its `sha256` in hexadecimal."""
    with file.open("rb") as opened:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
        }


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of the state in host memory, which stays as it is while the training continues.

    It is whole once `wait` has returned.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Any]
    metadata: Metadata
    wait: Callable[[], None] = lambda: None

    def save(self, folder: Path) -> None:
        """Write the checkpoint into an existing, empty folder; `storage.publish` brings it to the disk.

        meta.json comes last, so that it marks a complete one.
        """
        self.wait()
        save_file(dict(self.model), folder / "model.safetensors")
        if self.ema is not None:
            save_file(dict(self.ema), folder / "ema.safetensors")
        torch.save(dict(self.optimizer), folder / "optimizer.pt")
        (folder / MARKER).write_text(self.metadata.to_json(file_checksums(folder)))


def snapshot(
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    metadata: Metadata,
    copies: HostCopies | None = None,
) -> Snapshot:
    """Copy the state: at once, or as `copies` do it, on a GPU while the training goes on."""
    state = {
        "model": model.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    copied, wait = (copies or HostCopies(torch.device("cpu"), model)).copy(state)
    return Snapshot(**copied, metadata=metadata, wait=wait)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """List `field: old -> new` for every field that changes what is learned."""
    before, after = what_is_learned(old), what_is_learned(new)
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in after if before[name] != after[name]]


def restore(
    folder: Path,
    config: TrainConfig,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> Metadata:
    """Load a checkpoint to continue its run. The options of the optimizer's groups stay those of the config.

    Raises:
        DamagedError: it is torn or changed.
        ValueError: it is of another config; says what differs.
    """
    verify(folder)
    meta = read_metadata(folder)
    if changed := differences(meta.config, config):
        raise ValueError(
            f"{folder} is a checkpoint of another config ({'; '.join(changed)}); choose another run.name"
        )
    device = next(model.parameters()).device
    model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
    if ema is not None:
        ema.load_state_dict(load_file(folder / "ema.safetensors", device=str(device)))
    own = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)
    return meta


def read_weights(path: str | Path, *, ema: bool = False) -> tuple[dict[str, Tensor], TrainConfig | None]:
    """Read a state dict, and the config if the checkpoint is ours.

    `path` is a checkpoint folder, a .safetensors file, or a .pth/.pt/.ckpt file of other code (docs/training.md has the
    table); or the s3:// address of one, of which this machine then gets a copy. With `ema` the weights are their moving
    average.

    Raises:
        FileNotFoundError, ValueError: see `read_weight_file`; or a folder is no checkpoint of ours.
    """
    path = local(path)
    if not path.is_dir():
        return read_weight_file(path, ema=ema), None
    meta = read_metadata(path)
    file = path / ("ema.safetensors" if ema else "model.safetensors")
    if not file.exists() and ema:
        raise ValueError(f"{path} holds no moving average: its run had optim.ema_decay=0; leave --ema out")
    return read_weight_file(file), meta.config


@contextlib.contextmanager
def about(checkpoint: str | Path) -> Iterator[None]:
    """Name the checkpoint in what is said of its weights."""
    try:
        yield
    except ValueError as error:
        named = str(checkpoint) in str(error)
        raise error if named else ValueError(f"{checkpoint}: {error}") from None


def weights_sha256(path: Path) -> str:
    """Return the sha256 of the weights in a file, or of those that a checkpoint folder of ours says it holds."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        return str(_size_and_hash(path)["sha256"])
    _, files = _read_meta(path)
    return str(files.get("model.safetensors", {}).get("sha256"))


def file_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and sha256 of every file of a folder, as meta.json keeps them."""
    return {file.name: _size_and_hash(file) for file in sorted(folder.iterdir())}
