"""What a run learns from belongs to what it is: another file behind the same name is another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from lape_ray.cluster.run import Run
from lape_ray.cluster.run_record import RECORD, earlier_run, write_run
from lape_ray.config import DataConfig, OptimConfig, RunConfig, TrainConfig, TrainingConfig, from_dict
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import image_folder
from lape_ray.training import checkpoint
from lape_ray.training.checkpoint import Metadata
from lape_ray.training.inputs import changed_inputs, input_digests


def write(path: Path, names: tuple[str, ...] = ("hen", "jay"), shade: int = 0) -> str:
    """Write (again) a .beton of one image for each class."""
    for name in names:
        (path.with_suffix("") / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (shade,) * 3).save(path.with_suffix("") / name / "x.png")
    write_beton(image_folder(path.with_suffix("")), path, workers=1)
    return str(path)


def save_ours(folder: Path, fill: float) -> str:
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, fill)
    folder.mkdir(exist_ok=True)
    meta = Metadata(epochs_done=1, steps_done=1, config=TrainConfig(), metrics={}, world_size=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    checkpoint.snapshot(model=network, ema=None, optimizer=optimizer, metadata=meta).save(folder)
    return str(folder)


def save_other(file: Path, fill: float) -> str:
    torch.save({"weight": torch.full((2,), fill)}, file)
    return str(file)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(train=write(tmp_path / "train.beton"), val=write(tmp_path / "val.beton")),
        optim=OptimConfig(teacher=f"torchvision:regnet_y_400mf:{save_other(tmp_path / 'teacher.pth', 1)}"),
        training=TrainingConfig(init_from=save_ours(tmp_path / "first", 1)),
        run=RunConfig(name="run"),
    )


CHANGES = {
    "data.train": lambda folder: write(folder / "train.beton", shade=9),
    "data.val": lambda folder: write(folder / "val.beton", shade=9),
    "names of classes": lambda folder: write(folder / "train.beton", ("hen", "jay", "owl")),
    "training.init_from": lambda folder: save_ours(folder / "first", 2),
    "optim.teacher": lambda folder: save_other(folder / "teacher.pth", 2),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_file_behind_the_same_name_is_refused(config: TrainConfig, tmp_path: Path, what: str) -> None:
    inputs, folder = input_digests(config), str(tmp_path / "run")
    assert inputs.keys() == CHANGES.keys()
    Path(folder).mkdir()
    run = Run(
        config=config,
        folder=folder,
        lease="",
        tracking_uri="",
        mlflow_run_id="0" * 32,
        use_gpu=False,
        inputs=inputs,
    )
    write_run(run, finished=False)
    assert earlier_run(config, folder, input_digests(config)) is not None, "the same files, read again"
    CHANGES[what](tmp_path)
    now = input_digests(config)
    with pytest.raises(ValueError) as raised:
        earlier_run(config, folder, now)
    assert f"{what} had sha256 {inputs[what][:12]} and has {now[what][:12]}" in str(raised.value)
    assert str(raised.value).startswith("run 'run' exists with other files behind the same names (")
    overwriting = from_dict(TrainConfig, {"run": {"name": "run", "overwrite": True}})
    assert earlier_run(overwriting, folder, now) is None, "which is the advice"


def test_a_file_that_moved_is_the_same(config: TrainConfig, tmp_path: Path) -> None:
    before = input_digests(config)
    (tmp_path / "elsewhere").mkdir()
    for name in ("train.beton", "train.beton.json"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = from_dict(
        TrainConfig, {"data": {"train": str(tmp_path / "elsewhere/train.beton"), "val": config.data.val}}
    )
    assert changed_inputs(before, input_digests(moved)) == []


def test_a_record_from_before_is_continued(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(
        config=config, folder=str(folder), lease="", tracking_uri="", mlflow_run_id="0" * 32, use_gpu=False
    )
    write_run(run, finished=False)
    text = (folder / RECORD).read_text()
    assert '"inputs": {}' in text
    (folder / RECORD).write_text(text.replace(',\n "inputs": {}', ""))
    assert "inputs" not in (folder / RECORD).read_text()
    assert earlier_run(config, str(folder), input_digests(config)) is not None
