"""A run as it travels from the driver to its workers, complete and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lape_ray import storage
from lape_ray.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """Hold what the driver decided about a run, once.

    Attributes:
        config: with a name, and paths that mean the same on every node
        folder: address of its folder: checkpoints, their list, and its record
        lease: token of the owner of the run's folder; without it nothing is stored there
        tracking_uri: of MLflow
        mlflow_run_id: of the run in MLflow
        use_gpu: whether its workers compute on GPUs
        inputs: sha256 of the files that it learns from (`training.inputs`)
    """

    config: TrainConfig
    folder: str
    lease: str
    tracking_uri: str
    mlflow_run_id: str
    use_gpu: bool
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name, which the folder has too."""
        assert self.config.run.name is not None
        return self.config.run.name

    @property
    def root(self) -> str:
        """Address of the folder that runs lie in."""
        return self.folder.rpartition("/")[0]

    def check_lease(self) -> None:
        """Raise a LeaseLostError where another driver owns the run's folder by now."""
        storage.check_lease(self.folder, self.lease)
