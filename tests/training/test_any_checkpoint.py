"""Checkpoints put together at random: what is read is what timm's network holds, whatever is around it."""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lape_ray.config import ModelConfig
from lape_ray.model import build_model
from lape_ray.model.convert import load_weights
from lape_ray.training.checkpoint import read_weights
from lape_ray.training.weight_files import AVERAGES, CONTAINERS

SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
MODEL = ModelConfig(image_size=8, patch_size=4, **SIZES)  # type: ignore[arg-type]
State = dict[str, Tensor]


def weights(seed: int) -> State:
    torch.manual_seed(seed)
    network = timm.create_model("deit_tiny_patch16_224", img_size=8, patch_size=4, **SIZES)
    return {name: torch.randn_like(value) for name, value in network.state_dict().items()}


RAW, AVERAGE = weights(0), weights(1)
BESIDE: dict[str, Any] = {
    "epoch": 7,
    "args": argparse.Namespace(lr=np.float32(0.1), betas=(0.9, 0.999), out=Path("out")),
    "acc": np.float64(71.5),
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "scaler": None,
    "history": [np.int64(3), "text", {1, 2}],
    "rng": np.arange(4),
}
LOOSE = {"n_averaged": torch.tensor(3), "criterion.weight": torch.zeros(3), "loss.center": torch.zeros(1, 3)}
prefixes = st.lists(
    st.sampled_from(["module", "_orig_mod", "model", "net", "backbone", "encoder"]), max_size=3
).map(lambda parts: "".join(f"{part}." for part in parts))


def put(state: State, prefix: str, shuffle: random.Random) -> State:
    """Return the weights behind a prefix, in any order, with what training code leaves beside them."""
    names = list(state)
    shuffle.shuffle(names)
    named = {prefix + name: state[name] for name in names}
    return named | (LOOSE if prefix and shuffle.random() < 0.5 else {})


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    prefix=prefixes,
    other_prefix=prefixes,
    entries=st.lists(st.sampled_from(CONTAINERS), max_size=2),
    average=st.none() | st.sampled_from(AVERAGES),
    beside=st.sets(st.sampled_from(sorted(BESIDE))),
    zipped=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_a_pickled_checkpoint_is_read(
    prefix: str,
    other_prefix: str,
    entries: list[str],
    average: str | None,
    beside: set[str],
    zipped: bool,
    order: random.Random,
) -> None:
    holder: dict[str, Any] = put(RAW, prefix, order)
    for entry in entries:
        holder = {entry: holder}
    if entries:
        parts = [*holder.items(), *((name, BESIDE[name]) for name in sorted(beside))]
        if average is not None:
            parts.append((average, put(AVERAGE, other_prefix, order)))
        order.shuffle(parts)
        holder = dict(parts)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.pth")
        torch.save(holder, file, _use_new_zipfile_serialization=zipped)
        compare(file, RAW)
        if entries and average is not None:
            compare(file, AVERAGE, ema=True)
        else:
            with pytest.raises(ValueError, match=r"x\.pth holds no moving average; leave --ema out"):
                read_weights(file, ema=True)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(prefix=prefixes, averages=st.booleans(), order=st.randoms(use_true_random=False))
def test_a_file_of_safetensors_is_read(prefix: str, averages: bool, order: random.Random) -> None:
    state = put(RAW, prefix, order)
    if averages:
        inner = put(AVERAGE, f"{prefix}ema_model.", order)
        state |= {name: value for name, value in inner.items() if prefix or name not in LOOSE}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.safetensors")
        save_file({name: value.clone() for name, value in state.items()}, file)
        compare(file, RAW)
        if averages:
            compare(file, AVERAGE, ema=True)


def compare(file: Path, expected: State, *, ema: bool = False) -> None:
    network = build_model(MODEL)
    assert load_weights(network, read_weights(file, ema=ema)[0]) == []
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected[name]), name
