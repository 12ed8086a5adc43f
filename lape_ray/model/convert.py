"""Load checkpoints of other code and of other sizes: their weights' names here, and the resizing of tables.

Shapes: T tables, N tokens = prefix tokens + patches, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lape_ray.model.network import Network
from lape_ray.model.position import check_fixed_table
from lape_ray.model.variants import VARIANTS

# The official LaPE code keeps a layer's position parts in its block; here a join or bias holds those of all layers.
_RENAMES = (
    (re.compile(r"^(tokens_to_token|i2t)\."), "patch_embed."),
    (re.compile(r"^(blocks\.\d+)\.leff\."), r"\1.mlp."),
    (re.compile(r"^lca\.feedforward\."), "lca.mlp."),
    (re.compile(r"^pos_layer_embed$"), "lca.pos_layer_embed"),
    (re.compile(r"\bblocks\.(\d+)\.gamma_([12])$"), r"blocks.\1.ls\2.gamma"),
    (re.compile(r"\bblocks\.(\d+)\.pe_norm\.(weight|bias)$"), r"join.norms.\1.\2"),
    (re.compile(r"\bblocks\.(\d+)\.attn\.pe_norm\.(weight|bias)$"), r"bias.norms.\1.\2"),
    (re.compile(r"^absolute_pos_embed$"), "pos_embed"),
    (re.compile(r"^head\.fc\."), "head."),
)
_STACKS = (
    (re.compile(r"^(.*)\bblocks\.(\d+)\.attn\.relative_position_bias_table$"), r"\1bias.table.table_LRH"),
    (re.compile(r"^()pos_embed(\d+)$"), "pos_embed"),
)
_DERIVED = re.compile(r"(relative_position_index|attn_mask|^n_averaged)$")
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
_ANCHOR = re.compile(r"((?:.*\.)?)blocks\.0\.norm1\.weight")
_AVERAGE = re.compile(r"(^|[._])ema([._]|$)")
_FAMILIES = {"deit3": "blocks.0.ls1.", "t2t": "patch_embed.attention1.", "ceit": "lca.", "swin": "layers."}
HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
# Parts of pre-training that a new training leaves out, with a line.
_PRETRAINING = re.compile(r"decoder_|mask_token$|head(_dist)?\.")
KINDS = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"patch_embed\.(attention1|project)\.", "a T2T-ViT"),
        (r"layers\.\d+\.blocks\.", "a Swin transformer"),
        (r"lca\.", "a CeiT"),
        (r"blocks_token_only\.", "a CaiT"),
        (
            r"blocks\.\d+\.ls1\.",
            "a network with LayerScale, such as DeiT III (--model.variant deit3_*) or DINOv2 (--model.layer_scale)",
        ),
        (r"blocks\.\d+\.\d+\.norm1", "a DINOv2 in chunks"),
        (r"(layer1\.0\.conv1|trunk_output|features\.0)\b", "a CNN of torchvision (a teacher: torchvision:NAME:FILE)"),
        (r"(\w+\.)?(embeddings|encoder\.layer)\.", "in Hugging Face's names (give timm's file of the same weights)"),
        (r"encoder\.layers\.encoder_layer_", "a ViT in torchvision's names (give timm's file)"),
        (r"(visual\.)?transformer\.resblocks\.", "a CLIP"),
        (r"(classifier|tokenizer)\.(blocks|conv_layers)\.", "in the Compact Transformers' names"),
        (r"fc_norm\.", "a network whose head reads the mean of all tokens (fc_norm)"),
    )
)  # fmt: skip
"""Names, as they are here, that tell a network of another family, and what to call it."""


def one_network(state: Mapping[str, Tensor], *, ema: bool = False) -> dict[str, Tensor]:
    """Take the prefixes of DDP, torch.compile, Lightning or an averager off the names of a state dict.

    What lies beside the network (losses, projection heads, counters) is left out. Of one without blocks only the
    prefixes of DDP and torch.compile are taken off. With `ema` the network is the one whose prefix says so.

    Raises:
        ValueError: there are several networks, or no moving average; says which there are.
    """
    prefixes = [match[1] for name in state if (match := _ANCHOR.fullmatch(name))]
    prefixes = [
        prefix for prefix in prefixes if not re.search(r"(^|\.)layers\.\d+\.$", prefix)
    ]  # Swin's stages
    averages = [prefix for prefix in prefixes if _AVERAGE.search(prefix)]
    chosen = averages if ema else [one for one in prefixes if one not in averages] or averages
    if ema and not chosen:
        raise ValueError("holds no moving average; leave --ema out")
    if len(chosen) > 1:
        raise ValueError(
            f"holds {len(chosen)} networks, {', '.join(map(repr, chosen))}; save one of them alone"
        )
    prefix = chosen[0] if chosen else ""
    others = tuple(one for one in prefixes if one != prefix and one.startswith(prefix))  # networks within it
    own = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not name.startswith(others)
    }
    if not prefix:
        return {_WRAPPERS.sub("", name): value for name, value in own.items()}
    parents = [prefix[: place + 1] for place, letter in enumerate(prefix[:-1]) if letter == "."]
    for parent in ("", *parents):  # a classifier that was put behind a backbone
        own |= {name: state[parent + name] for name in HEADS if parent + name in state and name not in own}
    return own


def convert_state_dict(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """Rename a checkpoint of the official code of LaPE, DeiT, T2T-ViT, CeiT or Swin, or of timm to our own names.

    Takes `{"model": ...}` or a bare state dict, with or without prefixes (see `one_network`). A state dict of this
    package passes through unchanged. Sizes are left alone: `load_weights` resizes.
    """
    inner = state_dict.get("model", state_dict)
    if not isinstance(inner, Mapping):
        raise ValueError(f"the checkpoint's entry 'model' is a {type(inner).__name__}, not a state dict")
    for name, value in inner.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the checkpoint's entry {name!r} is a {type(value).__name__}, not a tensor")
    converted: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in one_network(inner).items():
        if _DERIVED.search(name):
            continue
        for pattern, target in _STACKS:
            if match := pattern.match(name):
                stacks.setdefault(match.expand(target), {})[int(match[2])] = value
                break
        else:
            for pattern, replacement in _RENAMES:
                name = pattern.sub(replacement, name)
            converted[name] = value
    for target, layers in stacks.items():
        tables = [layers[i] for i in sorted(layers)]
        if target == "pos_embed":  # unshared tables: (1, N, D) each
            tables = [table.reshape(table.shape[-2:]) for table in tables]
        converted[target] = torch.stack(tables)
    if "pos_embed" in converted and converted["pos_embed"].ndim == 2:  # the official sincos1d table is (N, D)
        converted["pos_embed"] = converted["pos_embed"].unsqueeze(0)
    return _downsample_ends_its_stage(converted)


def _downsample_ends_its_stage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's Swin, where merging begins a stage; in Swin's own code and here it ends the stage before."""
    if any(name.startswith("layers.0.downsample.") for name in state):
        return state
    return {
        _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) - 1}.downsample.", name): value
        for name, value in state.items()
    }


