"""Time the training step beside its peers': the same weights, batches and loop around every network.

    python benchmarks/train_step.py --json step.json
    python benchmarks/train_step.py --device cuda --models deit_small:256 --candidates lape/compiled,timm/compiled
    python benchmarks/train_step.py --candidates none/eager,spiral/eager,pape/eager      # of position embeddings
    python benchmarks/train_step.py --rounds 0          # compares what the candidates compute, and times nothing

What runs is `optimizer_step`: normalisation, mixing with soft targets, forward, backward, fused AdamW and the moving
average of the weights, with stochastic depth 0.1, on uint8 images that are on the device already. Augmentation is off.

Shapes: B images, S pixels of a side, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import common
import numpy as np
import torch
from common import Candidate, CannotRunError, Column, Record, Row
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from lape_ray.config import TrainConfig, replace_fields
from lape_ray.data.batch import Batch
from lape_ray.model import Network, build_model, resolve
from lape_ray.recipes import recipe
from lape_ray.training.cuda_graph import WARM_UP
from lape_ray.training.loss import training_loss
from lape_ray.training.optim import Ema, build_optimizer, lr_at
from lape_ray.training.parallelize import compiled
from lape_ray.training.recompute import optimise_blocks
from lape_ray.training.state import TrainState, autocast_for, build_state
from lape_ray.training.step import optimizer_step

BATCHES = 4  # distinct ones, in rotation: the same pixels again and again would flatter caches and power
STEPS_PER_EPOCH = 1251  # of ImageNet in batches of 1024: the schedule's place is that of the first epoch
MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny": {"variant": "deit_tiny"},
    "deit_small": {"variant": "deit_small"},
    "deit_base": {"variant": "deit_base"},
    # The sizes of ViT-Lite-7/4 in DeiT's block, which peers have too; its own has a norm on the residual stream.
    "vit_lite": {"variant": "deit_tiny", "image_size": 32, "patch_size": 4, "embed_dim": 256, "depth": 7,
                 "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 10},
    "cct": {"variant": "cct_7_3x1"},
    "t2t_vit_7": {"variant": "t2t_vit_7", "position": "sincos1d"},
    "ceit_tiny": {"variant": "ceit_tiny"},
    "swin_tiny": {"variant": "swin_tiny"},
    "swin_tiny_rpe": {"variant": "swin_tiny", "position": "none", "bias": "relative2d"},
    "toy": {"variant": "deit_tiny", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2,
            "num_heads": 2, "num_classes": 10},
    "toy_swin": {"variant": "swin_tiny", "position": "none", "bias": "relative2d", "image_size": 32, "patch_size": 2,
                 "embed_dim": 16, "depths": (2, 1, 2, 1), "num_heads": 2, "window_size": 4, "num_classes": 10},
}  # fmt: skip
DEFAULT_MODELS = {"cpu": "deit_tiny:8,vit_lite:64", "cuda": "deit_small:256,deit_tiny:256"}
DEFAULT_CANDIDATES = (
    "basic/eager,again/eager,lape/eager,timm/eager,torchvision/eager,plain/eager,"
    "basic/compiled,lape/compiled,timm/compiled"
)

# ---- the networks


def ours(config: TrainConfig) -> Network:
    """Build our network with the run's seed, as `build_state` does: every candidate starts from these weights."""
    torch.manual_seed(config.training.seed)
    return optimise_blocks(build_model(config.model))


def _refuse_others(config: TrainConfig) -> None:
    """Raise a CannotRunError where peers, which are built as DeiT, have no such network."""
    if not config.model.variant.startswith("deit"):
        raise CannotRunError(f"only DeiT's network is built of it, not that of {config.model.variant}")


