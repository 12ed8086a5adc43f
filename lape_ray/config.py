"""The config of a run: frozen, typed, checked when it is made. Standard library only: `--help` is instant.

Six sections, one owner each: `ModelConfig` (lape_ray.model), `DataConfig` (lape_ray.data), `OptimConfig` and
`TrainingConfig` (lape_ray.training), `TrackingConfig` (lape_ray.tracking) and `RunConfig` (lape_ray.cluster). The
sections `tracking` and `run` never change what is learned; of the others every field does that is no
`execution_option`. Defaults are the simplest thing that works; the paper's numbers live in `lape_ray.recipes`. Vary one
with `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from lape_ray.values.plugin import PLUGIN_NAME, TABLES, Plugin, TrustedPlugin
from lape_ray.values.redaction import redacted, refuse_secret
from lape_ray.values.typed import typed

Position = Literal["none", "learnable", "sincos1d", "sincos2d", "peg"]
Join = Literal[
    "basic", "share", "unshare", "lape", "lape_shared", "mpvg",
    "lape_identity", "lape_scalar", "lape_gamma", "lape_affine", "lape_norm", "lape_scalar_norm", "lape_gamma_norm",
]  # fmt: skip
Bias = Literal["none", "relative2d", "alibi2d", "log_cpb", "lookhere", "pape", "irpe_k"]
BiasJoin = Literal["basic", "lape"]
Rotary = Literal["none", "axial", "mixed", "spiral"]
NAMES = {"position": Position, "join": Join, "bias": Bias, "bias_join": BiasJoin, "rotary": Rotary}
"""The fields of a model to which a plugin may add names."""
Pool = Literal["gap"]
NETWORK_FIELDS = ("variant", "position", "join", "bias", "bias_join", "rotary")
"""The model's fields that tell networks apart in a list."""
Variant = Literal[
    "deit_tiny", "deit_small", "deit_base",
    "deit_tiny_distilled", "deit_small_distilled", "deit_base_distilled",
    "deit3_small", "deit3_medium", "deit3_base", "deit3_large",
    "vit_lite_6_4", "vit_lite_7_4", "cvt_7_4", "cct_6_3x1", "cct_7_3x1", "cct_7_3x2",
    "t2t_vit_7", "t2t_vit_12", "t2t_vit_14", "ceit_tiny", "ceit_small",
    "swin_tiny", "swin_small", "swin_base",
]  # fmt: skip
Compile = Literal["auto", "off", "default", "max-autotune-no-cudagraphs"]
Compression = Literal["none", "bf16"]
Algorithm = Literal["adamw", "muon", "lamb"]
Loss = Literal["cross_entropy", "bce"]
Trained = Literal["all", "head"]
DropPathRule = Literal["linear", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "gpu"]
Backend = Literal["native", "resident", "ffcv", "torchvision"]
Interpolation = Literal["bicubic", "bilinear", "random"]
CropKind = Literal["random_resized", "simple"]


class Span(NamedTuple):
    """A whole number that may vary, from `low` to `high`; written `2:8`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Parse `2:8` as a span; a ValueError where it is none."""
        low, colon, high = text.partition(":")
        if not (colon and low.isdecimal() and high.isdecimal()):
            raise ValueError(f"{text!r} must be LOW:HIGH")
        return cls(int(low), int(high))

    def __repr__(self) -> str:
        return f"{self.low}:{self.high}"


def option(default: Any, help: str) -> Any:
    """Make a field with its default and the one line that `--help` prints for it."""
    return dataclasses.field(default=default, metadata={"help": help})


