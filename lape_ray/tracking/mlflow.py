"""MLflow: the driver makes a run and closes it, rank 0 logs into it. Nothing here can stop the training.

No address that it is given holds a password, which would be stored with the run: those stand in the environment of
every process that logs (MLFLOW_TRACKING_USERNAME and _PASSWORD; of a database PGPASSWORD, or its own file).

Importing mlflow takes seconds of CPU time, and every process of a run imports this module while only the driver
and rank 0 talk to the server: so it is imported where a connection is made, in `_client`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import getpass
import itertools
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lape_ray.config import TrainConfig, dump, flatten
from lape_ray.recipes import RECIPES
from lape_ray.storage import home
from lape_ray.tracking import ui_view
from lape_ray.values.redaction import redacted, refuse_secret

if TYPE_CHECKING:
    import mlflow

log = logging.getLogger(__name__)
_SHORT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
Status = Literal["FINISHED", "FAILED", "KILLED"]
Datasets = Mapping[str, tuple[str, str]]


def _client(uri: str) -> mlflow.MlflowClient:
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # It prints the traceback of an error that it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow.MlflowClient(uri)


def _reason(error: Exception) -> str:
    """Return the first line of what the client or its transport says, else the kind of error."""
    remark = "(raised as a result of"  # SQLAlchemy on itself; what the database says stands below
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(remark)]
    return redacted(lines[0]) if lines else type(error).__name__


@contextlib.contextmanager
def _one_line(what: str, uri: str) -> Iterator[None]:
    """Make any error of the client a ValueError of one line: `what` is wrong, why, and what to do about it."""
    try:
        yield
    except Exception as error:  # the client raises its own kinds and those of its transports
        reason, fix = _reason(error), "start the server, or"
        if uri.startswith("sqlite:"):
            fix = "mend the file, or"
        if "database is locked" in reason:
            fix = "another process holds the file: close that process, or start an MLflow server and"
        other = "set --tracking.uri or MLFLOW_TRACKING_URI"
        raise ValueError(f"{what}: {reason}; {fix} {other}") from None


def serving_error(status: int, message: str) -> Exception:
    """Return the error that MLflow's model server answers with this status and text; of others it sends a traceback."""
    from mlflow.exceptions import MlflowException, get_error_code

    return MlflowException(message, error_code=get_error_code(status))


def _metrics(values: Mapping[str, float], step: int) -> list[mlflow.entities.Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(key, float(value), now, step) for key, value in values.items()]


def _tags(values: Mapping[str, str]) -> list[mlflow.entities.RunTag]:
    """Make the tags of a run. Commands and errors may hold an address that was in no config."""
    from mlflow.entities import RunTag

    return [RunTag(key, redacted(value)) for key, value in values.items()]


def tracking_uri(config: TrainConfig) -> str:
    """Return the configured server, $MLFLOW_TRACKING_URI, or a sqlite file in this package's home.

    Raises:
        ValueError: the variable's address holds a password; says which variables to use instead.
    """
    if config.tracking.uri:
        return config.tracking.uri
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    refuse_secret("MLFLOW_TRACKING_URI", uri)
    return uri or f"sqlite:///{home() / 'mlflow.db'}"


def is_local(uri: str) -> bool:
    """Tell whether only processes of this machine can reach the store."""
    return not uri.startswith(("http://", "https://", "databricks", "postgresql", "mysql", "mssql"))


def ui_command(uri: str) -> str:
    """Return what to type, or open, to look at the runs."""
    if uri.startswith("http"):
        return uri
    return f"mlflow ui --backend-store-uri {uri}"