def timm(config: TrainConfig) -> nn.Module:
    """Build timm's network with our weights."""
    from timm.models.swin_transformer import SwinTransformer as TimmSwin
    from timm.models.vision_transformer import VisionTransformer as Timm

    spec = resolve(config.model)
    if spec.depths is not None:
        if (config.model.position, config.model.bias) != ("none", "relative2d"):
            raise CannotRunError("timm's Swin has its relative bias and no table")
        heads = tuple(spec.num_heads << stage for stage in range(len(spec.depths)))
        swin: nn.Module = TimmSwin(
            img_size=spec.image_size, patch_size=spec.patch_size, embed_dim=spec.embed_dim, depths=spec.depths,
            num_heads=heads, window_size=spec.window_size, mlp_ratio=spec.mlp_ratio, num_classes=spec.num_classes,
            drop_path_rate=spec.drop_path,
        )  # fmt: skip
        left = swin.load_state_dict(
            timm_swin(ours(config).state_dict()), strict=False
        )  # without timm's buffers
        if wrong := [
            *left.unexpected_keys,
            *(name for name, _ in swin.named_parameters() if name in left.missing_keys),
        ]:
            raise WrongMathsError(f"timm's Swin has other parameters than ours: {', '.join(wrong)}")
        return swin
    _refuse_others(config)
    network: nn.Module = Timm(
        img_size=spec.image_size, patch_size=spec.patch_size, embed_dim=spec.embed_dim, depth=spec.depth,
        num_heads=spec.num_heads, mlp_ratio=spec.mlp_ratio, num_classes=spec.num_classes,
        drop_path_rate=spec.drop_path,
    )  # fmt: skip
    network.load_state_dict(ours(config).state_dict())
    return network


def plain(config: TrainConfig) -> nn.Module:
    """Build timm's network with the softmax written out, as DeiT's code has it: (B, H, N, N) is kept for backward."""
    network = timm(config)
    for block in cast(nn.ModuleList, network.blocks):
        cast(Any, block).attn.fused_attn = False
    return network


def torchvision(config: TrainConfig) -> nn.Module:
    """Build torchvision's network with our weights; it has no stochastic depth."""
    from torchvision.models.vision_transformer import VisionTransformer as Torchvision

    _refuse_others(config)
    spec = resolve(config.model)
    network: nn.Module = Torchvision(
        image_size=spec.image_size, patch_size=spec.patch_size, num_layers=spec.depth,
        num_heads=spec.num_heads, hidden_dim=spec.embed_dim, mlp_dim=int(spec.embed_dim * spec.mlp_ratio),
        num_classes=spec.num_classes,
    )  # fmt: skip
    weights = ours(config).state_dict()
    network.load_state_dict({torchvision_name(name): value for name, value in weights.items()})
    return network


# Our network with one position embedding alone, or with none, whose time the others' are divided by.
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "none_again": {},
    "peg": {"position": "peg"},
    "mpvg": {"position": "learnable", "join": "mpvg", "pool": "gap"},
    **{name: {"bias": name} for name in ("relative2d", "alibi2d", "log_cpb", "lookhere", "pape", "irpe_k")},
    **{name: {"rotary": name} for name in ("axial", "mixed", "spiral")},
}
CANDIDATES: dict[str, Callable[[TrainConfig], nn.Module]] = {
    "basic": ours,
    "again": ours,  # basic once more: what a ratio is uncertain by
    "lape": ours,
    **dict.fromkeys(EMBEDDINGS, ours),
    "timm": timm,
    "torchvision": torchvision,
    "plain": plain,
}
OURS = ("basic", "again", "lape", *EMBEDDINGS)
MODES = ("eager", "compiled", "graph")  # graph: compiled, and the whole step launched as one CUDA graph
REFERENCES = {
    "again": "basic", "basic": "timm", "lape": "basic", "torchvision": "timm", "plain": "timm",
    **{name: "none" for name in EMBEDDINGS if name != "none"},
}  # fmt: skip

_TORCHVISION_NAMES = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


