"""A checkpoint's copies are those of their step, however late they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import threads
from helpers.networks import FAMILIES
from seeds import Recorder
from torch import Tensor, nn

from lape_ray.config import TrainConfig, replace_fields
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select
from lape_ray.recipes import recipe
from lape_ray.training import loop
from lape_ray.training import state as state_module
from lape_ray.training.checkpoint import Snapshot, snapshot
from lape_ray.training.host_copies import HostCopies


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


class LateCopies(HostCopies):
    """Copies that are made at the last moment: as the training reaches the fence, or as a reader waits for them."""

    def __init__(self, device: torch.device, network: nn.Module) -> None:
        super().__init__(device, network)
        self.begun: list[tuple[Tensor, Tensor]] = []

    def copy(self, values: Any) -> tuple[Any, Callable[[], None]]:
        copies, _ = super().copy(values)
        self._begin(values, copies)
        return copies, self.fence

    def _begin(self, values: Any, copies: Any) -> None:
        if isinstance(values, Tensor):
            copies.zero_()
            self.begun.append((values, copies))
        elif isinstance(values, dict | list):
            for key in values if isinstance(values, dict) else range(len(values)):
                self._begin(values[key], copies[key])

    def fence(self) -> None:
        for values, copies in self.begun:
            copies.copy_(values)
        self.begun = []


class Keep(Recorder):
    """A reporter that keeps a snapshot of every step and every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Snapshot] = []

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        self.kept.append(snapshot())

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        self.kept.append(snapshot())


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def kept_by(config: TrainConfig) -> list[list[Tensor]]:
    keep = Keep()
    loop.train(config, device=torch.device("cpu"), reporter=keep)
    for one in keep.kept:
        one.wait()
    return [tensors([one.model, one.ema, one.optimizer]) for one in keep.kept]


@pytest.mark.parametrize("family", ["deit_tiny", "ceit_tiny"])
@pytest.mark.parametrize(("accumulate", "sizes"), [(1, None), (2, None), (1, "16:0-1,32:1-2")])
def test_a_late_copy_is_that_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, accumulate: int, sizes: str | None
) -> None:
    """CeiT's batch norms change as a forward pass begins, all else as the optimizer steps.

    Where images get another size the optimizer goes on with the tensors that are copied.
    """
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:7"), tmp_path / f"{split}.beton", workers=1)
    values = {
        **{f"data.{split}": str(tmp_path / f"{split}.beton") for split in ("train", "val")},
        **{key.replace("__", "."): value for key, value in FAMILIES.get(family, {}).items()},
        "optim.epochs": 2, "run.checkpoint_steps": 1, "optim.accumulate": accumulate, "run.num_workers": 1,
        "data.image_size_schedule": sizes,
    }  # fmt: skip
    config = replace_fields(recipe("smoke"), values)
    at_once = kept_by(config)
    monkeypatch.setattr(state_module, "HostCopies", LateCopies)
    late = kept_by(config)
    assert len(late) == len(at_once) >= 4
    for ours, theirs in zip(late, at_once, strict=True):
        assert len(ours) == len(theirs) > 20
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_copies_while_it_trains() -> None:
    device = torch.device("cuda")
    network = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4))).to(device)
    optimizer = torch.optim.AdamW(network.parameters())
    copies = HostCopies(device, network)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(20):
            network(torch.ones(4096, 4096, device=device)).sum().backward()
        copies.fence()
        optimizer.step()

    step()
    before = [value.cpu() for value in network.state_dict().values()]
    began, copied, trained = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    began.record()
    taken = snapshot(
        model=network, ema=None, optimizer=optimizer, metadata=None, copies=copies  # type: ignore[arg-type]
    )  # fmt: skip
    assert copies._copied is not None
    copied = copies._copied
    step()
    trained.record()
    taken.wait()
    assert copied.query()
    torch.cuda.synchronize()
    assert all(value.is_pinned() for value in taken.model.values())
    assert all(map(torch.equal, taken.model.values(), before))
    assert not torch.equal(next(network.parameters()).cpu(), before[0])
