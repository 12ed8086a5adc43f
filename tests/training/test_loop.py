"""The loop: resuming, several workers, accumulation, evaluation, distillation, divergence. No Ray, no FFCV."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing as mp
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.networks import FAMILIES
from helpers.recorder import KilledError, Recorder
from safetensors.torch import load_file
from torch import Tensor

from lape_ray.config import Span, TrainConfig, replace_fields
from lape_ray.data.batch import Batch
from lape_ray.data.sampler import rank_part, sample_index, train_epoch_index, train_keys
from lape_ray.data.split import SplitInfo
from lape_ray.recipes import recipe
from lape_ray.training import checkpoint
from lape_ray.training import loop as train_module
from lape_ray.training import state as state_module
from lape_ray.training import step as step_module

CPU = torch.device("cpu")
Workers = Callable[..., dict[str, Any]]


class MemoryLoader:
    """Random images in memory, in the order of the real loader."""

    def __init__(
        self, split: str, *, batch_size: int, micro_batches: int, rank: int, world_size: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(7 if split == "train" else 8)
        self.images = torch.randint(256, (101, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(10, (101,), generator=generator)
        self.images[:, 0] = (self.labels * 25).to(torch.uint8)[:, None, None]  # something to learn
        self.split, self.batch_size, self.seed = split, batch_size, seed
        classes = tuple(f"class {label}" for label in range(10))
        self.info = SplitInfo(path=split, num_samples=101, classes=classes, largest_side=32, sha256=None)
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches

    def _part(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        place = {"rank": self.rank, "world_size": self.world_size}
        if self.split == "val":
            index = rank_part(np.arange(101), **place)
            return index, index
        size = {"batch_size": self.batch_size, "micro_batches": self.micro_batches}
        keys = train_keys(101, step_samples=math.prod(size.values()), seed=self.seed, epoch=epoch)
        epoch_index = train_epoch_index(len(keys), **size, **place)
        return sample_index(keys[epoch_index]), epoch_index

    def __len__(self) -> int:
        return -(-len(self._part(0)[0]) // self.batch_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        index, epoch_index = self._part(epoch)
        for first in range(start * self.batch_size, len(index), self.batch_size):
            part = slice(first, first + self.batch_size)
            yield Batch(self.images[index[part]], self.labels[index[part]], epoch_index[part])


def memory_loader(data: object, split: str, **kwargs: Any) -> MemoryLoader:
    for name in ("image_size", "device", "threads"):
        kwargs.pop(name)
    return MemoryLoader(split, **kwargs)


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "build_loader", memory_loader)


def smoke(**changes: object) -> TrainConfig:
    values = {
        "optim.epochs": 3,
        "data.eval_batch_size": 16,
        **{k.replace("__", "."): v for k, v in changes.items()},
    }
    return replace_fields(recipe("smoke"), values)


RANDOM = {"data__mixup": 0.8, "data__cutmix": 1.0, "model__drop_path": 0.3, "model__attention_dropout": 0.1}


def run(config: TrainConfig, folder: Path | None = None, resume_from: Path | None = None) -> Recorder:
    recorder = Recorder(folder)
    train_module.train(config, device=CPU, reporter=recorder, resume_from=resume_from)
    return recorder


def test_losses_fall_and_lines_read_well() -> None:
    recorder = run(smoke(optim__epochs=6, optim__lr=3e-3))
    assert len(recorder.losses) == 18
    assert np.mean(recorder.losses[-3:]) < np.mean(recorder.losses[:3]) - 0.1
    assert recorder.lines[0].startswith("epoch 1/6  step 1/3  loss 2.3")
    assert "images/s  ETA 0:00:" in recorder.lines[0]
    assert recorder.lines[3].startswith("epoch 1/6 done  val loss ")
    assert {"val/acc1", "val/acc5", "val/loss", "val_ema/acc1", "train/epoch_loss"} <= set(recorder.epochs[0])


def test_a_step_says_how_long_it_waited_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    real, times = MemoryLoader.epoch, []

    def slow(self: MemoryLoader, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        for batch in real(self, epoch, start=start):
            time.sleep(0.05)
            yield batch

    class Clock(Recorder):
        def step(self, metrics: dict[str, float], *, step: int) -> None:
            times.append((metrics["train/data_wait_s"], metrics["train/step_s"]))

    monkeypatch.setattr(MemoryLoader, "epoch", slow)
    train_module.train(smoke(optim__epochs=1), device=CPU, reporter=Clock())
    assert len(times) == 3
    assert all(0.05 <= wait < whole for wait, whole in times)


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, after: int) -> None:
    """Bit for bit, with every source of randomness on."""
    config = smoke(**RANDOM)
    whole = run(config, tmp_path / "whole")
    part = run(replace_fields(config, {"run.stop_after_epochs": after}), tmp_path / "part")
    rest = run(config, tmp_path / "rest", resume_from=tmp_path / "part" / str(after))
    assert part.losses + rest.losses == whole.losses
    assert part.epochs + rest.epochs == whole.epochs
    for name in ("model.safetensors", "ema.safetensors"):
        assert (tmp_path / "whole/3" / name).read_bytes() == (tmp_path / "rest/3" / name).read_bytes()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_killed_within_an_epoch_equals_an_undisturbed_one(tmp_path: Path, accumulate: int) -> None:
    """Three steps an epoch, a checkpoint after each second step of an epoch; the sums of losses go on as well."""
    config = smoke(**RANDOM, run__checkpoint_steps=2, run__log_steps=3, optim__accumulate=accumulate)
    whole = run(config, tmp_path / "whole")
    for epoch in range(3):
        step = 3 * epoch + 2
        killed = Recorder(tmp_path / f"killed-{step}", stop_at=step)
        with pytest.raises(KilledError):
            train_module.train(config, device=CPU, reporter=killed)
        rest = run(config, tmp_path / f"rest-{step}", tmp_path / f"killed-{step}" / f"step-{step}")
        assert rest.lines[0] == f"continuing after epoch {epoch} of 3 and step 2 of 3"
        assert killed.losses + rest.losses == whole.losses
        assert killed.epochs + rest.epochs == whole.epochs
        for name in ("model.safetensors", "ema.safetensors"):
            assert (tmp_path / "whole/3" / name).read_bytes() == (
                tmp_path / f"rest-{step}" / "3" / name
            ).read_bytes()


def test_a_run_killed_within_an_epoch_goes_on_with_fewer_workers(
    tmp_path: Path, with_workers: Workers
) -> None:
    """The micro-batches stay, with all that is drawn for them; so the losses are the same."""
    config = smoke(**RANDOM, run__checkpoint_steps=2, optim__accumulate=2)
    whole = run(config)
    killed = with_workers(2, config, stop_at=5)
    rest = run(config, resume_from=tmp_path / "2" / "step-5")
    np.testing.assert_allclose(killed["losses"] + rest.losses, whole.losses, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_bit_for_bit(tmp_path: Path, family: str) -> None:
    config = smoke(**{**RANDOM, **FAMILIES[family]}, run__checkpoint_steps=2, optim__accumulate=2)
    whole = run(config, tmp_path / "whole")
    killed = Recorder(tmp_path / "killed", stop_at=5)
    with pytest.raises(KilledError):
        train_module.train(config, device=CPU, reporter=killed)
    rest = run(config, tmp_path / "rest", tmp_path / "killed/step-5")
    assert killed.losses + rest.losses == whole.losses
    assert killed.epochs + rest.epochs == whole.epochs
    for name in ("model.safetensors", "ema.safetensors"):
        assert (tmp_path / "whole/3" / name).read_bytes() == (tmp_path / "rest/3" / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_in_bfloat16(family: str) -> None:
    plain, short = (
        run(smoke(**FAMILIES[family], optim__epochs=2, training__precision=precision))
        for precision in ("fp32", "bf16")
    )
    assert short.losses != plain.losses
    np.testing.assert_allclose(short.losses, plain.losses, rtol=0.02)
    assert short.epochs[-1]["val_ema/loss"] == pytest.approx(plain.epochs[-1]["val_ema/loss"], rel=0.02)


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 2), (3, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_the_same_on_any_number_of_workers(
    tmp_path: Path, family: str, size: int, micro_batches: int, with_workers: Workers
) -> None:
    """Running statistics too: evaluation reads them, on each worker its own."""
    config = smoke(**{**RANDOM, **FAMILIES[family]}, optim__accumulate=micro_batches)
    one, several = run(config, tmp_path / "one"), with_workers(size, config)
    np.testing.assert_allclose(several["losses"], one.losses, rtol=1e-4)
    for a, b in zip(one.epochs, several["epochs"], strict=True):
        assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-4)
        assert b["val_ema/loss"] == pytest.approx(a["val_ema/loss"], rel=1e-4)
    wanted, found = (load_file(tmp_path / each / "3/model.safetensors") for each in ("one", str(size)))
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            assert value == found[name] == 9, "one step more for each optimizer step"
        elif "running" in name:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def kept(folder: Path, name: str = "model") -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def probe(folder: Path, family: str) -> TrainConfig:
    """Train a network into `folder` for an epoch, and return the config that trains its head for two more."""
    fields = FAMILIES.get(family, {"model__variant": family})
    run(smoke(**fields, optim__epochs=1), folder)
    probing = {
        "optim__epochs": 2, "optim__train": "head", "optim__accumulate": 2, "optim__algorithm": "muon",
        "optim__lr": 0.01, "run__checkpoint_steps": 2, "training__init_from": str(folder / "1"),
    }  # fmt: skip
    return smoke(**{**RANDOM, **fields, **probing})


@pytest.mark.parametrize("family", ["deit_tiny_distilled", *FAMILIES])
def test_the_head_alone_is_trained(tmp_path: Path, family: str) -> None:
    """All else stays as it began, statistics too, and a run that goes on within an epoch ends with the same bits."""
    config = probe(tmp_path / "before", family)
    whole = run(config, tmp_path / "whole")
    before = kept(tmp_path / "before/1")
    for name in ("model", "ema"):
        for key, value in kept(tmp_path / "whole/2", name).items():
            assert torch.equal(value, before[key]) == (not key.startswith("head")), key
    rest = run(config, tmp_path / "rest", tmp_path / "whole/step-5")
    assert rest.epochs == whole.epochs[1:]
    for key, value in kept(tmp_path / "whole/2").items():
        assert torch.equal(value, kept(tmp_path / "rest/2")[key]), key


def test_two_workers_train_the_head_as_one_does(tmp_path: Path, with_workers: Workers) -> None:
    """No gradient is missed by DDP, and the statistics of batch norms stay on both."""
    config = probe(tmp_path / "before", "ceit_tiny")
    np.testing.assert_allclose(with_workers(2, config)["losses"], run(config).losses, rtol=1e-5)
    before = kept(tmp_path / "before/1")
    for key, value in kept(tmp_path / "2/2").items():
        assert torch.equal(value, before[key]) == (not key.startswith("head")), key


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_layers_keep_their_learning_rates_in_a_run_that_goes_on(tmp_path: Path, algorithm: str) -> None:
    config = smoke(optim__layer_decay=0.5, optim__algorithm=algorithm, run__checkpoint_steps=2)
    whole = run(config, tmp_path / "whole")
    rest = run(config, tmp_path / "rest", tmp_path / "whole/step-5")
    assert rest.epochs == whole.epochs[1:]
    for key, value in kept(tmp_path / "whole/3").items():
        assert torch.equal(value, kept(tmp_path / "rest/3")[key]), key
    alike = run(smoke(optim__algorithm=algorithm), tmp_path / "alike")
    assert alike.losses != whole.losses


def test_an_optimizer_from_before_layers_had_learning_rates_goes_on(tmp_path: Path) -> None:
    config = smoke(run__checkpoint_steps=2)
    whole = run(config, tmp_path)
    folder = tmp_path / "step-5"
    state = torch.load(folder / "optimizer.pt")
    for group in state["param_groups"]:
        del group["lr_scale"]
    torch.save(state, folder / "optimizer.pt")
    meta = json.loads((folder / "meta.json").read_text())
    for name in ("layer_decay", "train"):
        del meta["config"]["optim"][name]
    (folder / "meta.json").unlink()
    meta["files"] = checkpoint.file_checksums(folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert run(config, resume_from=folder).epochs == whole.epochs[1:]


def test_a_machine_that_leaves_and_time_are_reasons_for_a_checkpoint(tmp_path: Path) -> None:
    """They are seen on log steps, and acted upon one step later, by all workers at once."""
    leaving = Recorder(tmp_path / "leaving", leaves=True)
    train_module.train(smoke(optim__epochs=1, run__log_steps=1), device=CPU, reporter=leaving)
    assert sorted(path.name for path in (tmp_path / "leaving").iterdir()) == ["1", "step-2"]
    run(smoke(optim__epochs=1, run__log_steps=1, run__checkpoint_minutes=1e-6), tmp_path / "late")
    assert sorted(path.name for path in (tmp_path / "late").iterdir()) == ["1", "step-2"]
    run(smoke(optim__epochs=1, run__log_steps=1), tmp_path / "never")
    assert sorted(path.name for path in (tmp_path / "never").iterdir()) == ["1"]


@pytest.mark.parametrize("told_at", [1, 2, 3, 5])
def test_a_run_that_is_told_to_stop_goes_on_as_if_it_never_had(tmp_path: Path, told_at: int) -> None:
    """Also after the last step of an epoch, before its evaluation; the step after the news is the last."""
    config = smoke(**RANDOM, run__log_steps=2)
    whole = run(config)
    stopped = Recorder(tmp_path / "stopped", told_at=told_at)
    epoch, step = divmod(told_at, 3)
    with pytest.raises(
        train_module.StoppedError, match=f"stopped after epoch {epoch} and step {step + 1} of 3"
    ):
        train_module.train(config, device=CPU, reporter=stopped)
    rest = run(config, tmp_path / "rest", tmp_path / "stopped" / f"step-{told_at + 1}")
    assert stopped.losses + rest.losses == whole.losses
    assert stopped.epochs + rest.epochs == whole.epochs


def test_two_workers_stop_at_the_same_step(tmp_path: Path, with_workers: Workers) -> None:
    """Only one of them is told."""
    config = smoke(optim__accumulate=2)
    stopped = with_workers(2, config, told_at=4)
    rest = run(config, resume_from=tmp_path / "2" / "step-5")
    np.testing.assert_allclose(stopped["losses"] + rest.losses, run(config).losses, rtol=1e-5)


def test_a_loss_that_is_no_number_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the checkpoint is due long before the next log step."""
    calls: list[int] = []
    real = step_module.training_loss

    def poisoned(*arguments: Any) -> Tensor:
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(step_module, "training_loss", poisoned)
    with pytest.raises(train_module.DivergedError, match="loss is nan at epoch 2, step 2"):
        run(smoke(run__checkpoint_steps=1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "step-1", "step-2", "step-4"]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json"])
def test_a_damaged_checkpoint_is_found(tmp_path: Path, name: str) -> None:
    config = smoke(optim__epochs=1)
    run(config, tmp_path)
    file = tmp_path / "1" / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], None):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        if name == "meta.json" and damaged and len(damaged) == len(whole):
            continue  # one wrong bit of a number in it goes unseen
        with pytest.raises(checkpoint.DamagedError, match=name):
            run(config, resume_from=tmp_path / "1")