def torchvision_name(name: str) -> str:
    """Return what torchvision calls the parameter that we and timm call `name`."""
    for pattern, replacement in _TORCHVISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def timm_swin(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our Swin's tensors as timm's, where each block has its table and a stage begins with its merging."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(layers\.\d+)\.bias\.table\.table_LRH", name):
            for block, table in enumerate(value):
                found[f"{match[1]}.blocks.{block}.attn.relative_position_bias_table"] = table
        else:
            name = re.sub(r"^layers\.(\d+)\.down", lambda match: f"layers.{int(match[1]) + 1}.down", name)
            found[re.sub(r"^head\.", "head.fc.", name)] = value
    return found


# ---- the step


class Synthetic:
    """A stand-in for a loader: random uint8 images, channels last in memory as a loader gives them, and labels."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        draws, spec, size = torch.Generator().manual_seed(0), resolve(config.model), config.micro_batch_size
        shape = (size, spec.image_size, spec.image_size, 3)
        self.batches = []
        for number in range(BATCHES):
            images_BSS3 = torch.randint(256, shape, dtype=torch.uint8, generator=draws)
            labels_B = torch.randint(spec.num_classes, (size,), generator=draws)
            images_B3SS, epoch_index_B = (
                images_BSS3.to(device).permute(0, 3, 1, 2),
                np.arange(size) + number * size,
            )
            self.batches.append(Batch(images_B3SS, labels_B.to(device), epoch_index_B))

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[Batch, None, None]:
        yield from itertools.islice(itertools.cycle(self.batches), start, len(self))


def training_config(model: str, *, join: str, batch_size: int, **fields: Any) -> TrainConfig:
    """Return DeiT's recipe for one of `MODELS` without augmentation.

    Args:
        fields: of the config's section `model`.
    """
    values = {f"model.{name}": value for name, value in {**MODELS[model], "join": join, **fields}.items()}
    values |= {"data.rand_augment": None, "data.erase_prob": 0.0, "data.repeats": 1}
    values |= {"data.batch_size": batch_size, "run.num_workers": 1, "run.compile": "off"}
    return replace_fields(recipe("deit_tiny_lape"), values)


def synthetic_state(config: TrainConfig, device: torch.device) -> TrainState:
    """Build the loop's state over synthetic batches."""
    batches = Synthetic(config, device)
    return build_state(config, device, loaders=(batches, batches))


class Stepper:
    """Run optimizer steps of a state, one after the other."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.done = 0
        self._loss_sum = torch.zeros((), device=state.world.device)
        self._batches = itertools.chain.from_iterable(
            state.train_loader.epoch(epoch) for epoch in itertools.count()
        )
        state.model.train()

    def run(self, steps: int) -> None:
        """Run so many more; on a GPU they are queued, not waited for."""
        optim, epoch_steps = self.state.config.optim, self.state.steps_per_epoch
        for _ in range(steps):
            lr = lr_at(self.done, config=optim, steps_per_epoch=epoch_steps)
            place = self.done % epoch_steps
            self._loss_sum += optimizer_step(self.state, self._batches, epoch=0, step=place, lr=lr)
            self.done += 1

    def mean_loss(self) -> float:
        """Return the mean over all steps so far; waits for the device."""
        return self._loss_sum.item() / max(1, self.done)


@dataclass(frozen=True)
class Run:
    """The run that one process times: a network of `CANDIDATES` in one of `MODES`, in rounds of `steps` steps."""

    model: str
    batch_size: int
    candidate: str
    mode: str
    device: str
    threads: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.candidate}/{self.mode}"

    @property
    def staged(self) -> bool:
        """Tell whether the network has stages, as Swin has."""
        return MODELS[self.model]["variant"].startswith("swin")

    @property
    def short(self) -> dict[str, Any]:
        """Fewer blocks for the check of a network that is compiled: they hold everything that all of them do."""
        return {"depths": (2, 1, 1, 1)} if self.staged else {"depth": 2}

    @property
    def reference(self) -> str | None:
        """The run that this one's time is divided by."""
        if self.mode == "graph":
            return f"{self.candidate}/compiled"
        other = REFERENCES.get(self.candidate)
        return None if other is None else f"{other}/{self.mode}"

    def config(self, **fields: Any) -> TrainConfig:
        if self.candidate == "lape":
            fields = {"position": "learnable", **fields}  # Swin's own is a relative bias alone
        fields = {"join": "lape" if self.candidate == "lape" else "basic", **fields}
        if (alone := EMBEDDINGS.get(self.candidate)) is not None:
            fields |= {"position": "none", "bias": "none", **alone}
        config = training_config(self.model, batch_size=self.batch_size, **fields)
        compile = "off" if self.mode == "eager" else "default"
        return replace_fields(config, {"run.compile": compile, "run.cuda_graph": self.mode == "graph"})

    def network(self, config: TrainConfig) -> nn.Module:
        """Build the network on the CPU, not compiled; an ImportError where its package is not installed."""
        return CANDIDATES[self.candidate](config)

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our network's tensors by the names that the candidate's network has for them."""
        if self.candidate == "torchvision":
            return {torchvision_name(name): value for name, value in tensors.items()}
        return timm_swin(tensors) if self.candidate == "timm" and self.staged else dict(tensors)

    def state(self, device: torch.device) -> TrainState:
        """Build the loop's state with this network in it: everything but the network is the same for all."""
        config = self.config()
        if self.candidate in OURS:
            return synthetic_state(config, device)
        network = self.network(config).to(device)
        state = synthetic_state(replace_fields(config, {"run.compile": "off"}), device)
        parameters = dict(state.network.named_parameters())
        exempt = set(self.renamed({name: parameters[name] for name in state.network.position_parameters()}))
        return dataclasses.replace(
            state,
            config=config,
            network=cast(Network, network),  # the loop asks it for parameters only
            model=compiled(network, config.run.compile, device)[0],
            ema=Ema(network, config.optim.ema_decay) if config.optim.ema_decay else None,
            optimizer=build_optimizer(network, config.optim, exempt=exempt),
        )


