"""A run on Ray: its workers on a cluster, or on a Ray that this command starts for itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from lape_ray import tracking
from lape_ray.cluster.connection import connected, refuse_little_shared_memory
from lape_ray.cluster.controller import train_to_the_end, variables
from lape_ray.cluster.pages import hand_over, make_pages
from lape_ray.cluster.rendezvous import RunSupervisor
from lape_ray.cluster.resources import wait_for_room, worker_resources
from lape_ray.cluster.run import Run
from lape_ray.cluster.supervisor import supervised
from lape_ray.cluster.worker import tell
from lape_ray.config import TrainConfig
from lape_ray.storage import Lease

PAGES_LIMIT_S = 1800.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnRay:
    """A Ray that has room for a run's workers.

    Attributes:
        use_gpu: whether workers compute on GPUs
        supervisor: the handle of the run's actor
        own: whether this command has started the Ray, which ends with it
    """

    use_gpu: bool
    supervisor: Any
    own: bool

    def train(self, run: Run, lease: Lease) -> None:
        """Train through Ray Train."""
        train_to_the_end(run, lease, self.supervisor)

    def make_pages(self, run: Run, checkpoint: str) -> None:
        """Make the pages on a worker's node, which has data and GPU: this machine, where the Ray is our own."""
        if self.own:
            return hand_over(run, checkpoint)
        task = ray.remote(make_pages).options(
            num_cpus=run.config.run.cpus_per_worker,
            num_gpus=int(run.use_gpu),
            runtime_env={"env_vars": variables()},
        )
        made = task.remote(run.config, run.tracking_uri, run.mlflow_run_id, checkpoint)
        try:
            ray.get(made, timeout=PAGES_LIMIT_S)
        except Exception as error:  # whatever goes wrong with pages, the run is trained
            ray.cancel(made, force=True)
            log.warning("the run's pages could not be made: %s", str(error).strip().splitlines()[-1])


@contextlib.contextmanager
def on_ray(config: TrainConfig, folder: str, uri: str) -> Iterator[OnRay]:
    """Connect to Ray, and wait until it has room for the run's workers.

    Raises:
        ValueError: it has not, or not all of its nodes can do what the run needs.
    """
    with connected() as own:
        use_gpu = uses_gpu(config)
        _wait_for_workers(config, use_gpu)
        refuse_local_store(uri)
        with supervised(RunSupervisor, folder, config.run.max_failures) as supervisor:
            if use_gpu and config.run.workers.high > 1:
                refuse_little_shared_memory()
            yield OnRay(use_gpu, supervisor, own)


def uses_gpu(config: TrainConfig) -> bool:
    """Tell whether workers of this config compute on GPUs of the connected cluster."""
    if config.run.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.run.device == "gpu"


def _wait_for_workers(config: TrainConfig, use_gpu: bool) -> None:
    """Wait until the cluster could hold the workers that the run needs at least; a ValueError where it cannot."""
    run = config.run
    workers = run.workers.low + run.standby_workers
    wait_for_room("the run", worker_resources(run, int(use_gpu)), workers, wait_s=run.wait_s, tell=tell)


def refuse_local_store(uri: str) -> None:
    """Raise a ValueError where the MLflow store is a file that not all nodes of the connected cluster can reach."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and tracking.is_local(uri):
        raise ValueError(
            f"the MLflow store {uri!r} is a file on this machine, but the cluster has {nodes} nodes: "
            "start an MLflow server and set MLFLOW_TRACKING_URI"
        )