def run_page(uri: str, run_id: str) -> str:
    """Say where to look at a run: its page on a server; else the command, and the page of charts that it serves."""
    with _never_raise("looking for the run's page"), _impatient():
        experiment = _client(uri).get_run(run_id).info.experiment_id
        runs = f"#/experiments/{experiment}/runs"
        if uri.startswith("http"):
            page = f"{uri.rstrip('/')}/{runs}"
            return f"{page}/{run_id}?workflowType=machine_learning\n  among all: {page}?{ui_view.QUERY}"
        return f"{ui_command(uri)}\n  and open http://127.0.0.1:5000/{runs}?{ui_view.QUERY}"
    return ui_command(uri)


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Shorten MLflow's retries, which last minutes by default; a check before the run should not."""
    before = {name: os.environ.get(name) for name in _SHORT}
    os.environ.update(_SHORT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def check_reachable(uri: str) -> None:
    """Raise a ValueError with the reason where the tracking server does not answer."""
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with _one_line(f"the MLflow server {uri!r} cannot be used", uri), _impatient():
        _client(uri).search_experiments(max_results=1)


def _experiment_id(client: mlflow.MlflowClient, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
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
    with _one_line(f"the MLflow server {uri!r} does not take the run {name!r}", uri):
        client = _client(uri)
        run = client.create_run(_experiment_id(client, config.tracking.experiment, uri), run_name=name)
        run_id = str(run.info.run_id)
        client.log_batch(run_id, params=parameters, tags=_tags(labels))
        client.log_inputs(run_id, datasets=inputs)
        client.log_text(run_id, dump(config), "config.txt")
    return run_id


def _description(config: TrainConfig, command: str, tags: Mapping[str, str]) -> str:
    """Write the Markdown that the run's page shows: what it is, where it lies, how to repeat it."""
    about = RECIPES[config.recipe].__doc__ or "" if config.recipe in RECIPES else ""
    shown = ("variant", "position", "join", "bias", "rotary", "seed")
    facts = " · ".join(f"{key} **{tags[key]}**" for key in shown if tags.get(key, "none") != "none")
    where = "Pages: artifacts `summary/summary.html` and `position_report/position_report.html`."
    title = f"**{config.recipe or 'run'}** {about.partition(chr(10))[0]}".strip()
    return "\n\n".join((title, facts, where, f"```\n{command}\n```"))


def source_tags(program: str) -> dict[str, str]:
    """Return the tags by which MLflow's list names source, version and user of a run; unknown ones are left out.

    The commit is $LAPE_RAY_GIT_COMMIT, for code that was sent without its repository, else that of this checkout.
    """
    tags = {"mlflow.source.name": program, "mlflow.source.type": "JOB"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    commit = os.environ.get("LAPE_RAY_GIT_COMMIT") or git_commit(Path(__file__).parent)
    if commit:
        tags |= {"mlflow.source.git.commit": commit, "git_commit": commit}
    return tags


def git_commit(folder: Path) -> str | None:
    """Return the commit of the checkout that `folder` lies in, `-dirty` where files differ from it.

    Outside of a checkout it is None.
    """
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None


def reopen_run(uri: str, run_id: str) -> bool:
    """Set an earlier run to RUNNING again; False where the server does not know it. One that is away is a warning."""
    try:
        with _impatient():
            _client(uri).update_run(run_id, status="RUNNING")
    except Exception as error:  # the client raises its own kinds and those of its transports
        if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            log.warning("MLflow run %s cannot be continued, a new one is made: %s", run_id, _reason(error))
            return False
        log.warning("MLflow is away, the run goes on without it for now: %s", _reason(error))
    return True


def finish_run(uri: str, run_id: str, status: Status) -> bool:
    """Close the run; a tracking server that is away is a warning, and False."""
    with _never_raise("closing the run"), _impatient():
        _client(uri).set_terminated(run_id, status)
        return True
    return False


def log_model(uri: str, run_id: str, checkpoint: Path, metrics: Mapping[str, float]) -> bool:
    """Keep a checkpoint's weights and facts as the run's artifact `model`, and its metrics as `best/...`.

    A failure is a warning, and False.
    """
    with _never_raise("logging the best checkpoint"), tempfile.TemporaryDirectory() as folder:
        for name in ("model.safetensors", "ema.safetensors", "meta.json"):
            if (checkpoint / name).exists():
                shutil.copy(checkpoint / name, folder)
        client = _client(uri)
        client.log_artifacts(run_id, folder, "model")
        best = {f"best/{key[4:]}": value for key, value in metrics.items() if key.startswith("val/")}
        client.log_batch(run_id, metrics=_metrics(best, 0))
        return True
    return False


def log_files(uri: str, run_id: str, folder: Path, to: str) -> None:
    """Keep every file of `folder` under the run's artifact folder `to`; a ValueError says why that failed."""
    with _one_line(f"MLflow run {run_id} at {uri!r} does not take {to!r}", uri):
        _client(uri).log_artifacts(run_id, str(folder), to)


def download_model(uri: str, run_id: str, folder: Path) -> Path:
    """Fetch the run's artifact `model`, a checkpoint folder, into `folder`; a ValueError says why that failed."""
    what = f"MLflow run {run_id} at {uri!r} has no model that can be fetched (give the id of a finished run)"
    with _one_line(what, uri):
        client = _client(uri)
        with _impatient():
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
        _one_line(f"MLflow run {run_id} at {uri!r} does not take the model", uri),
        _process_wide(uri, _client(uri).get_run(run_id).info.experiment_id),
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
    with _one_line(f"MLflow run {run_id} at {uri!r} cannot be read", uri):
        client = _client(uri)
        run = client.get_run(run_id)
        for key in metrics:
            if key in run.data.metrics:
                points = [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
                history[key] = sorted(points)
    return RunFacts(
        name=str(run.info.run_name), status=str(run.info.status), tags=dict(run.data.tags), history=history
    )


@contextlib.contextmanager
def _never_raise(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a tracking server can do, the training goes on
        log.warning("MLflow: %s failed: %s", doing, _reason(error))


class Tracker:
    """Rank 0's way into the driver's run: a queue and a thread, so that logging neither blocks nor raises.

    The thread sends everything that waits as one batch and tries again, in order, while the server is away. What
    the run's history holds already, because training went on from an older checkpoint or an answer was lost on the
    way, is not sent twice.

    What waits is kept with every checkpoint, and queued again by the worker that goes on from it: so whatever dies,
    a value is either stored, or in the checkpoint, or belongs to a step that is trained again.

    Args:
        unsent: what `unsent` said when the checkpoint was taken.
    """

    RETRY_S = 5.0
    BATCH = 1000  # the most metrics that the REST API takes at once

    def __init__(self, uri: str, run_id: str, unsent: Sequence[Sequence[Any]] = ()) -> None:
        from mlflow.entities import Metric
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        for (
            name,
            value,
        ) in _SHORT.items():  # the thread's own patience is longer, and ends when the server is back
            os.environ.setdefault(name, value)
        self._client = functools.partial(_client, uri)  # making one raises where the store is away
        self._run_id = run_id
        self._waiting: collections.deque[mlflow.entities.Metric] = collections.deque(
            Metric(key, value, timestamp, step) for key, value, timestamp, step in unsent
        )
        self._last_step: dict[str, int] = {}  # of each metric, in the run's history
        self._wake, self._closing, self._give_up = threading.Event(), threading.Event(), threading.Event()
        if self._waiting:
            self._wake.set()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()
        self._monitor: SystemMetricsMonitor | None = None
        with _never_raise("watching the system"):
            self._monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
            self._monitor.start()

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Queue `values` for the run's history."""
        self._waiting.extend(_metrics(values, step))
        self._wake.set()

    def unsent(self) -> list[tuple[str, float, int, int]]:
        """List what waits to be stored: name, value, time in milliseconds since 1970 and step of each."""
        return [(metric.key, metric.value, metric.timestamp, metric.step) for metric in tuple(self._waiting)]

    def files(self, folder: Path, to: str) -> None:
        """Keep every file of `folder` under the run's artifact folder `to`, at once; a failure is a warning."""
        with _never_raise(f"logging {to}"):
            self._client().log_artifacts(self._run_id, str(folder), to)

    def close(self, timeout_s: float = 60) -> int:
        """Wait until everything is stored, for `timeout_s` at most; returns how many values are not."""
        if self._monitor is not None:
            with _never_raise("watching the system"):
                self._monitor.finish()
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        self._give_up.set()
        return len(self._waiting)

    def _send_all(self) -> None:
        while not self._give_up.is_set():
            self._wake.wait()
            self._wake.clear()
            while self._waiting and not self._give_up.is_set():
                batch = list(itertools.islice(self._waiting, self.BATCH))
                try:
                    if news := self._not_yet_stored(batch):
                        self._client().log_batch(self._run_id, metrics=news, synchronous=True)
                    self._last_step |= {metric.key: metric.step for metric in news}
                except Exception as error:  # whatever a server can do, the training goes on
                    log.warning("MLflow does not take metrics, trying again: %s", _reason(error))
                    self._last_step.clear()
                    self._give_up.wait(self.RETRY_S)
                    continue
                for _ in batch:
                    self._waiting.popleft()
            if self._closing.is_set():
                return

    def _not_yet_stored(self, batch: Sequence[mlflow.entities.Metric]) -> list[mlflow.entities.Metric]:
        for key in {metric.key for metric in batch} - self._last_step.keys():
            history = self._client().get_metric_history(self._run_id, key)
            self._last_step[key] = max((point.step for point in history), default=-1)
        return [metric for metric in batch if metric.step > self._last_step[metric.key]]


def tag_run(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; a tracking server that is away is a warning."""
    with _never_raise("setting tags"):
        _client(uri).log_batch(run_id, tags=_tags(tags))


def log_values(uri: str, run_id: str, values: Mapping[str, float], *, step: int = 0) -> None:
    """Store a few metrics of a run at once; a tracking server that is away is a warning."""
    with _never_raise("logging metrics"):
        _client(uri).log_batch(run_id, metrics=_metrics(values, step))