# ---- parity, before anything is timed

IMAGES = 4
# Relative distance (of the 2-norms) of logits and of the worst gradient.
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 5e-2)}
GATE_STEPS = 20
# Of what the steps changed. Sums on a GPU may differ in their last bits, and then more with each step; a learning rate
# that stays that of the capture comes to 0.7, seeds that do to 0.6.
GATE_DISTANCE = 0.2

Outcome = tuple[Tensor, dict[str, Tensor]]


class WrongMathsError(ValueError):
    """A candidate computes something else; nothing was timed."""


def check_parity(run: Run, device: torch.device) -> Row:
    """Compare logits and every gradient with our network's in float64, whose attention is PyTorch's plain path.

    Stochastic depth is off: its draws differ between eager and compiled code.

    Returns:
        precision: of the candidate, the one that is timed
        logits, gradient: relative distances, of the worst gradient; worst: the name of its parameter

    Raises:
        WrongMathsError: a distance is above `TOLERANCE`, or a parameter got no gradient.
    """
    config = run.config(drop_path=0.0, **({} if run.mode == "eager" else run.short))
    wanted_BK, gradients = _outcome(ours(config).to(device, torch.float64), config)
    gradients = run.renamed(gradients)
    network = run.network(config).to(device)
    with autocast_for(config, device)():
        precision = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
        found_BK, found = _outcome(network, config, model=compiled(network, config.run.compile, device)[0])
    if missing := [name for name in gradients if name not in found]:
        raise WrongMathsError(f"{run.name}: {', '.join(missing)} got no gradient; nothing was timed")
    # A gradient that is zero but for rounding, as of a softmax's bias, is measured by the whole one.
    least = 1e-4 * float(torch.stack([wanted.norm() for wanted in gradients.values()]).norm())
    apart = {name: _distance(found[name], wanted, least) for name, wanted in gradients.items()}
    worst = max(apart, key=lambda name: apart[name])
    logits = _distance(found_BK, wanted_BK)
    row = {"precision": precision, "logits": logits, "gradient": apart[worst], "worst": worst}
    refuse_wrong(run.name, row)
    return row


