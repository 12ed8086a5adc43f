"""What the tests of trackers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lape_ray import tracking


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database that MLflow has made, which takes it seconds."""
    file = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    tracking.check_reachable(f"sqlite:///{file}")
    return file