def load_weights(model: Network, state_dict: Mapping[str, object], *, new_head: bool = False) -> list[str]:
    """Load any checkpoint that `convert_state_dict` reads into `model`, resizing position tables where needed.

    With `new_head` a classifier for another number of classes, or one that the checkpoint has not, is left as it was
    initialised, and what only a pre-training needs is left out. Returns one line for each table that was resized or
    left out.

    Raises:
        ValueError: the checkpoint is of another model; says what differs.
    """
    state, own = convert_state_dict(state_dict), model.state_dict()
    if kind := _unknown_kind(state, own):
        raise ValueError(
            f"the checkpoint is {kind}, and not of the network that is configured; give one that is, such as DeiT's or "
            "timm's deit_tiny_patch16_224 for --model.variant deit_tiny"
        )
    hint = _hint(state, own)
    if "pos_embed" in state and "pos_embed" not in own:
        if model.pos_embed is not None:
            check_fixed_table(state.pop("pos_embed"), model.pos_embed)
        elif not state["pos_embed"].any():  # adds nothing: timm's DeiT always has a table
            del state["pos_embed"]
    notes = _without_head(state, own) if new_head else []
    if not hint:
        notes += _fit(state, own, model.resizers(), new_head=new_head)
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unknown {name}" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(problems[:6])}{more}; "
            + (hint or "choose the variant, position, join, bias and rotary that it was trained with")
        )
    model.load_state_dict(state)
    return notes


