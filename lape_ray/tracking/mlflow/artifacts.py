"""Files and models of a run in MLflow."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lape_ray.tracking.failures import never_raise
from lape_ray.tracking.mlflow.client import connect, impatient, one_line
from lape_ray.tracking.mlflow.runs import as_metrics
from lape_ray.values.environment import environment

if TYPE_CHECKING:
    import mlflow


def log_model(
    uri: str, run_id: str, checkpoint: Path, metrics: Mapping[str, float], facts: Mapping[str, str]
) -> bool:
    """Keep a checkpoint's weights and facts as the run's artifact `model`, and its metrics as `best/...`.

    The experiment's list of models has it too, with these metrics and `facts`: what tells networks apart, and where the
    `checkpoint` lies. A failure is a warning, and False; one of that list a warning alone, for older servers have none.
    """
    with never_raise("MLflow: logging the best checkpoint"), tempfile.TemporaryDirectory() as folder:
        for name in ("model.safetensors", "ema.safetensors", "meta.json"):
            if (checkpoint / name).exists():
                shutil.copy(checkpoint / name, folder)
        client = connect(uri)
        client.log_artifacts(run_id, folder, "model")
        best = {f"best/{key[4:]}": value for key, value in metrics.items() if key.startswith("val/")}
        belongs = _listed_model(client, run_id, Path(folder, "meta.json"), facts)
        client.log_batch(run_id, metrics=as_metrics(best, 0, **belongs))
        return True
    return False


def _listed_model(
    client: mlflow.MlflowClient, run_id: str, meta: Path, facts: Mapping[str, str]
) -> dict[str, str]:
    """Make a checkpoint one of the experiment's models, if it is not yet; returns what its metrics belong to.

    Its weights are stored once, as the run's artifact: the model has meta.json and the tag `weights`.
    """
    from mlflow.entities import LoggedModelOutput

    with never_raise("MLflow: listing the best checkpoint among the experiment's models"):
        run = client.get_run(run_id)
        experiment = run.info.experiment_id
        known = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
        model = next((one for one in known if one.tags.get("checkpoint") == facts["checkpoint"]), None)
        if model is None:
            model = client.create_logged_model(
                experiment,
                re.sub("[/:.%\"']", "-", run.info.run_name),
                run_id,
                tags={"checkpoint": facts["checkpoint"], "weights": f"runs:/{run_id}/model"},
                params={name: value for name, value in facts.items() if name != "checkpoint"},
                model_type=facts["variant"],
            )
            client.log_model_artifact(model.model_id, str(meta))
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
            client.finalize_logged_model(model.model_id, "READY")
        data = [
            one.dataset
            for one in run.inputs.dataset_inputs
            if "validation" in [tag.value for tag in one.tags]
        ]
        of_data = {"dataset_name": data[0].name, "dataset_digest": data[0].digest} if data else {}
        return {"model_id": model.model_id, **of_data}
    return {}


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

    before = os.environ.get("MLFLOW_TRACKING_URI")
    with environment({"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_ID": experiment_id}):
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment_id=experiment_id)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)  # None: the default


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
