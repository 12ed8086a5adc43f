"""What a checkpoint's readers refuse, and in which words; `test_loop` has the checkpoints of real runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lape_ray.config import TrainConfig
from lape_ray.training import checkpoint
from lape_ray.training.checkpoint import DamagedError, read_metadata, read_weights, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint of a small network."""
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    meta = checkpoint.Metadata(
        epochs_done=3, steps_done=17, config=TrainConfig(), metrics={"val/loss": float("nan")}, world_size=2
    )
    place = tmp_path / "run/checkpoint"
    place.mkdir(parents=True)
    checkpoint.snapshot(model=network, ema=network, optimizer=optimizer, metadata=meta).save(place)
    return place


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "meta.json").read_text())
    change(values)
    (folder / "meta.json").write_text(json.dumps(values))


def test_a_whole_one_is_read(folder: Path) -> None:
    verify(folder)
    assert (read_metadata(folder).steps_done, read_metadata(folder).config) == (17, TrainConfig())


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "epochs_done is '3', not a whole number": lambda v: v.update(epochs_done="3"),
    "epochs_done is True, not a whole number": lambda v: v.update(epochs_done=True),
    "steps_done is -1, not a whole number not below 0": lambda v: v.update(steps_done=-1),
    "steps_done is a number of more than 64 bits": lambda v: v.update(steps_done=10**30),
    "world_size is None, not a whole number": lambda v: v.update(world_size=None),
    "Metadata lacks world_size": lambda v: v.pop("world_size"),
    "Metadata lacks progress": lambda v: v.pop("progress"),
    "Metadata has no field ['word_size']; it has epochs_done": lambda v: v.update(
        word_size=v.pop("world_size")
    ),
    "progress is [], not an object in braces": lambda v: v.update(progress=[]),
    "progress lacks step": lambda v: v["progress"].pop("step"),
    "progress.loss is 'x', not a number": lambda v: v["progress"].update(loss="x"),
    "metrics['val/loss'] is [1], not a number": lambda v: v["metrics"].update({"val/loss": [1]}),
    "classes is 'cat', not a list": lambda v: v.update(classes="cat"),
    "classes[1] is 2, not a text": lambda v: v.update(classes=["cat", 2]),
    "config is None, not an object in braces": lambda v: v.pop("config"),
    "config.optim is 7, not an object in braces": lambda v: v["config"].update(optim=7),
    "config.model has no field ['jion']": lambda v: v["config"]["model"].update(jion="lape"),
    "config.model.depth is 2.5, not a whole number": lambda v: v["config"]["model"].update(depth=2.5),
    "config.model: join='glue' is not known; choose one of basic, share": lambda v: v["config"][
        "model"
    ].update(join="glue"),
    "config.data.mean is [0.5], not a list of 3": lambda v: v["config"]["data"].update(mean=[0.5]),
    "config.optim: lr=-1 is out of range": lambda v: v["config"]["optim"].update(lr=-1),
    "config.run.num_workers is '2', not a list": lambda v: v["config"]["run"].update(num_workers="2"),
    "format is None, not a whole number": lambda v: v.pop("format"),
    "files is ['model.safetensors'], not an object": lambda v: v.update(files=["model.safetensors"]),
}


@pytest.mark.parametrize("message", CHANGES)
def test_values_of_other_types_are_damage(folder: Path, message: str) -> None:
    """Of every reader, so that a run goes on from the checkpoint before."""
    rewrite(folder, CHANGES[message])
    for read in (read_metadata, verify, read_weights):
        with pytest.raises(DamagedError, match=re.escape(message)) as raised:
            read(folder)  # type: ignore[operator]
        assert str(raised.value).startswith(f"{folder}/meta.json is damaged: ")
        assert str(raised.value).endswith("; restore the checkpoint from a copy, or use another")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "meta.json is empty; restore"),
        (" \n", "meta.json is empty; restore"),
        ("[]", "meta.json is damaged: it is [], not an object in braces"),
        ("3", "meta.json is damaged: it is 3, not an object in braces"),
        ("{", "meta.json is damaged: Expecting property name"),
        ("[" * 100_000, "meta.json is damaged: maximum recursion depth exceeded"),
        (b"\xff\xfe{", "meta.json is damaged: "),
    ],
)
def test_a_meta_json_that_is_none(folder: Path, text: str | bytes, message: str) -> None:
    (folder / "meta.json").write_bytes(text.encode() if isinstance(text, str) else text)
    for read in (read_metadata, verify):
        with pytest.raises(DamagedError, match=re.escape(f"{folder}/{message}")):
            read(folder)


def test_another_version_is_no_damage(folder: Path) -> None:
    rewrite(folder, lambda values: values.update(format=99, epochs="many"))
    with pytest.raises(ValueError, match="has checkpoint format 99; this version reads 3") as raised:
        read_metadata(folder)
    assert not isinstance(raised.value, DamagedError)


@pytest.mark.parametrize(
    "name", ["../witness", "sub/../../witness", "/etc/passwd", "", "a\0b", ".lock", "a\\b"]
)
def test_a_file_outside_of_the_checkpoint_is_refused(folder: Path, name: str) -> None:
    """Even one that is as meta.json says."""
    (folder / "sub").mkdir()
    (folder.parent / "witness").write_text("x")
    rewrite(folder, lambda values: values["files"].update({name: as_described(folder, name)}))
    with pytest.raises(
        DamagedError, match=r"meta\.json for a file is refused, for as a file's name .*; restore"
    ):
        verify(folder)


def as_described(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    return (
        checkpoint._size_and_hash(file) if "\0" not in name and file.is_file() else {"bytes": 0, "sha256": ""}
    )


def test_a_checkpoint_must_name_its_weights(folder: Path) -> None:
    rewrite(folder, lambda values: values["files"].pop("model.safetensors"))
    with pytest.raises(
        DamagedError, match=r"model\.safetensors is damaged: its size or sha256 is not the one"
    ):
        verify(folder)


def test_weights_of_a_checkpoint_that_are_torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damage, message in ((whole[:20], "is no readable checkpoint: "), (b"", "is empty; restore")):
        file.write_bytes(damage)
        with pytest.raises(DamagedError, match=rf"model\.safetensors {message}"):
            read_weights(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([torch.zeros(2)], "holds a list, not a state dict"),
        (torch.zeros(2), "holds a Tensor, not a state dict"),
        ({"model": [1]}, "holds a list, not a state dict"),
        (
            {"model": {"head.weight": {"x": torch.zeros(2)}}},
            "its entry 'head.weight' is a dict, not a dense tensor",
        ),
        ({"epoch": 3, "head.weight": torch.zeros(2)}, "its entry 'epoch' is a int, not a dense tensor"),
        ({3: torch.zeros(2)}, "its entry 3 is a Tensor, not a dense tensor with a name"),
        (
            {"head.weight": torch.zeros(2, device="meta")},
            "its entry 'head.weight' is a Tensor, not a dense tensor",
        ),
        (
            {"head.weight": torch.zeros(2, 2).to_sparse()},
            "its entry 'head.weight' is a Tensor, not a dense tensor",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_file_that_is_no_state_dict(tmp_path: Path, saved: object, message: str) -> None:
    torch.save(saved, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_weights(tmp_path / "x.pth")
    assert str(raised.value).startswith(f"{tmp_path}/x.pth")


def test_empty_files_of_weights(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name} is empty; restore"):
            read_weights(tmp_path / name)
    save_file({"a": torch.zeros(1)}, tmp_path / "whole.safetensors")
    assert list(read_weights(tmp_path / "whole.safetensors")[0]) == ["a"]
