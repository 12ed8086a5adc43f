"""Rank 0's way into the driver's run of MLflow, and what the driver does about values that have not arrived."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from lape_ray.tracking.failures import never_raise
from lape_ray.tracking.mlflow.client import SHORT, connect, impatient
from lape_ray.tracking.sender import Sender
from lape_ray.tracking.unsent import Value

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)


class MlflowTracker:
    """The tracker of one run in MLflow, which watches the system's load as well.

    Args:
        folder: address of the run's folder, for what is not sent yet.
        check: is called before something is written there; what it raises is raised.
    """

    def __init__(self, uri: str, run_id: str, folder: str, check: Callable[[], None] = lambda: None) -> None:
        for (
            name,
            value,
        ) in SHORT.items():  # the sender's own patience is longer, and ends when the server is back
            os.environ.setdefault(name, value)
        self._connect = functools.partial(connect, uri)  # making a client raises where the store is away
        self._run_id = run_id
        self._sender = Sender(_History(uri, run_id), folder, check)
        self._sender.start()
        self._watching = ThreadPoolExecutor(1, thread_name_prefix="watch")
        self._watch = functools.partial(self._watching.submit, _watch_system, uri, run_id)
        self._monitor: Future[SystemMetricsMonitor | None] | None = None

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Queue `values` for the run's history."""
        self._sender.put(values, step)
        if self._monitor is None:  # not before the first step: importing MLflow takes seconds
            self._monitor = self._watch()

    def files(self, folder: Path, to: str) -> None:
        """Keep every file of `folder` under the run's artifact folder `to`, at once; a failure is a warning."""
        with never_raise(f"MLflow: logging {to}"):
            self._connect().log_artifacts(self._run_id, str(folder), to)

    def save_unsent(self) -> None:
        """Keep what is not stored yet in the run's folder."""
        self._sender.save()

    def close(self, timeout_s: float = 60) -> None:
        """Wait until everything is stored, and keep the rest in the run's folder."""
        wait([self._watching.submit(self._end_watch)], timeout=timeout_s)
        self._watching.shutdown(wait=False)
        self._sender.close(timeout_s)

    def _end_watch(self) -> None:
        """Stop to watch the system, in the thread that began to."""
        with never_raise("MLflow: watching the system"):
            monitor = None if self._monitor is None else self._monitor.result()
            if monitor is not None:
                monitor.finish()


def send_unsent(folder: str, uri: str, run_id: str) -> bool:
    """Try once more to send what the run's workers left in its folder; returns whether nothing is left there."""
    with never_raise("MLflow: sending what is left"), impatient():
        return Sender(_History(uri, run_id), folder).send_now()
    return False


def _watch_system(uri: str, run_id: str) -> SystemMetricsMonitor | None:
    with never_raise("MLflow: watching the system"):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow").setLevel(
            logging.WARNING
        )  # it would tell that it begins, and of missing GPUs
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
        monitor.start()
        return monitor
    return None


class _History:
    """The metrics of a run, as the server has them."""

    name = "MLflow"

    def __init__(self, uri: str, run_id: str) -> None:
        self._connect, self._run_id = functools.partial(connect, uri), run_id

    def last_steps(self, names: Set[str]) -> Mapping[str, int]:
        client = self._connect()
        histories = {name: client.get_metric_history(self._run_id, name) for name in names}
        return {name: max(point.step for point in points) for name, points in histories.items() if points}

    def store(self, values: Sequence[Value]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(one.name, one.value, one.time_ms, one.step) for one in values]
        self._connect().log_batch(self._run_id, metrics=metrics, synchronous=True)