def execution_option(default: Any, help: str) -> Any:
    """Make a field that says where or how fast a run computes, not what it learns."""
    return dataclasses.field(default=default, metadata={"help": help, "execution": True})


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def check_name(name: str, of: str) -> None:
    """Refuse a name that cannot be the name of one folder below another; `of` says what it names."""
    _require(
        NAME.fullmatch(name) is not None,
        f"{of}={name!r} must begin with a letter or digit and hold 200 of letters, digits, '-', '_' and '.' at most",
    )


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return `; did you mean ...?` with those of the `known` names that are like `name`; nothing where none is."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _check_choices(config: Any, added: Mapping[str, Iterable[str]] = types.MappingProxyType({})) -> None:
    """Refuse a value outside its Literal, and list the values that it has, but for what else stands beside it.

    Args:
        added: by field, names that a plugin adds.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), typing.get_args(kind)
        literal = next((each for each in (kind, *kinds) if typing.get_origin(each) is Literal), None)
        beside = (value is None and type(None) in kinds) or (
            float in kinds and isinstance(value, float | int)
        )
        if literal is not None and not beside:
            known = (*typing.get_args(literal), *added.get(name, ()))
            meant = did_you_mean(str(value), known) if name in TABLES else ""
            _require(
                value in known, f"{name}={value!r} is not known; choose one of {', '.join(known)}{meant}"
            )


def _check_addresses(config: Any) -> None:
    """Refuse an address with a password: a config is stored with the run, shown, and sent to every worker."""
    for field in dataclasses.fields(config):
        if isinstance(value := getattr(config, field.name), str):
            refuse_secret(field.name, value)


def _check_range(config: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            value in (None, "auto") or low <= value <= high,
            f"{name}={value} is out of range; it must be from {low:g} to {high:g}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, and how position enters it. `None` means the variant's own value."""

    variant: Variant = option("deit_tiny", "network family and size")
    num_classes: int | None = option(None, "outputs of the classifier")
    image_size: int | None = option(None, "side of the square input, in pixels")
    patch_size: int | None = option(None, "side of a patch, in pixels (not for CCT, T2T-ViT and CeiT)")
    embed_dim: int | None = option(None, "width of a token (Swin: of the first stage)")
    depth: int | None = option(None, "number of blocks")
    num_heads: int | None = option(None, "attention heads of a block (Swin: of the first stage)")
    depths: tuple[int, int, int, int] | None = option(None, "blocks of each stage (Swin)")
    window_size: int | None = option(None, "side of an attention window, in tokens (Swin)")
    mlp_ratio: float | None = option(None, "hidden width of the MLP over embed_dim")
    drop_path: float | None = option(None, "stochastic depth rate of the last block")
    drop_path_rule: DropPathRule | None = option(
        None, "rates of the blocks before it: from 0 up to its own, or its own"
    )
    layer_scale: float | None = option(
        None, "LayerScale: initial factor of the blocks' branches; 0: they have none"
    )
    attention_dropout: float | None = option(None, "dropout on attention weights")
    pool: Pool | None = option(
        None, "what the head reads; gap: the mean of the patches, and there is no class token"
    )
    plugin: Plugin | None = option(
        None, "position embeddings and joins of your own, whose names are then known too (docs/positions.md)"
    )
    position: Position | str = option("learnable", "position embedding added to the tokens")
    join: Join | str = option("basic", "where and how that embedding enters the blocks")
    bias: Bias | str = option("none", "position bias added to the attention logits")
    bias_join: BiasJoin | str = option(
        "basic", "how the bias enters: as it is, or through a LayerNorm over keys"
    )
    rotary: Rotary | str = option("none", "rotation of queries and keys by position")

    def __post_init__(self) -> None:
        _check_addresses(self)
        _check_choices(self, self._added())
        _check_range(
            self, 1, 2**31, "num_classes", "image_size", "patch_size", "embed_dim", "depth", "num_heads",
            "window_size",
        )  # fmt: skip
        _require(
            self.depths is None or min(self.depths) >= 1,
            f"depths={self.depths} must be above 0 for every stage",
        )
        _check_range(self, 0.1, 64, "mlp_ratio")
        _check_range(self, 0, 0.99, "drop_path", "attention_dropout")
        _check_range(self, 0, 100, "layer_scale")

    def _added(self) -> Mapping[str, Iterable[str]]:
        """Return the names that the plugin adds, by field: of a stored one, which is not read yet, those in use."""
        if self.plugin is None:
            return {}
        if not isinstance(self.plugin, TrustedPlugin):
            return {of: [name] for of in TABLES if PLUGIN_NAME.fullmatch(name := getattr(self, of))}
        _check_new(self.plugin)
        return {of: self.plugin.names(of) for of in TABLES}


def _check_new(plugin: Plugin) -> None:
    """Refuse a plugin with a name that is there already."""
    for of, literal in NAMES.items():
        for name, line in plugin.names(of).items():
            _require(
                name not in typing.get_args(literal),
                f"{plugin.name}, line {line}: {of}={name} is there already; "
                f"{plugin.way_out or 'choose another name'}",
            )


