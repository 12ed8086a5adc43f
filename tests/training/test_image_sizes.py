"""Images whose size changes while a run goes on: the schedule, the resizing, and runs that go on within any phase."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.networks import FAMILIES
from helpers.recorder import KilledError, Recorder
from safetensors.torch import load_file

from lape_ray.config import DataConfig, TrainConfig, replace_fields
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select
from lape_ray.inference.card import _figures
from lape_ray.model import build_model
from lape_ray.model.convert import load_weights
from lape_ray.recipes import recipe
from lape_ray.training import state as state_module
from lape_ray.training.checkpoint import read_metadata
from lape_ray.training.loop import train
from lape_ray.training.preflight import check_before_start, check_split
from lape_ray.training.state import TrainState, build_state, resize_state
from lape_ray.training.step import optimizer_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:10"), folder / f"{split}.beton", workers=1)
    return {f"data.{split}": str(folder / f"{split}.beton") for split in ("train", "val")}


@pytest.fixture
def config(files: dict[str, str]) -> TrainConfig:
    return made(files)


def made(files: dict[str, str], **changes: object) -> TrainConfig:
    """Three epochs of three steps: two of 16 px, one of 32."""
    values = {
        **files, "optim.epochs": 3, "data.image_size_schedule": "16:0-2,32:2-3", "data.threads": 1,
        "data.eval_batch_size": 50, "run.checkpoint_steps": 2, "data.flip": 0.5, "data.crop_scale": (0.5, 1.0),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }  # fmt: skip
    return replace_fields(recipe("smoke"), values)


def run(config: TrainConfig, folder: Path, resume_from: Path | None = None) -> Recorder:
    recorder = Recorder(folder)
    train(config, device=CPU, reporter=recorder, resume_from=resume_from)
    return recorder


BAD = (
    "", "128", "128:0-200;224:200-300", "0:0-3", "16:1-3", "16:0-2,32:3-4", "16:0-2,32:1-3", "16:0-0,32:0-3", "16:2-0",
)  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_schedule_with_gaps_or_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"image_size_schedule={text!r} is not understood; write")):
        DataConfig(image_size_schedule=text)


def test_a_schedule_that_does_not_fit_the_run_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not end with optim\.epochs=4; change one of them"):
        made(files, optim__epochs=4)
    for schedule, message in (
        (
            "32:0-2,16:2-3",
            "ends with 16 px, but the model reads 32: set --model.image_size 16, or end with 32",
        ),
        ("20:0-2,32:2-3", "data.image_size_schedule, 20 px: image_size=20 does not divide by patch_size=8"),
        (
            "64:0-2,32:2-3",
            "has images of at most 32 px, but data.image_size_schedule=64:0-2,32:2-3 has 64 px: lower it",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_before_start(made(files, data__image_size_schedule=schedule), storage_root=str(tmp_path))
    check_before_start(made(files), storage_root=str(tmp_path))
    check_split(made(files, data__image_size_schedule="64:0-2,32:2-3"), "val")  # reads the model's size alone
    with pytest.raises(ValueError, match="ends with 32 px, but the model reads 16"):
        build_state(made(files, model__image_size=16), CPU)


def test_each_epoch_has_the_size_that_the_schedule_says(config: TrainConfig) -> None:
    config = replace_fields(config, {"optim.cooldown_epochs": 2})
    assert [config.at_epoch(epoch).model.image_size for epoch in range(5)] == [16, 16, 32, 32, 32]
    none = replace_fields(config, {"data.image_size_schedule": None})
    assert none.at_epoch(0) is none


def test_images_and_network_change_their_size_together(config: TrainConfig, tmp_path: Path) -> None:
    recorder = run(config, tmp_path)
    assert [epoch["train/image_size"] for epoch in recorder.epochs] == [16, 16, 32]
    tables = [load_file(tmp_path / epoch / "model.safetensors")["pos_embed"].shape[1] for epoch in "123"]
    assert tables == [1 + 4, 1 + 4, 1 + 16]
    (line,) = [line for line in recorder.lines if "from here on" in line]
    assert line == "epoch 3: images of 32 px from here on; pos_embed resized from (1, 5, 32) to (1, 17, 32)"


def test_figures_of_a_checkpoint_are_of_its_weights_and_the_models_size(
    config: TrainConfig, tmp_path: Path
) -> None:
    run(config, tmp_path)
    for name in ("1", "2", "step-8"):
        meta = read_metadata(tmp_path / name)
        assert "val/acc1" in meta.metrics and meta.evaluation == {}
        assert _figures(SimpleNamespace(trained=meta, config=config), ema=False) == ""  # type: ignore[arg-type]
    meta = read_metadata(tmp_path / "3")
    assert meta.evaluation["val/acc1"] == meta.metrics["val/acc1"]
    card = _figures(SimpleNamespace(trained=meta, config=config), ema=False)  # type: ignore[arg-type]
    assert f"| acc1 | {meta.metrics['val/acc1']:.4g} |" in card


def step(state: TrainState, epoch: int) -> None:
    optimizer_step(state, state.train_loader.epoch(epoch), epoch=epoch, step=0, lr=1e-3)


@pytest.mark.parametrize("algorithm", ["adamw", "muon", "lamb"])
def test_the_optimizer_goes_on_and_begins_anew_for_what_is_resized(
    files: dict[str, str], algorithm: str
) -> None:
    state = build_state(made(files, optim__algorithm=algorithm, optim__lr=0.3), CPU)
    step(state, 0)
    step(state, 1)
    before = {name: state.optimizer.state[value] for name, value in state.network.named_parameters()}
    weights = {name: value.clone() for name, value in state.network.state_dict().items()}
    larger, _ = resize_state(state, 2)
    for name, value in larger.network.named_parameters():
        known = larger.optimizer.state[value]
        assert (known == {}) == (name == "pos_embed")
        for key, tensor in known.items():
            assert torch.equal(tensor, before[name][key]), (name, key)
    for group, old in zip(larger.optimizer.param_groups, state.optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in old.items() if k != "params"
        }
    by_hand = build_model(state.config.model)
    load_weights(by_hand, weights)
    for network in (larger.network, larger.ema.model if larger.ema else None):
        assert network is not None
        assert network.state_dict()["pos_embed"].shape == (1, 17, 32)
    for name, value in by_hand.state_dict().items():
        assert torch.equal(larger.network.state_dict()[name], value), name
    step(larger, 2)
    for value in larger.network.parameters():
        assert larger.optimizer.state[value]


def test_each_size_is_compiled_however_many_there_are(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles a module for so many networks of a process, and then runs it uncompiled without a word."""
    sides = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        sides.append(max(one.shape[-1] for one in inputs if one.ndim == 4))  # images, and kernels of 8 x 8
        return graph.forward

    monkeypatch.setattr(
        state_module,
        "compiled",
        lambda network, *_: (torch.compile(network, backend=compiler, dynamic=False), ""),
    )
    config = made(files, data__image_size_schedule="8:0-1,16:1-2,24:2-3,32:3-4", optim__epochs=4)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        state = build_state(config, CPU)
        for epoch in range(4):
            state = state if epoch == 0 else resize_state(state, epoch)[0]
            step(state, epoch)
    assert sides == [8, 16, 24, 32]


