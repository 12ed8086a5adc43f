"""Runs in MLflow: the driver makes one, tags it, reads it, and closes it with the status that is true."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lape_ray.config import TrainConfig, dump, flatten
from lape_ray.recipes import RECIPES
from lape_ray.storage import home
from lape_ray.tracking import ui_view
from lape_ray.tracking.failures import never_raise, reason
from lape_ray.tracking.mlflow.client import (
    DeletedError,
    connect,
    impatient,
    one_line,
    tracking_uri,
    ui_command,
)
from lape_ray.values.redaction import redacted

if TYPE_CHECKING:
    import mlflow

log = logging.getLogger(__name__)
Status = Literal["FINISHED", "FAILED", "KILLED"]
Datasets = Mapping[str, tuple[str, str]]


def create_run(
    config: TrainConfig, *, name: str, command: str, tags: Mapping[str, str], datasets: Datasets
) -> str:
    """Make the run with its parameters, tags, data, description and config; returns its id.

    `datasets` maps the role of each file ("train", "val") to its path and checksum. Raises a ValueError with the
    reason where the server does not take all of it.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    uri = tracking_uri(config)
    parameters = [Param(key, str(value)) for key, value in flatten(config).items()]
    labels = {"mlflow.note.content": _description(config, command, tags), "command": command, **tags}
    labels |= {f"data.{role}.sha256": digest for role, (_, digest) in datasets.items()}
    inputs = [
        DatasetInput(
            Dataset(Path(path).stem, digest[:12], "local", path),
            [InputTag("mlflow.data.context", {"train": "training", "val": "validation"}.get(role, role))],
        )
        for role, (path, digest) in datasets.items()
    ]
    with one_line(f"the MLflow server {uri!r} does not take the run {name!r}", uri):
        client = connect(uri)
        experiment = _experiment_id(client, config.tracking.experiment, uri)
        run = client.create_run(experiment, run_name=name)
        run_id = str(run.info.run_id)
        client.log_batch(run_id, params=parameters, tags=_tags(labels))
        client.log_inputs(run_id, datasets=inputs)
        client.log_text(run_id, dump(config), "config.txt")
        if config.model.plugin is not None:
            client.log_text(run_id, config.model.plugin.text, "plugin.py")
    return run_id


def _experiment_id(client: mlflow.MlflowClient, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise DeletedError(
            f"the MLflow experiment {name!r} at {uri!r} was deleted; restore it with "
            f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow experiments restore "
            f"--experiment-id {found.experiment_id}, or choose another --tracking.experiment"
        )
    if found is not None:
        for key, value in ui_view.tags().items():
            if key not in found.tags:  # what a person wrote stays
                client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)
    # Without a server artifacts would land in the current directory, which for a submitted job is temporary.
    location = (home() / "mlartifacts" / name.strip("/")).as_uri() if uri.startswith("sqlite:") else None
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=ui_view.tags()))
    except MlflowException:
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)  # another job was faster


def _description(config: TrainConfig, command: str, tags: Mapping[str, str]) -> str:
    """Write the Markdown that the run's page shows: what it is, where it lies, how to repeat it."""
    about = RECIPES[config.recipe].__doc__ or "" if config.recipe in RECIPES else ""
    shown = ("variant", "position", "join", "bias", "rotary", "seed")
    facts = " · ".join(f"{key} **{tags[key]}**" for key in shown if tags.get(key, "none") != "none")
    where = "Pages: artifacts `summary/summary.html` and `position_report/position_report.html`."
    title = f"**{config.recipe or 'run'}** {about.partition(chr(10))[0]}".strip()
    return "\n\n".join((title, facts, where, f"```\n{command}\n```"))


def _tags(values: Mapping[str, str]) -> list[mlflow.entities.RunTag]:
    """Make the tags of a run. Commands and errors may hold an address that was in no config."""
    from mlflow.entities import RunTag

    return [RunTag(key, redacted(value)) for key, value in values.items()]


