"""Files and models of a run in MLflow."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lape_ray.tracking.failures import never_raise
from lape_ray.tracking.mlflow.client import connect, impatient, one_line
from lape_ray.tracking.mlflow.runs import as_metrics


def log_model(uri: str, run_id: str, checkpoint: Path, metrics: Mapping[str, float]) -> bool:
    """Keep a checkpoint's weights and facts as the run's artifact `model`, and its metrics as `best/...`.

    A failure is a warning, and False.
    """
    with never_raise("MLflow: logging the best checkpoint"), tempfile.TemporaryDirectory() as folder:
        for name in ("model.safetensors", "ema.safetensors", "meta.json"):
            if (checkpoint / name).exists():
                shutil.copy(checkpoint / name, folder)
        client = connect(uri)
        client.log_artifacts(run_id, folder, "model")
        best = {f"best/{key[4:]}": value for key, value in metrics.items() if key.startswith("val/")}
        client.log_batch(run_id, metrics=as_metrics(best, 0))
        return True
    return False


def log_files(uri: str, run_id: str, folder: Path, to: str) -> None:
    """Keep every file of `folder` under the run's artifact folder `to`; a ValueError says why that failed."""
    with one_line(f"MLflow run {run_id} at {uri!r} does not take {to!r}", uri):
        connect(uri).log_artifacts(run_id, str(folder), to)


def download_model(uri: str, run_id: str, folder: Path) -> Path:
    """Fetch the run's artifact `model`, a checkpoint folder, into `folder`; a ValueError says why that failed."""
    what = f"MLflow run {run_id} at {uri!r} has no model that can be fetched (give the id of a finished run)"
    with one_line(what, uri):
        client = connect(uri)
        with impatient():
            client.get_run(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, "model", str(folder)))


@contextlib.contextmanager
def _process_wide(uri: str, experiment_id: str) -> Iterator[None]:
    """Set what MLflow keeps for the whole process, which some of its functions read, for as long as one needs it.

    It keeps them in the environment too, where processes that are started later would find them.
    """
    import mlflow

    names = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
    before = {name: os.environ.get(name) for name in names}
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id=experiment_id)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before["MLFLOW_TRACKING_URI"])  # None: the default
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def log_pyfunc(
    uri: str,
    run_id: str,
    *,
    loader_module: str,
    data: Path,
    package: Path,
    requirements: Sequence[str],
    example: str,
    columns: Mapping[str, str],
    register: str | None,
) -> str:
    """Log a pyfunc model of one text column `image` to the run, and register it on request; returns its address.

    Args:
        loader_module: module with `_load_pyfunc`, which gets a copy of the folder `data`.
        package: folder of the package that holds it; it travels with the model.
        requirements: what else the model needs, as pip writes it.
        example: a value of `image`.
        columns: of the answer: name -> MLflow's type, or `array` for a list of doubles.
        register: name under which the model becomes a new version.

    Raises a ValueError with the reason where the server does not take it.
    """
    import mlflow
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, Schema

    def column(name: str, kind: str) -> ColSpec:
        return ColSpec(Array("double") if kind == "array" else kind, name)

    outputs = Schema([column(name, kind) for name, kind in columns.items()])
    with (
        one_line(f"MLflow run {run_id} at {uri!r} does not take the model", uri),
        _process_wide(uri, connect(uri).get_run(run_id).info.experiment_id),
    ):
        info = Model.log(
            artifact_path=None,
            name="classifier",
            flavor=mlflow.pyfunc,
            run_id=run_id,
            registered_model_name=register,
            loader_module=loader_module,
            data_path=str(data),
            code_paths=[str(package)],
            pip_requirements=list(requirements),
            signature=ModelSignature(Schema([ColSpec("string", "image")]), outputs),
            input_example=pd.DataFrame({"image": [example]}),
        )
    return str(info.model_uri)