def names_of(model: ModelConfig, of: str) -> tuple[str, ...]:
    """List the names that a field of the model knows: the built-in ones, then the plugin's."""
    return (*typing.get_args(NAMES[of]), *(model.plugin.names(of) if model.plugin else ()))


def plugin_names(model: ModelConfig) -> dict[str, str]:
    """Return the fields of a model that hold names of its plugin, with these."""
    return {of: getattr(model, of) for of in NAMES if getattr(model, of) not in typing.get_args(NAMES[of])}


class ImageSize(NamedTuple):
    """The side of the images in pixels, from epoch `first` on and before epoch `end`."""

    side: int
    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and what is done to them before the model reads them."""

    train: str = execution_option("", "path or s3:// address of the training .beton")
    val: str = execution_option("", "path or s3:// address of the validation .beton")
    batch_size: int = option(128, "images of one optimizer step, over all workers")
    eval_batch_size: int = execution_option(256, "images of one evaluation step, for each worker")
    threads: int | None = execution_option(None, "loader threads of a worker; none: the CPUs it has")
    crop_scale: tuple[float, float] = option((0.08, 1.0), "random resized crop: share of the image's area")
    crop_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "random resized crop: width over height")
    crop: CropKind = option(
        "random_resized",
        "of training; simple: the shorter side resized to the model's, 4 pixels of reflection around, a random square "
        "(crop_scale and crop_ratio do not count)",
    )
    flip: float = option(0.5, "probability of a horizontal flip")
    eval_crop: float = option(0.875, "share of the shorter side that evaluation's centre crop keeps")
    backend: Backend = option(
        "native",
        "native: our decoder, Pillow's pixels; resident: that, once, to the device (squares of one size); "
        "ffcv: its decoder and area filter, starts slower; torchvision: slow, any source",
    )
    stream: bool = execution_option(
        True, "train while data come from S3 (native, resident); false: when they are here"
    )
    interpolation: Interpolation = option(
        "bicubic", "filter of crops and of RandAugment's warps; random: per image"
    )
    repeats: int = option(1, "repeated augmentation: copies of an image in an epoch, which keeps its length")
    rand_augment: str | None = option(None, "RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1")
    three_augment: bool = option(False, "3-Augment of DeiT III: grey, solarize or blur")
    color_jitter: float = option(0.0, "strength of brightness, contrast and saturation jitter")
    fused: bool = execution_option(
        True, "augment on a GPU with kernels of our own (Triton); false: with PyTorch's operators"
    )
    erase_prob: float = option(0.0, "probability of random erasing with normal noise")
    upscale: bool = option(False, "accept data whose images are all smaller than the model's")
    image_size_schedule: str | None = option(
        None,
        "sides of the images in pixels by epochs, such as 128:0-200,224:200-300; position embeddings are resized where "
        "one follows another, and the last is the model's",
    )
    mixup: float = option(0.0, "alpha of mixup; 0 is off")
    cutmix: float = option(0.0, "alpha of cutmix; 0 is off")
    mix_prob: float = option(1.0, "probability that a batch is mixed at all")
    mix_switch_prob: float = option(0.5, "probability of cutmix where both are on")
    mix_off_epoch: int | None = option(None, "epoch from which nothing is mixed any more; none: never off")
    mean: tuple[float, float, float] = option((0.485, 0.456, 0.406), "channel means, of values in 0..1")
    std: tuple[float, float, float] = option(
        (0.229, 0.224, 0.225), "channel standard deviations, of values in 0..1"
    )

    def __post_init__(self) -> None:
        _check_addresses(self)
        _check_range(self, 1, 2**31, "batch_size", "eval_batch_size", "threads")
        _check_choices(self)
        _check_range(self, 1, 16, "repeats")
        _check_range(self, 0, 1, "flip", "mix_prob", "mix_switch_prob", "erase_prob", "color_jitter")
        _require(
            not (self.three_augment and self.rand_augment),
            "three_augment and rand_augment are alternatives; leave one of them out",
        )
        _require(
            self.crop != "simple" or self.backend != "ffcv",
            "crop=simple is not made by backend=ffcv; choose native, resident or torchvision",
        )
        _check_range(self, 0.01, 1, "eval_crop")
        _check_range(self, 0, 100, "mixup", "cutmix")
        low, high = self.crop_scale
        _require(
            0 < low <= high <= 1, f"crop_scale={self.crop_scale} must be two shares with 0 < low <= high <= 1"
        )
        low, high = self.crop_ratio
        _require(0 < low <= high, f"crop_ratio={self.crop_ratio} must be two ratios with 0 < low <= high")
        _require(
            all(0 <= value <= 1 for value in self.mean),
            f"mean={self.mean} must be from 0 to 1 for every channel",
        )
        _require(min(self.std) > 0, f"std={self.std} must be above 0 for every channel")
        _ = self.image_sizes

    @property
    def image_sizes(self) -> tuple[ImageSize, ...]:
        """Return the phases of `image_size_schedule`, one after the other from epoch 0 on; none without one."""
        text = self.image_size_schedule
        if text is None:
            return ()
        found = [re.fullmatch(r"(\d+):(\d+)-(\d+)", part.strip()) for part in text.split(",")]
        phases = tuple(ImageSize(*map(int, match.groups())) for match in found if match)
        ends = (0, *(phase.end for phase in phases))
        _require(
            all(found)
            and all(
                phase.side > 0 and before == phase.first < phase.end
                for before, phase in zip(ends, phases, strict=False)
            ),
            f"image_size_schedule={text!r} is not understood; write SIDE:FIRST-END for each phase, from epoch 0 on and "
            "each from where the one before ends, such as 128:0-200,224:200-300",
        )
        return phases


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Update rule, with linear warm-up and cosine decay by step."""

    algorithm: Algorithm = option(
        "adamw",
        "update rule; muon (momentum 0.95): for the matrices of the blocks, and AdamW for the rest; lamb: DeiT III's, "
        "with clip_norm 1",
    )
    lr: float = option(1e-3, "peak learning rate, as it is used (not scaled by the batch)")
    min_lr: float = option(1e-5, "learning rate that the cosine ends at")
    warmup_lr: float = option(1e-6, "learning rate that the warm-up starts at")
    epochs: int = option(300, "epochs of the whole schedule, warm-up included, cool-down not")
    warmup_epochs: float = option(5, "epochs of linear warm-up")
    cooldown_epochs: int = option(0, "epochs at min_lr after the schedule")
    weight_decay: float = option(0.05, "decoupled weight decay")
    decay_position: bool = option(
        False, "decay position tables and class tokens too (Compact Transformers do)"
    )
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's and LAMB's averaging factors")
    eps: float = option(1e-8, "AdamW's and LAMB's epsilon")
    train: Trained = option("all", "what is trained; head: the classifier alone, as a linear probe does")
    layer_decay: float = option(
        1.0, "factor of the learning rate from each layer to the one below; 1: all learn at the head's rate"
    )
    clip_norm: float | None = option(None, "largest norm of the whole gradient; none: no clipping")
    loss: Loss = option(
        "cross_entropy",
        "training loss; bce: of each class by itself, as DeiT III (validation: cross-entropy)",
    )
    label_smoothing: float = option(0.0, "share of a label spread evenly over all classes")
    ema_decay: float = option(0.0, "decay of the weights' moving average; 0 is off")
    teacher: str | None = option(
        None,
        "teacher of hard distillation: a checkpoint of ours, a file with timm's config.json next to it, or "
        "torchvision:NAME:WEIGHTS_FILE",
    )
    accumulate: int = execution_option(1, "micro-batches of an optimizer step, for each worker")

    def __post_init__(self) -> None:
        _check_addresses(self)
        _check_choices(self)
        _check_range(self, 0, 1e3, "lr", "min_lr", "warmup_lr", "weight_decay")
        _check_range(self, 1, 10**6, "epochs", "accumulate")
        _check_range(self, 0, 10**6, "cooldown_epochs")
        _check_range(self, 0, self.epochs, "warmup_epochs")
        _check_range(self, 0, 0.999999, "label_smoothing", "ema_decay")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm={self.clip_norm} must be above 0, or none",
        )
        _require(0 < self.layer_decay <= 1, f"layer_decay={self.layer_decay} must be above 0, and 1 at most")
        _require(all(0 <= b < 1 for b in self.betas), f"betas={self.betas} must lie in [0, 1)")
        _require(
            self.loss != "bce" or not (self.label_smoothing or self.teacher),
            f"loss=bce takes no label_smoothing={self.label_smoothing} (every class with a share is a yes) and no "
            f"teacher={self.teacher}; set label_smoothing=0 and teacher=none, or loss=cross_entropy",
        )

    @property
    def total_epochs(self) -> int:
        """Epochs that are trained: the schedule and the cool-down."""
        return self.epochs + self.cooldown_epochs


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The beginning of a training, and the arithmetic that it is computed in."""

    seed: int = option(0, "seed of initialisation, order and augmentation")
    precision: Precision = option("auto", "auto: bf16 on GPU, fp32 on CPU")
    compression: Compression = option(
        "none", "what gradients travel as between workers; bf16 halves the traffic and rounds them"
    )
    init_from: str | None = option(
        None,
        "checkpoint whose weights the run starts from: ours, LaPE's, DeiT's, timm's, or hf-hub:OWNER/NAME",
    )

    def __post_init__(self) -> None:
        _check_addresses(self)
        _check_choices(self)
        _check_range(self, 0, 2**31, "seed")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The places of a run's metrics and pages, and how often pages are made."""

    uri: str | None = option(None, "MLflow server; none: $MLFLOW_TRACKING_URI, else sqlite in $LAPE_RAY_HOME")
    experiment: str = option("lape_ray", "MLflow experiment")
    tensorboard: str | None = option(
        None,
        "folder for TensorBoard event files too, one subfolder a run; needs the extra lape_ray[tensorboard]",
    )
    pages: bool = option(True, "end the run with its pages in MLflow: summary and position report")
    position_report_epochs: int | None = option(
        None, "epochs between two position reports in MLflow while training; none: at the end only"
    )

    def __post_init__(self) -> None:
        _check_addresses(self)
        _check_range(self, 1, 10**6, "position_report_epochs")
        _require(
            bool(self.experiment.strip("/")) and ".." not in self.experiment.split("/"),
            f"experiment={self.experiment!r} would keep artifacts in another folder; choose another name",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The place and manner of execution. Nothing here changes what is learned."""

    name: str | None = option(None, "name of the run; the same name resumes it; none: recipe and time")
    storage: str | None = option(None, "folder or s3:// address for checkpoints; none: $LAPE_RAY_HOME/runs")
    num_workers: int | Span = option(
        1,
        "training processes, one for each GPU; LOW:HIGH: as many of these as the cluster has at the time; "
        "0: train in this process, without Ray",
    )
    standby_workers: int = option(
        0,
        "workers that stand by, with all that a worker takes of its node: one replaces a lost one in seconds; not "
        "with LOW:HIGH",
    )
    device: Device = option("auto", "where workers compute; auto: gpu if the cluster has any")
    cpus_per_worker: int = option(
        1, "CPUs that Ray reserves for a worker: its loader and, on CPU, its arithmetic"
    )
    compile: Compile = option(
        "auto", "torch.compile of the training step's network; auto: default on GPU, off on CPU"
    )
    cuda_graph: bool = option(
        False,
        "launch a whole optimizer step at once: for small networks, one worker on a GPU, no accumulation; "
        "a step's memory stays held",
    )
    log_steps: int = option(50, "steps between two points of the metrics' curves")
    progress_s: float = option(5, "least seconds between two progress lines of an epoch")
    eval_epochs: int = option(1, "epochs between two evaluations")
    checkpoint_steps: int | None = option(
        None, "optimizer steps between two checkpoints within an epoch; none: by checkpoint_minutes alone"
    )
    checkpoint_minutes: float | Literal["auto"] = option(
        15,
        "minutes after which the next log step saves a checkpoint, if no epoch has ended; 0: off; "
        "auto: from what checkpoints cost and how often the run failed",
    )
    keep_checkpoints: int = option(2, "checkpoints to keep: the best by val/acc1, and always the newest")
    max_failures: int = option(
        3, "failures of workers without a new checkpoint between them, after which the run gives up"
    )
    timeout_s: int = option(60, "seconds after which a worker that hangs is an error, from its first step on")
    start_timeout_s: int = option(
        600, "the same until the first step is done: data may be fetched, networks are compiled"
    )
    outage_s: int = option(300, "seconds for which storage that is away is tried again, before the run stops")
    wait_s: int = option(60, "seconds to wait for the cluster to have the CPUs or GPUs that the run needs")
    overwrite: bool = option(
        False, "start again under a name that is already finished, deleting what it left"
    )
    stop_after_epochs: int | None = option(
        None, "stop after this many epochs of the schedule, to continue later"
    )

    def __post_init__(self) -> None:
        _check_addresses(self)
        _check_choices(self)
        _check_range(self, 0, 2**31, "max_failures", "wait_s", "outage_s", "standby_workers")
        low, high = self.workers
        _require(
            1 <= low <= high,
            f"num_workers={self.num_workers} must be from 1 up, and LOW at most HIGH; or 0, which is without Ray",
        )
        _require(
            self.standby_workers == 0 or (low == high and not self.in_process),
            f"standby_workers={self.standby_workers} needs num_workers to be one number from 1 up, not "
            f"{self.num_workers}",
        )
        _check_range(self, 1, 10**6, "cpus_per_worker", "log_steps", "eval_epochs", "keep_checkpoints",
                     "timeout_s", "start_timeout_s", "stop_after_epochs", "checkpoint_steps")  # fmt: skip
        _check_range(self, 0, 10**6, "checkpoint_minutes", "progress_s")
        if self.name is not None:
            check_name(self.name, "name")

    @property
    def workers(self) -> Span:
        """Return the least and the most workers; the command's own process is one."""
        if isinstance(self.num_workers, Span):
            return self.num_workers
        count = 1 if self.in_process else self.num_workers
        return Span(count, count)

    @property
    def in_process(self) -> bool:
        """Tell whether the command itself trains, without Ray."""
        return self.num_workers == 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One whole training run."""

    recipe: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_addresses(self)
        shares = self.micro_batches
        _require(
            self.data.batch_size % shares == 0,
            f"data.batch_size={self.data.batch_size} does not divide by run.num_workers={self.run.workers.high} "
            f"x optim.accumulate={self.optim.accumulate}; the nearest that do are "
            f"{max(shares, self.data.batch_size // shares * shares)} and "
            f"{(self.data.batch_size // shares + 1) * shares}",
        )

        _require(
            shares == 1 or not self.run.cuda_graph,
            f"run.cuda_graph takes one worker and one micro-batch, not run.num_workers={self.run.num_workers} x "
            f"optim.accumulate={self.optim.accumulate}",
        )

        sizes = self.data.image_sizes
        _require(
            not sizes or sizes[-1].end == self.optim.epochs,
            f"data.image_size_schedule={self.data.image_size_schedule} does not end with optim.epochs="
            f"{self.optim.epochs}; change one of them (a cool-down keeps the last size)",
        )

    def at_epoch(self, epoch: int) -> TrainConfig:
        """Return the config with the model's image size in epoch `epoch`, counted from 0."""
        sizes = self.data.image_sizes
        if not sizes:
            return self
        side = next((phase.side for phase in sizes if epoch < phase.end), sizes[-1].side)
        return dataclasses.replace(self, model=dataclasses.replace(self.model, image_size=side))

    def has_last_size(self, epoch: int) -> bool:
        """Tell whether images have the model's size in epoch `epoch`, counted from 0; others do not compare with it."""
        sizes = self.data.image_sizes
        return not sizes or self.at_epoch(epoch).model.image_size == sizes[-1].side

    @property
    def last_epoch(self) -> int:
        """Return the epoch after which this submission ends: the schedule's last, or `run.stop_after_epochs`."""
        return min(self.optim.total_epochs, self.run.stop_after_epochs or self.optim.total_epochs)

    @property
    def micro_batches(self) -> int:
        """Parts of an optimizer step's batch. Its workers share them out, however many there are."""
        return self.run.workers.high * self.optim.accumulate

    @property
    def micro_batch_size(self) -> int:
        """Images that one worker sends through the model at once while training."""
        return self.data.batch_size // self.micro_batches


C = TypeVar("C")
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "training": TrainingConfig,
    "tracking": TrackingConfig,
    "run": RunConfig,
}
LEARNED = ("model", "data", "optim", "training")
"""The sections that say what is learned."""


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Flatten to `section.field` -> value, in the order of the fields: for the tracker, for diffs and for the dump."""
    flat: dict[str, Any] = {"recipe": config.recipe}
    for section in SECTIONS:
        for field in dataclasses.fields(getattr(config, section)):
            flat[f"{section}.{field.name}"] = getattr(getattr(config, section), field.name)
    return flat


def replace_fields(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a copy with `section.field` (or `recipe`) set to new values, checked as a whole."""
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        if field:
            sections.setdefault(section, {})[field] = value
        else:
            top[name] = value
    top |= {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **top)


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], values: Any, place: str = "") -> C:
    """Make a config from what `to_dict` returned; fields that are absent have their defaults.

    Raises:
        ValueError: a field is unknown, of another type or out of its range; names it, below `place`.
    """
    made: C = typed(cls, _with_todays_sections(_without_passwords(values)), place, defaults=True)
    return made