def reopen_run(uri: str, run_id: str) -> bool:
    """Set an earlier run to RUNNING again; False where the server does not know it. One that is away is a warning."""
    try:
        with impatient():
            connect(uri).update_run(run_id, status="RUNNING")
    except Exception as error:  # the client raises its own kinds and those of its transports
        if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            log.warning("MLflow run %s cannot be continued, a new one is made: %s", run_id, reason(error))
            return False
        log.warning("MLflow is away, the run goes on without it for now: %s", reason(error))
    return True


def finish_run(uri: str, run_id: str, status: Status) -> bool:
    """Close the run; a tracking server that is away is a warning, and False."""
    with never_raise("MLflow: closing the run"), impatient():
        connect(uri).set_terminated(run_id, status)
        return True
    return False


def run_page(uri: str, run_id: str) -> str:
    """Say where to look at a run: its page on a server; else the command, and the page of charts that it serves."""
    with never_raise("MLflow: looking for the run's page"), impatient():
        experiment = connect(uri).get_run(run_id).info.experiment_id
        runs = f"#/experiments/{experiment}/runs"
        if uri.startswith("http"):
            page = f"{uri.rstrip('/')}/{runs}"
            return f"{page}/{run_id}?workflowType=machine_learning\n  among all: {page}?{ui_view.QUERY}"
        return f"{ui_command(uri)}\n  and open http://127.0.0.1:5000/{runs}?{ui_view.QUERY}"
    return ui_command(uri)


def as_metrics(values: Mapping[str, float], step: int, **of: str) -> list[mlflow.entities.Metric]:
    """Convert the values of a step to MLflow's, as of now; `of` names the model and data that they are of."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(key, float(value), now, step, **of) for key, value in values.items()]


def tag_run(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; a tracking server that is away is a warning."""
    with never_raise("MLflow: setting tags"):
        connect(uri).log_batch(run_id, tags=_tags(tags))


def log_values(uri: str, run_id: str, values: Mapping[str, float], *, step: int = 0) -> None:
    """Store a few metrics of a run at once; a tracking server that is away is a warning."""
    with never_raise("MLflow: logging metrics"):
        connect(uri).log_batch(run_id, metrics=as_metrics(values, step))


def runs_below(uri: str, parent: str, tag: str) -> dict[str, str]:
    """Return the runs below another one: what each has in `tag` -> its id; a ValueError says why that failed."""
    found: dict[str, str] = {}
    token: str | None = None
    with one_line(f"the runs below MLflow run {parent} at {uri!r} cannot be read", uri):
        client = connect(uri)
        experiments = [client.get_run(parent).info.experiment_id]
        while True:
            page = client.search_runs(
                experiments, f"tags.`mlflow.parentRunId` = '{parent}'", max_results=500, page_token=token
            )
            found |= {run.data.tags[tag]: str(run.info.run_id) for run in page if tag in run.data.tags}
            if (token := page.token) is None:
                break
    return found


def holds_metric(uri: str, run_id: str, name: str) -> bool:
    """Tell whether the run has a metric that its workers log; False, with a warning, where they log elsewhere."""
    with never_raise("MLflow: looking for the run's metrics"), impatient():
        if name in connect(uri).get_run(run_id).data.metrics:
            return True
        log.warning(
            "MLflow run %s at %r holds no %r of its training: the workers reach another store by this address, or "
            "none; start an MLflow server that all machines reach, and set --tracking.uri or MLFLOW_TRACKING_URI",
            run_id, uri, name,
        )  # fmt: skip
    return False


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts of a run so far."""

    name: str
    status: str
    tags: Mapping[str, str]
    history: Mapping[str, Sequence[tuple[int, float]]]
    """(step, value) of every metric, in the order of steps."""


def read_run(uri: str, run_id: str, metrics: Sequence[str]) -> RunFacts:
    """Read the run and the history of those of `metrics` that it has; a ValueError says why it cannot be read."""
    history = {}
    with one_line(f"MLflow run {run_id} at {uri!r} cannot be read", uri):
        client = connect(uri)
        run = client.get_run(run_id)
        for key in metrics:
            if key in run.data.metrics:
                points = [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
                history[key] = sorted(points)
    return RunFacts(
        name=str(run.info.run_name), status=str(run.info.status), tags=dict(run.data.tags), history=history
    )
