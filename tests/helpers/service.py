"""The whole service for tests: a cluster of their own, a home for what runs leave, and tiny data."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlflow
import pytest
import ray
import torch
from seeds import Recorder

from helpers.threads import one_thread
from lape_ray.cluster.local import LocalCluster, executable, local_cluster
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select
from lape_ray.recipes import recipe
from lape_ray.training.loop import Training, train

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Service:
    """A cluster, a home for what runs leave, and the smoke data: five steps of 32 digits."""

    cluster: LocalCluster
    home: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.home / 'mlflow.db'}"

    def config(self, recipe_name: str = "smoke", **changes: object) -> TrainConfig:
        values = {name.replace("__", "."): value for name, value in changes.items()}
        data: dict[str, object] = {f"data.{s}": str(self.home / f"{s}.beton") for s in ("train", "val")}
        data["tracking.pages"] = False  # the submitted job makes them; they are half of a short run's time
        return replace_fields(recipe(recipe_name), {**data, **values})

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A training job on the smoke data."""
        return self.submit_job("jobs/imagenet_deit.py", *self.data(), *words)

    def submit_job(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from a laptop."""
        return subprocess.run(**self.submission(*words), capture_output=True)

    def submission(
        self, *words: str, variables: Mapping[str, str] = MappingProxyType({}), **runtime: str
    ) -> dict[str, Any]:
        """What `subprocess` needs for that: of the job, `variables` and what else its runtime environment has."""
        # Five steps end before MLflow's first sample of the system, which it takes every ten seconds.
        own = {"LAPE_RAY_HOME": str(self.home), "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.5"}
        made = json.dumps({**runtime, "env_vars": {**own, **variables}})
        command = [executable("ray"), "job", "submit", f"--address={self.cluster.dashboard}"]
        command += [f"--working-dir={ROOT}", f"--runtime-env-json={made}", "--", "python", *words]
        return {"args": command, "text": True, "env": {**os.environ, **self.cluster.environment}}

    def data(self) -> list[str]:
        return [f"--data.{split}={self.home / f'{split}.beton'}" for split in ("train", "val")]

    def run(self, run_id: str) -> mlflow.entities.Run:
        return mlflow.MlflowClient(self.uri).get_run(run_id)

    def run_of(self, output: str) -> mlflow.entities.Run:
        found = re.search(r"MLflow run ([0-9a-f]{32})", output)
        assert found, output
        return self.run(found[1])

    def losses(self, run: mlflow.entities.Run) -> list[float]:
        history = mlflow.MlflowClient(self.uri).get_metric_history(run.info.run_id, "train/loss")
        points = sorted((point.step, point.value) for point in history)
        assert len({step for step, _ in points}) == len(points), "a step was logged twice"
        return [value for _, value in points]


def alone(config: TrainConfig, resume_from: Path | None = None) -> Recorder:
    """What a config learns in this process, without Ray: what a run must learn too, whatever befalls it."""
    reporter = Recorder()
    with one_thread():
        train(config, device=torch.device("cpu"), reporter=reporter, resume_from=resume_from)
    return reporter


def weights_alone(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The weights and statistics that `alone` ends with."""
    with one_thread():
        training = Training.begin(config, device=torch.device("cpu"), reporter=Recorder())
        while training.epochs_done < training.last_epoch:
            training.epoch()
        training.close()
    return training.state.network.state_dict()


@contextlib.contextmanager
def running_cluster() -> Iterator[LocalCluster]:
    """A cluster of two CPUs that this process and those it starts are connected to, until the block ends."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # On a machine that does more than these tests a worker's imports alone can take Ray Train's minute.
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "240")
        # Before the cluster starts, whose jobs inherit what it has.
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        cluster = stack.enter_context(local_cluster(num_cpus=2))
        for key, value in cluster.environment.items():
            patch.setenv(key, value)
        # Ray reads both once, when it is imported, which was before this cluster had a token.
        ray._raylet.Config.initialize("")
        ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
        ray.init(address=cluster.address)
        yield cluster
        ray.shutdown()


@contextlib.contextmanager
def service_on(cluster: LocalCluster, home: Path) -> Iterator[Service]:
    """Write the smoke data into `home`, which is that of all runs until the block ends."""
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:16"), home / f"{split}.beton", workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPE_RAY_HOME", str(home))
        yield Service(cluster, home)


@contextlib.contextmanager
def running_service(home: Path) -> Iterator[Service]:
    """A cluster of its own, and a home on it, until the block ends."""
    with running_cluster() as cluster, service_on(cluster, home) as service:
        yield service
