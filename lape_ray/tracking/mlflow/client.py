"""The connection to MLflow, and its errors in one line.

No address that it is given holds a password, which would be stored with the run: those stand in the environment of
every process that logs (MLFLOW_TRACKING_USERNAME and _PASSWORD; of a database PGPASSWORD, or its own file).

Importing mlflow takes seconds of CPU time, and every process of a run imports this module while only the driver
and rank 0 talk to the server: so it is imported where a connection is made, in `connect`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lape_ray.config import TrainConfig
from lape_ray.storage import home
from lape_ray.tracking.failures import reason
from lape_ray.values.redaction import refuse_secret

if TYPE_CHECKING:
    import mlflow

SHORT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow's own retries last minutes."""


def connect(uri: str) -> mlflow.MlflowClient:
    """Make a client, which keeps its remarks to itself; whatever the store's driver raises is raised."""
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # It prints the traceback of an error that it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow.MlflowClient(uri)


@contextlib.contextmanager
def one_line(what: str, uri: str) -> Iterator[None]:
    """Make any error of the client a ValueError of one line: `what` is wrong, why, and what to do about it."""
    try:
        yield
    except Exception as error:  # the client raises its own kinds and those of its transports
        why, fix = reason(error), "start the server, or"
        if uri.startswith("sqlite:"):
            fix = "mend the file, or"
        if "database is locked" in why:
            fix = "another process holds the file: close that process, or start an MLflow server and"
        other = "set --tracking.uri or MLFLOW_TRACKING_URI"
        raise ValueError(f"{what}: {why}; {fix} {other}") from None


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Shorten MLflow's retries, which last minutes by default; a check before the run should not."""
    before = {name: os.environ.get(name) for name in SHORT}
    os.environ.update(SHORT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


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


def check_reachable(uri: str) -> None:
    """Raise a ValueError with the reason where the tracking server does not answer."""
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with one_line(f"the MLflow server {uri!r} cannot be used", uri), impatient():
        connect(uri).search_experiments(max_results=1)


def serving_error(status: int, message: str) -> Exception:
    """Return the error that MLflow's model server answers with this status and text; of others it sends a traceback."""
    from mlflow.exceptions import MlflowException, get_error_code

    return MlflowException(message, error_code=get_error_code(status))
