"""What MLflow's list of runs opens with."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from lape_ray import tracking
from lape_ray.config import TrackingConfig, TrainConfig
from lape_ray.tracking import ui_view


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path))
    return TrainConfig(tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="e"))


def new_run(config: TrainConfig) -> dict[str, str]:
    """The tags of the experiment that it is in."""
    tracking.create_run(config, name="r", command="c", tags={}, datasets={})
    experiment = mlflow.MlflowClient(config.tracking.uri).get_experiment_by_name("e")
    assert experiment is not None
    return dict(experiment.tags)


def test_an_experiment_has_the_view(config: TrainConfig) -> None:
    tags = new_run(config)
    assert {key: tags[key] for key in ui_view.tags()} == ui_view.tags()
    state = json.loads(json.loads(tags[ui_view.TAG])["state"])
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
    assert state["compareRunCharts"][0]["metricKey"] == "val/acc1"


def test_what_a_person_wrote_stays(config: TrainConfig, tmp_path: Path) -> None:
    """An experiment that was there gets what it has not, and keeps what it has."""
    client = mlflow.MlflowClient(config.tracking.uri)
    client.create_experiment("e", artifact_location=tmp_path.as_uri(), tags={"mlflow.note.content": "mine"})
    tags = new_run(config)
    assert tags["mlflow.note.content"] == "mine"
    assert ui_view.TAG in tags