def refuse_wrong(name: str, row: Row) -> None:
    """Raise a WrongMathsError where a distance in `row`, as `check_parity` returns it, is too large or no number."""
    logits, gradient = TOLERANCE[row["precision"]]
    if not (row["logits"] <= logits and row["gradient"] <= gradient):  # written so that a NaN fails
        raise WrongMathsError(
            f"{name} computes something else than our network in float64: logits differ by {row['logits']:.1e} (at "
            f"most {logits:.0e}), the gradient of {row['worst']} by {row['gradient']:.1e} (at most {gradient:.0e}), "
            "relative; nothing was timed. Compare the versions of torch and of the peer with those of a record in "
            "benchmarks/results"
        )


def _outcome(network: nn.Module, config: TrainConfig, *, model: nn.Module | None = None) -> Outcome:
    """Return logits and gradients of `network`, as `model` computes them, for images that are always the same."""
    network.eval()
    parameter, spec = next(network.parameters()), resolve(config.model)
    draws = torch.Generator().manual_seed(1)
    shape = (IMAGES, 3, spec.image_size, spec.image_size)
    images_B3SS = torch.randn(shape, generator=draws, dtype=torch.float64).to(parameter)
    targets_BK = torch.rand(IMAGES, spec.num_classes, generator=draws, dtype=torch.float64).softmax(1)
    logits_BK = (network if model is None else model)(images_B3SS)
    if parameter.dtype == torch.float64:
        loss = -(targets_BK.to(parameter) * logits_BK.log_softmax(1)).sum(1).mean()
    else:
        loss = training_loss(logits_BK, targets_BK.to(parameter))
    loss.backward()
    gradients = {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}
    return logits_BK.detach().double(), gradients


def _distance(value: Tensor, wanted: Tensor, least: float = 1e-30) -> float:
    return float((value - wanted.view_as(value)).norm() / wanted.norm().clamp_min(least))


def check_replays(config: TrainConfig, device: torch.device) -> float:
    """Return how far steps with `run.cuda_graph`, most of them replayed, take the weights from where plain steps do.

    The norm of the difference is given as a share of the norm of what plain steps change.

    Raises:
        WrongMathsError: they do not learn the same, so that their time means nothing.
    """
    ends = []
    for graph in (False, True):
        stepper = Stepper(synthetic_state(replace_fields(config, {"run.cuda_graph": graph}), device))
        start = nn.utils.parameters_to_vector(stepper.state.network.parameters()).clone()
        stepper.run(WARM_UP + GATE_STEPS)
        ends.append(nn.utils.parameters_to_vector(stepper.state.network.parameters()).detach())
    distance = ((ends[1] - ends[0]).norm() / (ends[0] - start).norm()).item()
    if not distance < GATE_DISTANCE:
        raise WrongMathsError(f"replayed steps end {distance:.2f} of the way from where plain ones do")
    return distance


# ---- what is measured


