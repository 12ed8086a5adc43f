"""A trial's checkpoints: whole or not there, no more than are needed, and clones; in a folder and on a remote store."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.s3_server import Gateway, gateway
from torch import nn

from lape_ray import storage
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.recipes import recipe
from lape_ray.search.shelf import Shelf
from lape_ray.storage import s3
from lape_ray.training import checkpoint
from lape_ray.training.checkpoint import DamagedError, read_metadata, verify

BASE = recipe("smoke")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(params=["folder", "remote"])
def root(
    request: pytest.FixtureRequest, server: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Where shelves are: a folder, or a bucket of a real server."""
    if request.param == "folder":
        return str(tmp_path / "here")
    for name, value in {**server.environment, "LAPE_RAY_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    bucket = f"search-{uuid.uuid4().hex}"
    s3.client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def put(shelf: Shelf, epoch: int, config: TrainConfig = BASE, *, seed: int = 0) -> str:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.AdamW(  # several groups that are decayed, as Muon has, before the one that is not
        [
            {"params": [model[0].weight], "weight_decay": 0.05},
            {"params": [model[1].weight], "weight_decay": 0.05},
            {"params": [model[0].bias], "weight_decay": 0.0},
        ]
    )
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    meta = checkpoint.Metadata(
        epochs_done=epoch, steps_done=5 * epoch, config=config, metrics={"epoch": epoch}, world_size=1
    )
    copy = checkpoint.snapshot(model=model, ema=None, optimizer=optimizer, metadata=meta)
    return shelf.put(5 * epoch, copy.save)


def test_the_newest_whole_checkpoint_of_the_config_is_found(root: str) -> None:
    shelf = Shelf(storage.join(root, "trial"))
    assert shelf.names() == []
    assert shelf.newest_whole(BASE, None) is None
    names = [put(shelf, epoch) for epoch in (1, 2, 12)]
    assert names == ["checkpoint-000000005", "checkpoint-000000010", "checkpoint-000000060"]
    assert shelf.names() == names[::-1]
    assert shelf.newest_whole(BASE, None) == names[2]
    storage.write_text(storage.join(shelf.address(names[2]), "model.safetensors"), "torn")
    assert shelf.newest_whole(BASE, None) == names[1]
    assert shelf.newest_whole(replace_fields(BASE, {"optim.lr": 0.5}), None) is None
    shelf.drop_all_but({names[0]})
    assert shelf.names() == [names[0]]
    with shelf.opened(names[0]) as folder:
        verify(folder)
        assert read_metadata(folder).epochs_done == 1


def test_an_interrupted_write_leaves_no_checkpoint(root: str) -> None:
    shelf = Shelf(storage.join(root, "trial"))
    first = put(shelf, 1)

    def torn(to: Path) -> None:
        (to / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.put(10, torn)
    assert shelf.names() == [first]


def test_a_clone_has_the_sources_weights_and_its_own_settings(root: str) -> None:
    source, own = Shelf(storage.join(root, "source")), Shelf(storage.join(root, "own"))
    put(source, 1, seed=1)
    from_source = put(source, 2, seed=2)
    before = put(own, 2, seed=3)
    settings = {"optim.lr": 0.25, "optim.weight_decay": 0.2}
    config, what = replace_fields(BASE, settings), {"epoch": 2, "source": 7}
    name, weights = own.clone(source, config, what)
    assert name == before
    with own.opened(name) as ours, source.opened(from_source) as theirs:
        verify(ours)
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        assert (
            weights == json.loads((theirs / "meta.json").read_text())["files"]["model.safetensors"]["sha256"]
        )
        assert read_metadata(ours).config == config
        mine, other = (torch.load(folder / "optimizer.pt") for folder in (ours, theirs))
        assert [group["weight_decay"] for group in mine["param_groups"]] == [0.2, 0.2, 0.0]
        assert torch.equal(mine["state"][0]["exp_avg"], other["state"][0]["exp_avg"])


def test_after_a_clone_nothing_older_is_taken_up_again(root: str) -> None:
    """Also where the clone's settings happen to be the old ones, which the config cannot tell apart."""
    source, own = Shelf(storage.join(root, "source")), Shelf(storage.join(root, "own"))
    put(source, 2, seed=2)
    put(own, 2, seed=3)
    what = {"epoch": 2, "source": 7}
    assert own.newest_whole(BASE, None) is not None
    assert own.newest_whole(BASE, what) is None
    name, _ = own.clone(source, BASE, what)
    assert own.newest_whole(BASE, what) == name
    assert own.newest_whole(BASE, {"epoch": 2, "source": 8}) is None
    later = put(own, 3)
    assert own.newest_whole(BASE, what) == later


def test_a_source_without_that_epoch_is_told(root: str) -> None:
    source, own = Shelf(storage.join(root, "source")), Shelf(storage.join(root, "own"))
    put(source, 1)
    with pytest.raises(DamagedError, match="no whole checkpoint of epoch 2 to be cloned"):
        own.clone(source, BASE, {"epoch": 2, "source": 7})