def test_a_checkpoint_names_the_classes(tmp_path: Path) -> None:
    run(smoke(optim__epochs=1, run__checkpoint_steps=1), tmp_path)
    names = tuple(f"class {label}" for label in range(10))
    assert checkpoint.read_metadata(tmp_path / "1").classes == names
    assert checkpoint.read_metadata(tmp_path / "step-1").classes == names


def test_a_checkpoint_from_before_class_names_goes_on(tmp_path: Path) -> None:
    run(smoke(), tmp_path)
    file = tmp_path / "2/meta.json"
    values = json.loads(file.read_text())
    del values["classes"]
    file.write_text(json.dumps(values))
    assert checkpoint.read_metadata(tmp_path / "2").classes is None
    recorder = run(smoke(), tmp_path / "again", resume_from=tmp_path / "2")
    assert len(recorder.epochs) == 1
    assert checkpoint.read_metadata(tmp_path / "again/3").classes is not None


def test_the_same_seed_repeats_and_another_does_not() -> None:
    first, again, other = (run(smoke(**RANDOM, training__seed=seed)).losses for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_accumulation_equals_the_whole_batch() -> None:
    whole, parts = run(smoke()), run(smoke(optim__accumulate=4))
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
    assert parts.epochs[-1]["val/acc1"] == whole.epochs[-1]["val/acc1"]


def _one_of(rank: int, size: int, port: int, config: TrainConfig, out: Path, stops: dict[str, int]) -> None:
    state_module.build_loader = memory_loader  # type: ignore[assignment]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    told_at = stops.get("told_at") if rank == 1 else None
    recorder = Recorder(
        out.with_suffix("") if rank == 0 else None, stop_at=stops.get("stop_at"), told_at=told_at
    )
    with contextlib.suppress(KilledError, train_module.StoppedError):
        train_module.train(config, device=CPU, reporter=recorder)
    dist.barrier()  # neither takes the group away while the other still needs it
    if rank == 0:
        torch.save({"losses": recorder.losses, "epochs": recorder.epochs}, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Three, which stay: each needs seconds to import torch."""
    with ProcessPoolExecutor(3, mp_context=mp.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def with_workers(processes: ProcessPoolExecutor, tmp_path: Path) -> Workers:
    """Trains a config with that many workers, and returns rank 0's losses and epochs."""

    def train(size: int, config: TrainConfig, **stops: int) -> dict[str, Any]:
        return _with_workers(processes, size, config, tmp_path, **stops)

    return train


def _with_workers(
    processes: ProcessPoolExecutor, size: int, config: TrainConfig, tmp_path: Path, **stops: int
) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / f"{size}.pt"
    if config.micro_batches % size:
        workers = {"run.num_workers": Span(size, config.micro_batches), "optim.accumulate": 1}
    else:
        workers = {"run.num_workers": size, "optim.accumulate": config.micro_batches // size}
    config = replace_fields(config, workers)
    ranks = [processes.submit(_one_of, rank, size, port, config, out, stops) for rank in range(size)]
    for rank in ranks:
        rank.result(timeout=200)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 2), (2, 4), (3, 4)])
