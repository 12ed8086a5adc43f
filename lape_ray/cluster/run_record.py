"""The record of a run, `run.json` in its folder: its config, its MLflow run, and whether it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lape_ray import storage
from lape_ray.cluster.checkpoint_list import newest_meta
from lape_ray.cluster.run import Run
from lape_ray.config import TrainConfig, from_dict, to_dict
from lape_ray.training.checkpoint import differences
from lape_ray.training.inputs import CLASSES, changed_inputs, classes_digest
from lape_ray.values.typed import typed

RECORD = "run.json"
WAY_OUT = "it is made again from the newest checkpoint"
NOTHING_YET = (
    "lease.json",
    ".lease.json",
    ".run.json",
    "checkpoint_manager_snapshot.json",
    ".validate_storage_marker",
)
"""The beginnings of the names of files that a run may leave in its folder before its record."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of `run.json`; `config` as `to_dict` made it, and the `inputs` as `input_digests` finds them."""

    finished: bool
    mlflow_run_id: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]


def write_run(run: Run, *, finished: bool) -> None:
    """Write the record of a run into its folder."""
    record = Record(
        finished=finished,
        mlflow_run_id=run.mlflow_run_id,
        config=to_dict(run.config),
        inputs=dict(run.inputs),
    )
    storage.write_record(storage.join(run.folder, RECORD), vars(record))


def earlier_run(
    config: TrainConfig, folder: str, inputs: Mapping[str, str] = MappingProxyType({})
) -> Record | None:
    """Read the record of the unfinished run that `config` continues; None where a new one begins.

    Raises:
        ValueError: the run of this name is finished, or of another config or `inputs`; or what lies in the folder is no
            run of this name, so that it can neither be continued nor overwritten.
    """
    name = config.run.name
    earlier = _read_run(folder)
    if earlier is None:
        return None
    earlier_config = from_dict(TrainConfig, earlier.config, "config")
    if config.run.overwrite:
        if earlier_config.run.name != name:
            raise ValueError(
                f"{folder} is not overwritten: it holds the run {earlier_config.run.name!r}; choose another --run.name"
            )
        return None
    if changed := differences(earlier_config, config):
        raise ValueError(
            f"run {name!r} exists with another config ({'; '.join(changed)}); "
            "choose another --run.name, or --run.overwrite true to delete it"
        )
    if changed := changed_inputs(earlier.inputs, inputs):
        raise ValueError(
            f"run {name!r} exists with other files behind the same names ({'; '.join(changed)}); put the earlier ones "
            "back, choose another --run.name, or --run.overwrite true to delete it"
        )
    if earlier.finished:
        raise ValueError(
            f"run {name!r} is finished already; choose another --run.name, or --run.overwrite true to delete it"
        )
    return earlier


def read_run(folder: str) -> tuple[TrainConfig, str]:
    """Read the config and the MLflow run of the run in `folder`; a ValueError where it holds none."""
    record = _read_run(folder)
    if record is None:
        raise ValueError(f"{folder} holds no run")
    return from_dict(TrainConfig, record.config, "config"), record.mlflow_run_id


def _read_run(folder: str) -> Record | None:
    """Read the record, or make it again from the newest checkpoint; None where the folder is free."""
    address = storage.join(folder, RECORD)
    try:
        values = storage.read_record(dict[str, Any], address, way_out=WAY_OUT)
        try:
            record: Record = typed(Record, {"inputs": {}, **values})  # older ones do not know them
        except ValueError as error:
            raise ValueError(f"{address} is damaged: {error}; {WAY_OUT}") from None
        return record
    except FileNotFoundError:
        others = [name for name in storage.names(folder) if not name.startswith(NOTHING_YET)]
        reason = f"{folder} holds {others[0]!r} and no {RECORD}" if others else ""
    except ValueError as error:
        reason = str(error)
    if not reason:
        return None
    meta = newest_meta(folder)
    if meta is None:
        raise ValueError(
            f"{reason}, and no checkpoint of ours is in it: choose another --run.name, or move it away"
        )
    print(f"warning: {reason}; going by the newest checkpoint", flush=True)
    return Record(
        finished=False,
        mlflow_run_id=meta.mlflow_run_id or "",
        config=to_dict(meta.config),
        inputs={} if meta.classes is None else {CLASSES: classes_digest(meta.classes)},
    )
