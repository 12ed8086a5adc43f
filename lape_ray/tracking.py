"""MLflow: the driver makes a run and closes it, rank 0 logs into it. Nothing here can stop the training.

Importing mlflow takes seconds of CPU time, and every process of a run imports this module while only the driver
and rank 0 talk to the server: so it is imported where a connection is made, in `_client`.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lape_ray.config import TrainConfig, dump, flatten
from lape_ray.storage import home

if TYPE_CHECKING:
    import mlflow

log = logging.getLogger(__name__)
Status = Literal["FINISHED", "FAILED", "KILLED"]


def _client(uri: str) -> mlflow.MlflowClient:
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow.MlflowClient(uri)


def _metrics(values: Mapping[str, float], step: int) -> list[mlflow.entities.Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(key, float(value), now, step) for key, value in values.items()]


def tracking_uri(config: TrainConfig) -> str:
    """The configured server, $MLFLOW_TRACKING_URI, or a sqlite file in this package's home."""
    uri = config.run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return uri or f"sqlite:///{home() / 'mlflow.db'}"


def is_local(uri: str) -> bool:
    """Whether only processes of this machine can reach the store."""
    return not uri.startswith(("http://", "https://", "databricks", "postgresql", "mysql", "mssql"))


def ui_command(uri: str) -> str:
    """What to type, or open, to look at the runs."""
    if uri.startswith("http"):
        return uri
    return f"mlflow ui --backend-store-uri {uri}"


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """MLflow retries for minutes by default; a check before the run should not."""
    settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def check_reachable(uri: str) -> None:
    """A ValueError with the reason where the tracking server does not answer."""
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        with _impatient():
            _client(uri).search_experiments(max_results=1)
    except Exception as error:  # the client raises its own kinds and those of its transports
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the MLflow server {uri!r} cannot be used: {reason}; "
            "start it, or set --run.tracking_uri or MLFLOW_TRACKING_URI"
        ) from None


def _experiment_id(client: mlflow.MlflowClient, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # Without a server artifacts would land in the current directory, which for a submitted job is temporary.
    location = (home() / "mlartifacts" / name).as_uri() if uri.startswith("sqlite:") else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another job was faster
        return str(client.get_experiment_by_name(name).experiment_id)


def create_run(config: TrainConfig, *, name: str, command: str, tags: Mapping[str, str]) -> str:
    """Make the run with its parameters, description and config; returns its id."""
    from mlflow.entities import Param, RunTag

    uri = tracking_uri(config)
    client = _client(uri)
    run = client.create_run(_experiment_id(client, config.run.experiment, uri), run_name=name)
    run_id = str(run.info.run_id)
    parameters = [Param(key, str(value)) for key, value in flatten(config).items()]
    description = f"`{config.recipe}`\n\n```\n{command}\n```"
    labels = {"mlflow.note.content": description, **tags}
    client.log_batch(run_id, params=parameters, tags=[RunTag(key, value) for key, value in labels.items()])
    client.log_text(run_id, dump(config), "config.txt")
    return run_id


def reopen_run(uri: str, run_id: str) -> bool:
    """Set an earlier run to RUNNING again; False where the server does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        _client(uri).update_run(run_id, status="RUNNING")
    except MlflowException as error:
        log.warning("MLflow run %s cannot be continued, a new one is made: %s", run_id, error)
        return False
    return True


def finish_run(uri: str, run_id: str, status: Status) -> None:
    """Close the run; a tracking server that is away is a warning."""
    with _never_raise("closing the run"):
        _client(uri).set_terminated(run_id, status)


def log_model(uri: str, run_id: str, checkpoint: Path, metrics: Mapping[str, float]) -> None:
    """Keep a checkpoint's weights and facts as the run's artifact `model`, and its metrics as `best/...`."""
    with _never_raise("logging the best checkpoint"), tempfile.TemporaryDirectory() as folder:
        for name in ("model.safetensors", "ema.safetensors", "meta.json"):
            if (checkpoint / name).exists():
                shutil.copy(checkpoint / name, folder)
        client = _client(uri)
        client.log_artifacts(run_id, folder, "model")
        best = {f"best/{key[4:]}": value for key, value in metrics.items() if key.startswith("val/")}
        client.log_batch(run_id, metrics=_metrics(best, 0))


@contextlib.contextmanager
def _never_raise(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a tracking server can do, the training goes on
        log.warning("MLflow: %s failed: %s", doing, str(error).splitlines()[0])


class Tracker:
    """Rank 0's way into the driver's run: a queue and a thread, so that logging neither blocks nor raises.

    The thread sends everything that waits as one batch and tries again, in order, while the server is away.
    """

    RETRY_S = 5.0
    BATCH = 1000  # the most metrics that the REST API takes at once

    def __init__(self, uri: str, run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._client = _client(uri)
        self._run_id = run_id
        self._waiting: collections.deque[mlflow.entities.Metric] = collections.deque()
        self._wake, self._closing, self._give_up = threading.Event(), threading.Event(), threading.Event()
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

    def close(self, timeout_s: float = 60) -> None:
        """Wait until everything is stored, for `timeout_s` at most; what is lost then is said."""
        if self._monitor is not None:
            with _never_raise("watching the system"):
                self._monitor.finish()
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        self._give_up.set()
        if self._waiting:
            log.warning(
                "MLflow: %d values could not be stored in %g s and are lost", len(self._waiting), timeout_s
            )

    def _send_all(self) -> None:
        while not self._give_up.is_set():
            self._wake.wait()
            self._wake.clear()
            while self._waiting and not self._give_up.is_set():
                batch = list(itertools.islice(self._waiting, self.BATCH))
                try:
                    self._client.log_batch(self._run_id, metrics=batch, synchronous=True)
                except Exception as error:  # whatever a server can do, the training goes on
                    log.warning("MLflow does not take metrics, trying again: %s", str(error).splitlines()[0])
                    self._give_up.wait(self.RETRY_S)
                    continue
                for _ in batch:
                    self._waiting.popleft()
            if self._closing.is_set():
                return
