"""What holds the training step fast without a clock: graphs, dispatched operators, memory, buckets."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import step_bytes

from lape_ray.config import ModelConfig
from lape_ray.model import VisionTransformer, build_model
from lape_ray.training import parallelize
from lape_ray.training.parallelize import compiled, data_parallel
from lape_ray.training.recompute import optimise_blocks

GOLDEN = Path(__file__).parent.parent / "golden" / "step_operators.json"
CPU = torch.device("cpu")

# Each kind of position embedding and join that a step can go through.
MODELS = {
    "basic": {"join": "basic"},
    "lape": {"join": "lape"},
    "sincos2d_lape": {"position": "sincos2d", "join": "lape"},
    "unshare": {"join": "unshare"},
    "relative_lape": {"position": "none", "join": "basic", "bias": "relative2d", "bias_join": "lape"},
    "alibi": {"position": "none", "join": "basic", "bias": "alibi2d"},
    "rotary": {"position": "none", "join": "basic", "rotary": "mixed"},
    "distilled": {"variant": "deit_tiny_distilled", "join": "lape"},
    "cct": {"variant": "cct_7_3x1", "join": "lape"},
    "t2t": {"variant": "t2t_vit_7", "join": "lape"},
    "ceit": {"variant": "ceit_tiny", "join": "lape"},
    "swin": {
        "variant": "swin_tiny", "join": "lape", "bias": "relative2d", "window_size": 4, "depth": None,
        "depths": (2, 2, 1, 1),
    },
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher; views cost nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def small(name: str, *, depth: int = 4) -> VisionTransformer:
    sizes = {"image_size": 64, "num_classes": 10, "depth": depth, "embed_dim": 64, "num_heads": 2}
    values: dict[str, Any] = {"variant": "deit_tiny", **sizes, "drop_path": 0.1, **MODELS[name]}
    torch.manual_seed(0)
    config = ModelConfig(**values)
    return optimise_blocks(build_model(config))


def loss_of(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    return network(images_BCHW).square().mean()


def step_operators(name: str) -> Counter[str]:
    network, images_BCHW = small(name), torch.rand(4, 3, 64, 64)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for _ in range(2):  # the first step makes the optimizer's state
        with Operators() as operators:
            optimizer.zero_grad()
            loss_of(network, images_BCHW).backward()
            optimizer.step()
    return operators.counts


@pytest.mark.parametrize("name", MODELS)
def test_operators_of_a_step(name: str) -> None:
    """An operator more is a kernel more in each step. UPDATE_GOLDEN=1 writes the file anew."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    total = step_operators(name).total()
    if os.environ.get("UPDATE_GOLDEN"):
        golden[name] = total
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert total <= golden[name]


def test_lape_costs_seven_operators_a_layer() -> None:
    """A layer: LayerNorm of w and its gradient, beta joined to it, the sum twice, its gradient summed."""
    more = step_operators("lape") - step_operators("basic")
    assert more == {"native_layer_norm": 4, "native_layer_norm_backward": 4, "add": 14, "sum": 7}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph(name: str) -> None:
    torch._dynamo.reset()
    network = small(name)
    explained = torch._dynamo.explain(network)(torch.rand(2, 3, 64, 64))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def activation_bytes(network: nn.Module, images_BCHW: Tensor) -> int:
    """The most memory that a forward and a backward pass hold, beyond gradients."""

    def run(steps: int) -> None:
        loss_of(network, images_BCHW).backward()

    run(1)  # gradients are there from now on, and are added to
    return step_bytes(run, CPU)


def test_memory_of_a_step_at_deit_size() -> None:
    """Four blocks of DeiT-Ti at 224 px; activations a token and layer are what counts (N x D floats)."""
    images_BCHW = torch.rand(4, 3, 224, 224)

    def network(join: str) -> VisionTransformer:
        return build_model(ModelConfig(variant="deit_tiny", join=join, depth=4, drop_path=0.1))  # type: ignore[arg-type]

    token_bytes = 4 * 197 * 192 * 4
    ours = {join: activation_bytes(optimise_blocks(network(join)), images_BCHW) for join in ("basic", "lape")}
    # Each layer keeps the residual stream twice, qkv (3), attention's result, fc1's (4); the rest are the last steps.
    assert ours["basic"] / token_bytes / 4 < 14.5
    assert ours["lape"] - ours["basic"] < 8 * 197 * 192 * 4  # some tables, whatever the batch
    plain = activation_bytes(network("basic"), images_BCHW)
    assert ours["basic"] < 0.62 * plain


def test_compilation_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small("lape")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.compile=default needs a C\+\+ compiler"):
        compiled(network, "default", CPU)
    assert compiled(network, "off", CPU) == (network, "")
    assert compiled(network, "auto", CPU) == (network, "")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    same, note = compiled(network, "auto", torch.device("cuda"))
    assert same is network
    assert note == "not compiled, and slower for it: Triton is missing"


def _bucket_order(rank: int, port: int, out: Path) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    network = small("lape", depth=6)
    small_buckets = partial(parallelize.DistributedDataParallel, bucket_cap_mb=0.2)
    parallelize.DistributedDataParallel = small_buckets  # type: ignore[assignment,misc]
    parallel = data_parallel(network, "none", CPU, one_micro_batch=True)
    for _ in range(5):
        loss_of(parallel, torch.rand(2, 3, 64, 64)).backward()
    if rank == 0:
        rebuilt = parallel._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"]
        names = [name for name, _ in network.named_parameters()]
        buckets = [[names[int(index)] for index in bucket.split()] for bucket in rebuilt.split(",")]
        out.write_text(json.dumps(buckets))
    dist.destroy_process_group()


def test_position_gradients_delay_no_bucket(tmp_path: Path) -> None:
    """They are ready only at the end of the backward pass, so only the last bucket may hold them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_bucket_order, args=(port, tmp_path / "out"), nprocs=2)
    *first, last = json.loads((tmp_path / "out").read_text())
    assert len(first) >= 3
    position = {
        name for name, _ in small("lape", depth=6).named_parameters() if name.startswith(("join.", "pos_"))
    }
    assert position <= set(last)