def test_any_number_of_workers_gives_the_same_losses(
    tmp_path: Path, size: int, micro_batches: int, with_workers: Workers
) -> None:
    """With every draw on: mixing, stochastic depth and augmentation belong to micro-batches, and not to workers.

    Three workers share out four micro-batches: one of them has two, and counts twice.
    """
    config = smoke(**RANDOM, optim__accumulate=micro_batches)
    one, two = run(config), with_workers(size, config)
    np.testing.assert_allclose(two["losses"], one.losses, rtol=1e-5)
    for a, b in zip(one.epochs, two["epochs"], strict=True):
        assert b["val/acc1"] == a["val/acc1"]  # 101 images, 51 and 50: each counted once
        assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-5)


def test_every_position_trains_on_two_workers(tmp_path: Path, with_workers: Workers) -> None:
    """No parameter is left without a gradient, which DDP would refuse."""
    position = {"model__bias": "relative2d", "model__bias_join": "lape", "model__rotary": "mixed"}
    config = smoke(optim__epochs=1, optim__accumulate=2, **position)
    assert np.isfinite(with_workers(2, config)["losses"]).all()


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    run(smoke(optim__epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"another config \(optim\.lr: 0\.001 -> 0\.002\)"):
        run(smoke(optim__epochs=1, optim__lr=2e-3), resume_from=tmp_path / "1")
    with pytest.raises(ValueError, match="no checkpoint of ours: it has no meta"):
        run(smoke(optim__epochs=1), resume_from=tmp_path)


def test_training_starts_from_given_weights_with_a_new_head(tmp_path: Path) -> None:
    run(smoke(optim__epochs=1), tmp_path)
    config = smoke(
        optim__epochs=1,
        optim__lr=0,
        optim__min_lr=0,
        optim__warmup_lr=0,
        training__init_from=str(tmp_path / "1"),
    )
    same = run(config, tmp_path / "same")
    before, _ = checkpoint.read_weights(tmp_path / "1")
    after, _ = checkpoint.read_weights(tmp_path / "same/1")
    torch.testing.assert_close(after, before)
    assert same.lines[0].startswith("epoch")
    other = run(replace_fields(config, {"model.num_classes": 12}), tmp_path / "other")
    assert "head.weight (10, 32) left out: the model has 12 classes" in other.lines[1]


def test_divergence_stops_with_advice() -> None:
    with pytest.raises(
        train_module.DivergedError, match=r"loss is (nan|inf) at epoch \d+, step \d: lower optim\.lr"
    ):
        run(smoke(optim__lr=1000, optim__weight_decay=1000, optim__clip_norm=None, optim__epochs=20))


def test_a_distilled_student_learns_from_its_teacher(tmp_path: Path) -> None:
    run(smoke(optim__epochs=1), tmp_path)
    config = smoke(model__variant="deit_tiny_distilled", optim__teacher=str(tmp_path / "1"))
    with_teacher, without = run(config), run(replace_fields(config, {"optim.teacher": None}))
    assert with_teacher.losses != without.losses
    with pytest.raises(ValueError, match="has 10 classes, the student 11"):
        run(replace_fields(config, {"model.num_classes": 11}))


def test_weights_of_any_file_are_read_or_refused(tmp_path: Path) -> None:
    import argparse

    weights = {"head.weight": torch.zeros(2, 2)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / "official.pth")
    state, config = checkpoint.read_weights(tmp_path / "official.pth")
    assert config is None
    assert state.keys() == weights.keys()
    (tmp_path / "torn.pth").write_bytes((tmp_path / "official.pth").read_bytes()[:200])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for name in ("torn.pth", "torn.safetensors"):
        with pytest.raises(ValueError, match=f"{name} "):
            checkpoint.read_weights(tmp_path / name)
    torch.save({"model": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        checkpoint.read_weights(tmp_path / "code.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.read_weights(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="holds no moving average; leave --ema out"):
        checkpoint.read_weights(tmp_path / "official.pth", ema=True)


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_compressed_gradients_train_nearly_the_same(compression: str, with_workers: Workers) -> None:
    config = smoke(training__compression=compression, optim__accumulate=2)
    one, two = run(config), with_workers(2, config)
    np.testing.assert_allclose(two["losses"], one.losses, rtol=1e-5 if compression == "none" else 1e-2)
    if compression == "bf16":
        assert np.abs(np.array(two["losses"]) - one.losses).max() > 1e-5


def test_compiled_steps_learn_what_eager_ones_do() -> None:
    """Nothing is compiled anew after the first epoch, whose evaluation runs eagerly."""
    eager = run(smoke())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast = run(smoke(run__compile="default"))
    assert fast.lines[0] == "compiled (default): the first step takes longer"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    np.testing.assert_allclose(fast.losses, eager.losses, rtol=1e-4)
    assert fast.epochs[-1]["val/acc1"] == eager.epochs[-1]["val/acc1"]