def _unknown_kind(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Say what kind of network a checkpoint is of, where it is one that `own` is not; else an empty text."""
    for pattern, words in KINDS:
        if any(map(pattern.match, state)) and not any(map(pattern.match, own)):
            return words
    return ""


def _hint(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Say which variant a checkpoint of another size or with other tokens is of; empty where it may fit."""
    distilled = "dist_token" in state
    if "dist_token" in own and not distilled:
        return "it has no distillation token: choose the --model.variant without _distilled"
    width, depth = _size(state)
    if (width, depth) != _size(own) and width:
        found = [
            name
            for name, spec in VARIANTS.items()
            if (spec.embed_dim, spec.depth, spec.num_prefix == 2) == (width, depth, distilled)
            and _family(state) == (name.partition("_")[0] if name.startswith(tuple(_FAMILIES)) else "")
        ]
        variant = f": choose --model.variant {' or '.join(found)}" if found else ""
        return f"it has {depth} blocks of width {width}{variant}"
    if distilled and "dist_token" not in own:
        return "it has a distillation token: choose the --model.variant with _distilled behind its name"
    if "blocks.0.ls1.gamma" in own and "blocks.0.ls1.gamma" not in state and width:
        return "it has no LayerScale: choose a --model.variant without it, such as deit_*, or --model.layer_scale 0"
    if "head.weight" in own and "head.weight" not in state and "norm.weight" in state:
        return (
            "it has no classifier, as a backbone of DINO, MAE or timm's num_classes=0: train one with "
            "--training.init_from"
        )
    return ""


def _family(state: Mapping[str, Tensor]) -> str:
    """Return the beginning of its variants' names where a network is none of plain blocks; else an empty text."""
    return next((family for family, part in _FAMILIES.items() if any(n.startswith(part) for n in state)), "")


def _size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the width and the number of blocks; zeros where the names do not tell."""
    blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.norm1\.weight", name))]
    norm = state.get("blocks.0.norm1.weight")
    return (0 if norm is None else norm.shape[0]), (max(blocks) + 1 if blocks else 0)


def _without_head(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Leave out what only a pre-training needs, and keep the model's fresh head where `state` has none."""
    extra = [name for name in state if name not in own and _PRETRAINING.match(name)]
    for name in extra:
        del state[name]
    fresh = [name for name in HEADS if name in own and name not in state]
    state.update({name: own[name] for name in fresh})
    notes = [f"{extra[0]} and {len(extra) - 1} more left out: they are of its pre-training"] if extra else []
    return notes + [f"{name} starts fresh: the checkpoint has none" for name in fresh if "weight" in name]


def _fit(
    state: dict[str, Tensor],
    own: Mapping[str, Tensor],
    resize: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    new_head: bool,
) -> list[str]:
    """Replace what has another size in `state` by what fits `own`, where that can be; returns a line about each."""
    notes = []
    for name, value in list(state.items()):
        if name not in own or value.shape == own[name].shape:
            continue
        resizer = next((resize[prefix] for prefix in resize if name.startswith(prefix)), None)
        if name.startswith("head") and new_head:
            state[name] = own[name]
            notes.append(f"{name} {tuple(value.shape)} left out: the model has {own[name].shape[0]} classes")
        elif resizer is not None and (resized := resizer(value)).shape == own[name].shape:
            state[name] = resized
            notes.append(f"{name} resized from {tuple(value.shape)} to {tuple(resized.shape)}")
    return notes
