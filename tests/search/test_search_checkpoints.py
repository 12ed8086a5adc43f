"""A trial's checkpoints: whole or not there, no more than are needed, and clones; in a folder and on a remote store."""

from __future__ import annotations

import dataclasses
import json
import math
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
from lape_ray.search.checkpoints import History, TrialFolder, read_history
from lape_ray.search.record import Epoch, best_epoch
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
    """Where trials are: a folder, or a bucket of a real server."""
    if request.param == "folder":
        return str(tmp_path / "here")
    for name, value in {**server.environment, "LAPE_RAY_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    bucket = f"search-{uuid.uuid4().hex}"
    s3.client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def history(epochs: int, lineage: tuple[tuple[int, int], ...] = ()) -> History:
    """Of a trial of that many epochs, trained under the lineage as far as it goes back."""
    trained = [
        Epoch(epoch=at, metrics={"val/acc1": 10.0 * at}, seconds=1.0, steps_done=5 * at)
        for at in range(1, epochs + 1)
    ]
    return History(lineage=lineage, epochs=tuple(trained))


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))


def optimizer_of(model: nn.Sequential, *, decay: float) -> torch.optim.Optimizer:
    """Several groups that are decayed, as Muon has, before the one that is not."""
    first, second = model
    return torch.optim.AdamW(
        [
            {"params": [first.weight], "weight_decay": decay},
            {"params": [second.weight], "weight_decay": decay},
            {"params": [first.bias], "weight_decay": 0.0},
        ]
    )


def put(
    folder: TrialFolder,
    epoch: int,
    config: TrainConfig = BASE,
    *,
    seed: int = 0,
    lineage: tuple[tuple[int, int], ...] = (),
) -> str:
    model = network(seed)
    optimizer = optimizer_of(model, decay=0.05)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    metadata = checkpoint.Metadata(
        epochs_done=epoch, steps_done=5 * epoch, config=config, metrics={"epoch": epoch}, world_size=1
    )
    copy = checkpoint.snapshot(model=model, ema=None, optimizer=optimizer, metadata=metadata)
    return folder.put(5 * epoch, copy.save, history(epoch, lineage))


def test_the_newest_whole_checkpoint_of_the_config_is_found(root: str) -> None:
    """With it the curve, which lies beside the weights and is as whole as they."""
    folder = TrialFolder(storage.join(root, "trial"))
    assert folder.names() == []
    assert folder.newest(BASE, ()) == (None, History())
    names = [put(folder, epoch) for epoch in (1, 2, 12)]
    assert names == ["checkpoint-000000005", "checkpoint-000000010", "checkpoint-000000060"]
    assert folder.names() == names[::-1]
    assert folder.newest(BASE, ()) == (names[2], history(12))
    storage.write_text(storage.join(folder.address(names[2]), "model.safetensors"), "torn")
    assert folder.newest(BASE, ()) == (names[1], history(2))
    assert folder.newest(replace_fields(BASE, {"optim.lr": 0.5}), ())[0] is None
    storage.write_text(storage.join(folder.address(names[1]), "history.json"), "{}")
    assert folder.newest(BASE, ()) == (names[0], history(1))
    folder.drop_all_but({names[0]})
    assert folder.names() == [names[0]]
    with folder.opened(names[0]) as files:
        verify(files)
        assert read_metadata(files).epochs_done == 1


def test_an_interrupted_write_leaves_no_checkpoint(root: str) -> None:
    folder = TrialFolder(storage.join(root, "trial"))
    first = put(folder, 1)

    def torn(to: Path) -> None:
        (to / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.put(10, torn, history(2))
    assert folder.names() == [first]


def test_a_clone_has_the_sources_weights_its_own_settings_and_its_own_curve(root: str) -> None:
    source, own = TrialFolder(storage.join(root, "source")), TrialFolder(storage.join(root, "own"))
    put(source, 1, seed=1)
    from_source = put(source, 2, seed=2)
    before = put(own, 2, seed=3)
    config = replace_fields(BASE, {"optim.lr": 0.25, "optim.weight_decay": 0.2})
    lineage = ((2, 7),)
    missing, known = own.newest(config, lineage)
    assert missing is None
    name, known = own.clone(source, config, known)
    assert name == before
    with own.opened(name) as ours, source.opened(from_source) as theirs:
        verify(ours)
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        weights = json.loads((theirs / "meta.json").read_text())["files"]["model.safetensors"]["sha256"]
        assert read_history(ours) == known
        assert known.loaded == ({"epoch": 2, "source": 7, "weights": weights},)
        assert known.epochs == history(2).epochs
        assert read_metadata(ours).config == config
        model = network(0)
        optimizer = optimizer_of(model, decay=0.2)
        checkpoint.restore(ours, config, model=model, ema=None, optimizer=optimizer)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
        other = torch.load(theirs / "optimizer.pt")
        assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], other["state"][0]["exp_avg"])


def test_after_a_clone_nothing_older_is_taken_up_again(root: str) -> None:
    """Also where the clone's settings happen to be the old ones, which the config cannot tell apart."""
    source, own = TrialFolder(storage.join(root, "source")), TrialFolder(storage.join(root, "own"))
    put(source, 2, seed=2)
    put(own, 2, seed=3)
    lineage = ((2, 7),)
    assert own.newest(BASE, ())[0] is not None
    missing, known = own.newest(BASE, lineage)
    assert missing is None
    name, _ = own.clone(source, BASE, known)
    assert own.newest(BASE, lineage)[0] == name
    assert own.newest(BASE, ((2, 8),))[0] is None
    later = put(own, 3, lineage=lineage)
    assert own.newest(BASE, lineage) == (later, history(3, lineage))


def test_epochs_from_before_a_clone_are_known_without_their_weights(root: str) -> None:
    """A search that lost all of Tune's snapshots asks for them again, from the beginning."""
    own = TrialFolder(storage.join(root, "own"))
    name = put(own, 5, lineage=((2, 7), (4, 3)))
    own.drop_all_but({name})
    for lineage, epochs in (((), 2), (((2, 7),), 4), (((2, 7), (4, 3)), 5), (((2, 8),), 2)):
        found, known = own.newest(BASE, lineage)
        assert len(known.epochs) == epochs
        assert (found == name) == (epochs == 5)


def test_a_source_without_that_epoch_is_told(root: str) -> None:
    source, own = TrialFolder(storage.join(root, "source")), TrialFolder(storage.join(root, "own"))
    put(source, 1)
    with pytest.raises(DamagedError, match="no whole checkpoint of epoch 2 to be cloned"):
        own.clone(source, BASE, history(2, ((2, 7),)))


def test_the_best_epoch_is_the_last_of_equals_and_a_number() -> None:
    epochs = [*history(3).epochs, Epoch(epoch=4, metrics={"val/acc1": math.nan}, seconds=1.0)]
    epochs.append(dataclasses.replace(epochs[2], epoch=5))
    assert best_epoch(epochs, "val/acc1", 1) == epochs[4]
    assert best_epoch(epochs, "val/acc1", -1) == epochs[0]
    assert best_epoch(epochs, "val/loss", 1) is None
    sized = [
        Epoch(epoch=number, metrics={"val/acc1": 90.0 - number, "train/image_size": side}, seconds=1.0)
        for number, side in ((1, 16), (2, 16), (3, 32), (4, 32))
    ]
    assert best_epoch(sized, "val/acc1", 1) == sized[2]  # others are not of the same images
    assert best_epoch(sized[:2], "val/acc1", 1) == sized[0]