def prepare(run: Run) -> Candidate:
    """Check a run, then build and warm up what is timed; called in a separate process.

    Raises:
        WrongMathsError: it computes something else.
        CannotRunError: the device's memory is too small.
    """
    device = torch.device(run.device)
    if device.type == "cpu":
        torch.set_num_threads(run.threads)
    # cuDNN's default for float32 convolutions is TF32, which only peers with a convolution would meet.
    torch.backends.cudnn.allow_tf32 = False
    facts: Row = {**dataclasses.asdict(run), **check_parity(run, device)}
    network = run.network(run.config())
    facts["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    facts["train_flops"] = training_flops(network, resolve(run.config().model).image_size)
    if run.mode == "graph":
        facts["from_plain"] = check_replays(run.config(), device)
    torch.compiler.reset()
    counters.clear()
    try:
        stepper = Stepper(run.state(device))
        clock = time.perf_counter()
        stepper.run(1)
        wait(device)
        facts["first_step_s"] = time.perf_counter() - clock
        stepper.run(WARM_UP if device.type == "cuda" else 1)
        stepper.state.optimizer.zero_grad(set_to_none=True)
        # A graph's memory is its own, and nothing is allocated when it is replayed.
        facts["step_bytes"] = None if run.mode == "graph" else step_bytes(stepper.run, device)
        facts |= kernels(stepper.run, device) if device.type == "cuda" else {}
    except torch.OutOfMemoryError as error:
        raise CannotRunError(str(error).splitlines()[0]) from None
    made = _graphs()
    if made != ((0, 0) if run.mode == "eager" else (1, 0)):
        raise RuntimeError(f"{run.name}: the compiler made {made[0]} graphs with {made[1]} breaks, not one")

    def work(number: int) -> int:
        stepper.run(run.steps)
        wait(device)
        if _graphs() != made:
            raise RuntimeError("the network was compiled again while it was timed")
        return run.steps * run.batch_size

    def lead() -> None:
        stepper.run(3 if device.type == "cuda" else 0)
        wait(device)

    return Candidate(work, facts, lead)


def wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _graphs() -> tuple[int, int]:
    """Return how many graphs the compiler has made in this process, and how many breaks lie between them."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def training_flops(network: nn.Module, side: int) -> int:
    """Return the operations of an image's forward and backward pass in matrix products; a multiply-add counts 2.

    What is computed again in backward is not counted, nor what is computed once for a whole batch.
    """
    counts = []
    for images in (2, 3):
        counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward}
        )
        # A fused attention would count what its backward computes again.
        with counter, sdpa_kernel(SDPBackend.MATH):
            network(torch.zeros(images, 3, side, side)).sum().backward()
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def _conv_backward(grad_out: Any, image: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Count a convolution's backward pass, each gradient as its forward pass; torch takes all for one group."""
    output_mask = rest[-1]
    forward = 2 * math.prod(grad_out) * math.prod(weight[1:])
    return forward * sum(output_mask[:2])


def kernels(run: Callable[[int], None], device: torch.device) -> Row:
    """Return a step's kernels on a GPU: their number, the most costly (microseconds), and attention's names."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run(1)
        torch.cuda.synchronize(device)
    spent: Counter[str] = Counter()
    count = 0
    for event in profiler.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem"):
            spent[event.name[:120]] += event.time_range.elapsed_us()
            count += 1
    words = ("flash", "fmha", "cudnn", "attention", "efficient")
    return {
        "kernels": count,
        "top": [[name, round(us, 1)] for name, us in spent.most_common(12)],
        "attention": sorted(name for name in spent if any(word in name.lower() for word in words)),
    }


def step_bytes(run: Callable[[int], None], device: torch.device) -> int:
    """Return the most memory that tensors hold during a step beyond what they hold before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(1)
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(0, *itertools.accumulate(event.nbytes() for event in events))


def matmul_flops(device: torch.device, side: int) -> float:
    """Return the FLOP/s of a square matrix product: bf16 on a GPU, fp32 on a CPU.

    Values are random: zeros draw less power and run faster than a step ever could.
    """
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    timer = Timer("torch.mm(left, right, out=into)",
                  globals={"torch": torch, "left": left, "right": right, "into": torch.empty_like(left)},
                  num_threads=torch.get_num_threads())  # fmt: skip
    found = 2 * side**3 / timer.blocked_autorange(min_run_time=0.5).median
    if device.type == "cuda":
        del left, right, timer
        torch.cuda.empty_cache()  # the candidates' processes share the memory
    return found


COLUMNS = (Column("candidate", "name"), Column("images/s", "images_per_second", ",.1f"),
           Column("CPU ms/image", "cpu_ms"), Column("time over", "over", ".3f"), Column("of", "of"),
           Column("of matmul", "share", ".1%"), Column("parameters", "parameters", ",.0f"),
           Column("step's MB", "step_bytes", ",.0f", 1e-6),
           Column("kernels", "kernels", ",.0f"), Column("first step s", "first_step_s", ".1f"),
           Column("logits apart", "logits", ".1e"), Column("gradients apart", "gradient", ".1e"),
           Column("replays apart", "from_plain", ".1e"))  # fmt: skip


def measure(runs: dict[str, Run], rounds: int, peak: float) -> list[Row]:
    """Time runs of one model against each other.

    On a CPU with one thread a ratio is of CPU time: that is not disturbed by what else the machine does.

    Returns:
        Rows as `interleaved` returns them, with ratios and shares of `peak`.
    """
    rows = common.interleaved({name: (prepare, run) for name, run in runs.items()}, rounds, common.note)
    first = next(iter(runs.values()))
    key = "cpu_ms" if first.device == "cpu" and first.threads == 1 else "wall_ms"
    common.add_ratios(rows, {name: run.reference for name, run in runs.items() if run.reference}, key)
    for row in rows:
        if "images_per_second" in row:
            row["share"] = row["train_flops"] * row["images_per_second"]["median"] / peak
    return rows


def parse_models(text: str) -> list[tuple[str, int]]:
    """Parse `deit_tiny:8,vit_lite:64` into pairs of a model and a batch size."""
    pairs = [part.partition(":")[::2] for part in text.split(",")]
    for name, size in pairs:
        if name not in MODELS or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--models {name}:{size}: write NAME:IMAGES, with a name of {', '.join(MODELS)}")
    return [(name, int(size)) for name, size in pairs]


def parse_candidates(text: str) -> list[tuple[str, str]]:
    """Parse `lape/compiled,timm/eager` into pairs of a candidate and a mode."""
    pairs = [part.partition("/")[::2] for part in text.split(",")]
    for name, mode in pairs:
        if name not in CANDIDATES or mode not in MODES or (mode == "graph" and name not in OURS):
            raise ValueError(
                f"--candidates {name}/{mode}: write NAME/MODE, where a name is one of {', '.join(CANDIDATES)} and a "
                f"mode one of {', '.join(MODES)} (graph: {', '.join(OURS)} only)"
            )
    return pairs


def check_device(name: str) -> torch.device:
    """Return the device; a ValueError where this machine has none."""
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name}: choose cpu, or cuda where torch finds a GPU; here it finds none")
    return torch.device(name)


