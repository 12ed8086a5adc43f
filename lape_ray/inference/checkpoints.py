"""The networks that a job is about: checkpoints of any origin and MLflow runs, by what a person types."""

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
from lape_ray.storage import is_remote, local
from lape_ray.training.checkpoint import read_meta

KINDS = get_type_hints(ModelConfig)
RUN_ID = re.compile(r"[0-9a-f]{32}")
WRITTEN = re.compile(
    r"(?:(?P<label>[^=/@]+)=)?(?P<place>[^@]+)(?:@(?P<recipe>\w+)(?P<fields>(?:,\w+=[\w.]+)*))?"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One network to work on."""

    label: str
    checkpoint: str
    config: TrainConfig
    run_id: str | None = None
    """The MLflow run, where one was named."""

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
        return "; ".join(parts)


def find_subjects(
    written: Sequence[str], overrides: Mapping[str, Any], *, downloads: Path, ema: bool = False
) -> list[Subject]:
    """Resolve each `[LABEL=]CHECKPOINT[@RECIPE[,FIELD=VALUE...]]` or `[LABEL=]RUN_ID`.

    A checkpoint folder of ours knows its own network; those of other code are described by the recipe, by fields of
    the model behind it, and by `model.*` overrides, which are for all.
    What lies on S3 is copied to this machine. Labels that are left out are the run's name, the recipe or the file,
    made unique.

    Raises:
        ValueError, FileNotFoundError: something written does not exist, or is no checkpoint.
    """
    subjects = []
    for index, text in enumerate(written):
        match = WRITTEN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not [LABEL=]CHECKPOINT[@RECIPE[,FIELD=VALUE...]] or [LABEL=]RUN_ID"
            )
        place, run_id = match["place"], None
        if RUN_ID.fullmatch(place):
            run_id = place
            config = replace_fields(
                TrainConfig(), {k: v for k, v in overrides.items() if k == "run.tracking_uri"}
            )
            place = str(
                tracking.download_model(tracking.tracking_uri(config), run_id, downloads / str(index))
            )
        place = str(local(place))
        ours = Path(place).is_dir()
        if ours and match["recipe"]:
            raise ValueError(f"{text!r}: {place} knows its own network; leave out @{match['recipe']}")
        if not ours and not Path(place).exists():
            raise FileNotFoundError(f"{place} is neither a checkpoint nor the id of an MLflow run")
        values = {k: v for k, v in overrides.items() if not (ours and k.startswith("model."))}
        config = config_for(place, match["recipe"], values | _fields(match["fields"] or "", text))
        label = match["label"] or config.run.name or match["recipe"] or Path(place).stem
        subjects.append(Subject(label=label, checkpoint=place, config=config, run_id=run_id))
    return _unique_labels(subjects)


def open_predictor(
    written: str, overrides: Mapping[str, Any], *, ema: bool = False
) -> tuple[Predictor, str | None]:
    """Open the predictor of what a person types (see `find_subjects`), and name its MLflow run, if any.

    Its classes have the names that the checkpoint holds, else those of `class_names`; else a warning says that they are
    numbers.
    """
    with tempfile.TemporaryDirectory(prefix="lape-model-") as downloads:
        (one,) = find_subjects([written], overrides, downloads=Path(downloads))
        run_id, names = one.run_id, None
        if Path(one.checkpoint).is_dir():
            meta = read_meta(Path(one.checkpoint))
            run_id, names = run_id or meta.mlflow_run_id, meta.classes
        names = names or class_names(one.config)
        predictor = make_predictor(one.checkpoint, one.config, classes=names, ema=ema)
    if names is None:
        log.warning(
            "%s: classes are named by their number, as their names are neither in the checkpoint nor in a manifest of "
            "data.val or data.train; give --data.val FILE.beton, beside which there is one",
            written,
        )
    return predictor, run_id


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


def _fields(written: str, text: str) -> dict[str, Any]:
    """Parse `,position=none,depth=3` to overrides."""
    found = {}
    for name, value in (pair.split("=") for pair in written.split(",")[1:]):
        if name not in KINDS:
            raise ValueError(f"{text!r}: a model has no field {name!r}; it has {', '.join(KINDS)}")
        found[f"model.{name}"] = parse_value(KINDS[name], value)
    return found


def _unique_labels(subjects: Sequence[Subject]) -> list[Subject]:
    count, used = Counter(one.label for one in subjects), Counter[str]()
    unique = []
    for one in subjects:
        used[one.label] += 1
        label = one.label if count[one.label] == 1 else f"{one.label} ({used[one.label]})"
        unique.append(dataclasses.replace(one, label=label))
    return unique
