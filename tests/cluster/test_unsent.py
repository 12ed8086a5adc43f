"""What is not sent yet is kept before a checkpoint can be found: a restart takes one that is not listed, too."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from lape_ray.cluster.checkpoint_list import Listed
from lape_ray.cluster.worker import RayReporter
from lape_ray.config import TrainConfig
from lape_ray.storage import leased
from lape_ray.training.checkpoint import MARKER


@pytest.mark.parametrize("full", [False, True])
def test_values_are_kept_before_a_checkpoint_is_published(tmp_path: Path, full: bool) -> None:
    address = tmp_path / "run/checkpoint-epoch-000001"
    seen: list[bool] = []

    def save_unsent() -> None:
        seen.append(address.exists())
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    with leased(str(tmp_path / "run"), "run one") as lease:
        reporter = RayReporter(TrainConfig(), folder=str(tmp_path / "run"), lease=lease.token, first=True)
        reporter.__dict__["gauges"] = SimpleNamespace(show=lambda values: None)  # they want a Ray
        reporter.tracker = SimpleNamespace(save_unsent=save_unsent)
        new = Listed(name=address.name, steps_done=5)
        try:
            reporter._bring(new, lambda folder: (folder / MARKER).touch())
        except OSError as error:
            assert full and error.errno == errno.ENOSPC
    assert seen == [False]
    assert address.exists() is not full
