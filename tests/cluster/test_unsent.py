"""What is not sent yet is kept before a checkpoint can be found: a restart takes one that is not listed, too."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from lape_ray.cluster.checkpoint_list import Listed
from lape_ray.cluster.checkpoint_writer import CheckpointWriter
from lape_ray.cluster.run import Run
from lape_ray.config import TrainConfig
from lape_ray.storage import leased
from lape_ray.training.checkpoint import Metadata, Snapshot


@pytest.mark.parametrize("full", [False, True])
def test_values_are_kept_before_a_checkpoint_is_published(tmp_path: Path, full: bool) -> None:
    address = tmp_path / "run/checkpoint-epoch-000001"
    seen: list[bool] = []

    def save_unsent() -> None:
        seen.append(address.exists())
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    metadata = Metadata(epochs_done=1, steps_done=5, config=TrainConfig(), metrics={}, world_size=1)
    snapshot = Snapshot(model={"weight": torch.zeros(1)}, ema=None, optimizer={}, metadata=metadata)
    with leased(str(tmp_path / "run"), "run one") as lease:
        run = Run(
            config=TrainConfig(),
            folder=str(tmp_path / "run"),
            lease=lease.token,
            tracking_uri="",
            mlflow_run_id="",
            use_gpu=False,
        )
        writer = CheckpointWriter(run, (), before_publishing=save_unsent, tell=print)
        saved = writer.begin(Listed(name=address.name, steps_done=5), snapshot)
        try:
            saved.result()
        except OSError as error:
            assert full and error.errno == errno.ENOSPC
    assert seen == [False]
    assert address.exists() is not full