POSITIONS = {
    "lape": {},
    "mixed, relative2d": {"model__rotary": "mixed", "model__bias": "relative2d", "model__bias_join": "lape"},
    "layer decay, erasing": {"optim__layer_decay": 0.7, "data__erase_prob": 0.5},
}  # fmt: skip
MORE = {
    "unshare, irpe_k, muon": {"model__join": "unshare", "model__bias": "irpe_k", "optim__algorithm": "muon"},
    "sincos2d, log_cpb, spiral": {"model__position": "sincos2d", "model__bias": "log_cpb", "model__rotary": "spiral"},
    "peg, lookhere": {"model__position": "peg", "model__join": "basic", "model__bias": "lookhere"},
    "mpvg, pape": {"model__join": "mpvg", "model__pool": "gap", "model__bias": "pape"},
    **FAMILIES,
}  # fmt: skip
NAMES = [*POSITIONS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


READERS = [
    {"data__backend": backend, "data__crop": crop}
    for backend in ("native", "torchvision", "resident")
    for crop in ("random_resized", "simple")
]


@pytest.mark.parametrize("changes", READERS, ids=lambda changes: "-".join(changes.values()))
def test_every_backend_changes_the_size_of_both_splits(
    files: dict[str, str], tmp_path: Path, changes: dict[str, str]
) -> None:
    """The images are those of a loader that was made for the size, and a run that is killed goes on bit for bit."""
    config = made(files, **changes)
    state = build_state(config, CPU)
    for epoch, side in ((0, 16), (2, 32)):
        state = resize_state(state, epoch)[0] if epoch else state
        fresh = build_state(config, CPU, epoch=epoch)
        for one, other in ((state.train_loader, fresh.train_loader), (state.val_loader, fresh.val_loader)):
            for (images, *_), (same, *_) in zip(one.epoch(epoch), other.epoch(epoch), strict=True):
                assert images.shape[2:] == (side, side)
                assert torch.equal(images, same)
    goes_on_bit_for_bit(config, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_bit_for_bit_within_any_phase(files: dict[str, str], tmp_path: Path, name: str) -> None:
    """Killed within the first phase and within the second, and ended where one follows the other."""
    goes_on_bit_for_bit(
        made(files, **{**(POSITIONS | MORE)[name], "data__mixup": 0.8, "model__drop_path": 0.3}), tmp_path
    )


def goes_on_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    whole = run(config, tmp_path / "whole")
    for killed_at, folder in ((2, "step-2"), (8, "step-8"), (None, "2")):
        killed, rest = (tmp_path / f"{kind}-{folder}" for kind in ("killed", "rest"))
        first = Recorder(killed, stop_at=killed_at)
        if killed_at is None:
            train(replace_fields(config, {"run.stop_after_epochs": 2}), device=CPU, reporter=first)
        else:
            with pytest.raises(KilledError):
                train(config, device=CPU, reporter=first)
        second = run(config, rest, killed / folder)
        assert first.losses + second.losses == whole.losses, folder
        assert first.epochs + second.epochs == whole.epochs
        for weights in ("model.safetensors", "ema.safetensors"):
            assert (rest / "3" / weights).read_bytes() == (tmp_path / "whole/3" / weights).read_bytes()