def main() -> None:
    made = common.parser(__doc__, rounds=6)
    made.add_argument(
        "--models", help="with batch sizes, such as deit_tiny:8,vit_lite:64; one after the other"
    )
    made.add_argument("--candidates", default=DEFAULT_CANDIDATES, help="NAME/MODE,... (default: %(default)s)")
    made.add_argument("--steps", type=int, help="of a round (default: 1, on a GPU 50)")
    made.add_argument("--threads", type=int, default=1, help="of a CPU's arithmetic (default: 1)")
    options = made.parse_args()
    device = check_device(options.device)
    models = parse_models(options.models or DEFAULT_MODELS[device.type])
    pairs = parse_candidates(options.candidates)
    if options.smoke:
        models, options.steps, options.rounds = [("toy", 4)], 1, min(1, options.rounds)
        pairs = [(name, mode) for name, mode in pairs if mode != "graph" or device.type == "cuda"]
    steps = options.steps or (50 if device.type == "cuda" else 1)
    torch.set_num_threads(options.threads)
    record = Record("train_step", vars(options), path=options.json, device=options.device)
    common.note("measuring a matrix product")
    peak = matmul_flops(device, 256 if options.smoke else 8192 if device.type == "cuda" else 1536)
    record.add("matmul", [{"device": options.device, "flops": peak}])
    print(f"{record.heading()}; matrix products {peak / 1e12:.3f} TFLOP/s; median (lowest to highest round)")
    for model, batch_size in models:
        runs = [Run(model, batch_size, *pair, options.device, options.threads, steps) for pair in pairs]
        rows = measure({run.name: run for run in runs}, options.rounds, peak)
        record.add("train_step", rows)
        print("\n" + common.table(f"{model}, batch {batch_size}", COLUMNS, rows), flush=True)


if __name__ == "__main__":
    common.run(main)
