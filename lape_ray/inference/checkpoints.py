"""Resolve the specs of a command line: checkpoints of any origin, recipes and MLflow runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from lape_ray import tracking
from lape_ray.config import ModelConfig, TrainConfig, parse_value, replace_fields
from lape_ray.data.beton import Manifest, manifest_path, set_files
from lape_ray.data.remote import remote_manifest
from lape_ray.inference.evaluate import config_for
from lape_ray.inference.predict import Predictor, make_predictor
from lape_ray.model import resolve
from lape_ray.recipes import RECIPES
from lape_ray.storage import is_remote, local
from lape_ray.training.checkpoint import read_metadata
from lape_ray.training.classes import checkpoint_classes, text_order

KINDS = get_type_hints(ModelConfig)
RUN_ID = re.compile(r"[0-9a-f]{32}")
_REVISION = (
    rf"hf-hub:[^@]+@(?!(?:{'|'.join(RECIPES)})(?:,|$))[\w./-]+"  # behind an @ may stand a recipe instead
)
SPEC = re.compile(
    rf"(?:(?P<label>[^=/@]+)=)?(?P<path>{_REVISION}|[^@]+)(?:@(?P<recipe>\w+)(?P<fields>(?:,\w+=[\w.]+)*))?"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ResolvedCheckpoint:
    """A checkpoint on this machine, with the config of its network.

    Attributes:
        label: name of the network in reports
        path: folder of ours, or file of other code
        config: the network's, with the overrides
        run_id: the MLflow run, if the spec names one
    """

    label: str
    path: str
    config: TrainConfig
    run_id: str | None = None

    @property
    def description(self) -> str:
        """The network in one line."""
        model, spec = self.config.model, resolve(self.config.model)
        parts = [f"{model.variant} at {spec.image_size} px"]
        parts.append(
            f"position {model.position}" + (f", join {model.join}" if model.position != "none" else "")
        )
        if model.bias != "none":
            parts.append(f"bias {model.bias}, join {model.bias_join}")
        if model.rotary != "none":
            parts.append(f"rotary {model.rotary}")
        if model.pool is not None:
            parts.append(f"pool {model.pool}")
        return "; ".join(parts)


def resolve_checkpoints(
    specs: Sequence[str], overrides: Mapping[str, Any], *, downloads: Path
) -> list[ResolvedCheckpoint]:
    """Resolve each `[LABEL=]CHECKPOINT[@RECIPE[,FIELD=VALUE...]]` or `[LABEL=]RUN_ID`.

    A checkpoint folder of ours knows its network. The network of other code's file is described by the recipe, by the
    fields behind it, and by `model.*` overrides, which are for all; else by timm's config.json next to it. What lies on
    S3 or the hub is copied to this machine, and a run's checkpoint into `downloads`. A label that is left out is the
    run's name, the recipe or the file; equal labels are numbered.

    Raises:
        ValueError, FileNotFoundError: a spec is malformed, or names no checkpoint.
    """
    return _unique_labels(
        [_resolve(spec, overrides, downloads / str(index)) for index, spec in enumerate(specs)]
    )


def _resolve(spec: str, overrides: Mapping[str, Any], download: Path) -> ResolvedCheckpoint:
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"{spec!r} is not [LABEL=]CHECKPOINT[@RECIPE[,FIELD=VALUE...]] or [LABEL=]RUN_ID")
    path, run_id = match["path"], None
    if RUN_ID.fullmatch(path):
        run_id = path
        server = {name: value for name, value in overrides.items() if name == "tracking.uri"}
        uri = tracking.tracking_uri(replace_fields(TrainConfig(), server))
        path = str(tracking.download_model(uri, run_id, download))
    path = str(local(path))
    ours = Path(path).is_dir()
    if ours and match["recipe"]:
        raise ValueError(f"{spec!r}: {path} knows its own network; leave out @{match['recipe']}")
    if not ours and not Path(path).exists():
        raise FileNotFoundError(f"{path} is neither a checkpoint nor the id of an MLflow run")
    kept = {
        name: value
        for name, value in overrides.items()
        if not (ours and name.startswith("model.")) or name == "model.plugin"
    }
    config = config_for(path, match["recipe"], kept | _fields(match["fields"] or "", spec))
    label = match["label"] or config.run.name or match["recipe"] or Path(match["path"]).stem
    return ResolvedCheckpoint(label=label, path=path, config=config, run_id=run_id)


def open_predictor(
    spec: str, overrides: Mapping[str, Any], *, ema: bool = False
) -> tuple[Predictor, str | None]:
    """Open the predictor of one spec (see `resolve_checkpoints`), and return it with its MLflow run's id, if any.

    Its classes have the names that the checkpoint or its config.json holds, else those of `class_names`; else a warning
    says that they are numbers.
    """
    with tempfile.TemporaryDirectory(prefix="lape-model-") as downloads:
        (checkpoint,) = resolve_checkpoints([spec], overrides, downloads=Path(downloads))
        run_id, names, trained = checkpoint.run_id, checkpoint_classes(checkpoint.path), None
        if Path(checkpoint.path).is_dir():
            trained = read_metadata(Path(checkpoint.path))
            run_id = run_id or trained.mlflow_run_id
        if names is None:
            names = class_names(checkpoint.config)
            if note := text_order(names or (), of=spec, path="the manifest that names the classes"):
                log.warning("%s", note)
        predictor = make_predictor(checkpoint.path, checkpoint.config, classes=names, ema=ema)
    if names is None:
        log.warning(
            "%s: classes are named by their number, as their names are neither in the checkpoint nor in a manifest of "
            "data.val or data.train; give --data.val FILE.beton with its manifest",
            spec,
        )
    return dataclasses.replace(predictor, trained=trained), run_id


def class_names(config: TrainConfig) -> tuple[str, ...] | None:
    """Read the names of classes in the manifest of `data.val`, else of `data.train`; None where neither exists."""
    for path in (config.data.val, config.data.train):
        if path:
            with contextlib.suppress(FileNotFoundError):
                return _manifest(path).classes
    return None


def _manifest(path: str) -> Manifest:
    if is_remote(path):
        return remote_manifest(path)
    # A manifest is enough, without its images; a set has one for each of its files.
    files = (path,) if manifest_path(path).is_file() else set_files(path)
    return Manifest.of_set([Manifest.load(file) for file in files], path)


def _fields(fields: str, spec: str) -> dict[str, Any]:
    """Parse `,position=none,depth=3` to overrides."""
    overrides = {}
    for name, value in (pair.split("=") for pair in fields.split(",")[1:]):
        if name not in KINDS:
            raise ValueError(f"{spec!r}: a model has no field {name!r}; it has {', '.join(KINDS)}")
        overrides[f"model.{name}"] = parse_value(KINDS[name], value)
    return overrides


def _unique_labels(checkpoints: Sequence[ResolvedCheckpoint]) -> list[ResolvedCheckpoint]:
    count, used = Counter(checkpoint.label for checkpoint in checkpoints), Counter[str]()
    unique = []
    for checkpoint in checkpoints:
        label = checkpoint.label
        used[label] += 1
        numbered = label if count[label] == 1 else f"{label} ({used[label]})"
        unique.append(dataclasses.replace(checkpoint, label=numbered))
    return unique