_MOVED = {
    "training": {name: name for name in ("seed", "precision", "compression", "init_from")},
    "tracking": {
        "tracking_uri": "uri",
        **{name: name for name in ("experiment", "pages", "position_report_epochs")},
    },
}
"""Sections, and the fields of `run` that records from before those sections hold for them, with today's names."""


def _with_todays_sections(values: Any) -> Any:
    """Return a recorded config with the fields that were once `run`'s in their sections."""
    if not isinstance(values, dict) or not isinstance(values.get("run"), dict):
        return values
    run = dict(values["run"])
    moved = {
        section: {name: run.pop(old) for old, name in names.items() if old in run}
        for section, names in _MOVED.items()
        if section not in values
    }
    return {**values, **{section: found for section, found in moved.items() if found}, "run": run}


def _without_passwords(value: Any) -> Any:
    """Redact a recorded config: it may be from before addresses with passwords were refused; no plugin is."""
    if isinstance(value, dict):
        return {key: each if key == "plugin" else _without_passwords(each) for key, each in value.items()}
    return redacted(value) if isinstance(value, str) else value


def dump(config: TrainConfig) -> str:
    """Write the config as text, one `section.field = value` a line; stable, so that diff can compare two."""
    return "".join(f"{name} = {value!r}\n" for name, value in flatten(config).items())


