"""A real MLflow server for tests, which can be stopped and started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest

from lape_ray.cluster.local import executable, free_ports


class TrackingServer:
    """On a port of its own, over sqlite and a folder in `home`."""

    def __init__(self, home: Path, host: str = "127.0.0.1") -> None:
        self.home, self.host, self.port = home, host, free_ports(1)[0]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        command = [
            executable("mlflow"),
            "server",
            f"--host={self.host}",
            f"--port={self.port}",
            "--workers=1",
        ]
        command += [f"--backend-store-uri=sqlite:///{self.home}/tracking.db"]
        command += [f"--artifacts-destination={self.home}/artifacts"]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = (self.home / "server.log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                mlflow.MlflowClient(self.uri).search_experiments(max_results=1)
                return
            except mlflow.exceptions.MlflowException:
                time.sleep(0.5)
        raise TimeoutError((self.home / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def tracking_server(home: Path, host: str = "127.0.0.1") -> Iterator[TrackingServer]:
    """One that is gone at the end."""
    server = TrackingServer(home, host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        try:
            server.start()
            yield server
        finally:
            server.kill()


def history(uri: str, run_id: str) -> dict[int, tuple[float, float]]:
    """Step -> loss, and when it was logged in seconds since 1970."""
    points = mlflow.MlflowClient(uri).get_metric_history(run_id, "train/loss")
    found = {point.step: (point.value, point.timestamp / 1000) for point in points}
    assert len(found) == len(points), "a step was logged twice"
    return dict(sorted(found.items()))