def what_is_learned(config: TrainConfig) -> dict[str, Any]:
    """Return the part of a config that a resumed run must share with the run it continues, as `flatten` does."""
    found = {
        f"{section}.{field.name}": getattr(getattr(config, section), field.name)
        for section in LEARNED
        for field in dataclasses.fields(SECTIONS[section])
        if not field.metadata.get("execution")
    }
    return {name: value.identity if isinstance(value, Plugin) else value for name, value in found.items()}


def config_hash(config: TrainConfig) -> str:
    """Compute twelve hexadecimal digits that are equal for two configs that learn the same thing."""
    text = json.dumps(what_is_learned(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_value(kind: Any, text: str) -> Any:
    """Parse `text` as a value of the annotated type `kind`; a ValueError says what was expected."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        if Span in args and ":" in text:
            return Span.parse(text)
        if Plugin in args:
            return TrustedPlugin.read(text)
        if str in args or any(text in typing.get_args(a) for a in args if typing.get_origin(a) is Literal):
            return text
        return parse_value(next(a for a in args if a is not type(None)), text)
    if origin is Literal:
        _require(text in args, f"{text!r} is not one of {', '.join(args)}")
        return text
    if origin is tuple:
        parts = text.strip("()[] ").split(",")
        _require(len(parts) == len(args), f"{text!r} must be {len(args)} values with commas between")
        return tuple(parse_value(a, p.strip()) for a, p in zip(args, parts, strict=True))
    if kind is bool:
        _require(text.lower() in ("true", "false", "1", "0", "yes", "no"), f"{text!r} must be true or false")
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} must be {'a whole number' if kind is int else 'a number'}") from None


def write_value(value: Any) -> str:
    """Write a field's value as the command line takes it: `parse_value` reads it back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"({','.join(write_value(part) for part in value)})"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def words_beside(kinds: Sequence[Any]) -> Sequence[Any]:
    """Return the parts of a union without `str`, where that stands beside the words of a Literal for a plugin's."""
    literal = any(typing.get_origin(kind) is Literal for kind in kinds)
    return [kind for kind in kinds if not (literal and kind is str)]


def type_name(kind: Any) -> str:
    """Name the annotated type in the words of `--help`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Span:
        return "LOW:HIGH"
    if kind is Plugin:
        return "FILE.py|MODULE"
    if origin in (typing.Union, types.UnionType):
        args = (*words_beside(args),)
        return "|".join(type_name(a) if a is not type(None) else "none" for a in args)
    if origin is Literal:
        return "|".join(args)
    if origin is tuple:
        return ",".join(type_name(a) for a in args)
    return str(kind.__name__)
