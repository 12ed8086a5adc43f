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

# The official LaPE code keeps a layer's position parts in its block; here a join or bias holds those of all layers.
_RENAMES = (
    (re.compile(r"^(tokens_to_token|i2t)\."), "patch_embed."),
    (re.compile(r"^(blocks\.\d+)\.leff\."), r"\1.mlp."),
    (re.compile(r"^lca\.feedforward\."), "lca.mlp."),
    (re.compile(r"^pos_layer_embed$"), "lca.pos_layer_embed"),
    (re.compile(r"\bblocks\.(\d+)\.pe_norm\.(weight|bias)$"), r"join.norms.\1.\2"),
    (re.compile(r"\bblocks\.(\d+)\.attn\.pe_norm\.(weight|bias)$"), r"bias.norms.\1.\2"),
    (re.compile(r"^absolute_pos_embed$"), "pos_embed"),
    (re.compile(r"^head\.fc\."), "head."),
)
_STACKS = (
    (re.compile(r"^(.*)\bblocks\.(\d+)\.attn\.relative_position_bias_table$"), r"\1bias.table.table_LRH"),
    (re.compile(r"^()pos_embed(\d+)$"), "pos_embed"),
)
# T2T-ViT's own code keeps the training state around the weights, and its published figures are the average's.
_ENTRIES = ("model", "state_dict_ema", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.")
_DERIVED = re.compile(r"(relative_position_index|attn_mask)$")
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")


def inner_state_dict(loaded: Mapping[str, object]) -> object:
    """Return the weights of a checkpoint that may hold more: one of its `_ENTRIES`, or all of it."""
    return next((loaded[name] for name in _ENTRIES if loaded.get(name) is not None), loaded)


def convert_state_dict(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """Rename a checkpoint of the official LaPE code, DeiT, T2T-ViT, CeiT, Swin or timm to this package's names.

    Takes what `inner_state_dict` takes, with or without the prefixes of DDP and torch.compile. A state dict of this
    package passes through unchanged. Sizes are left alone: `load_weights` resizes.
    """
    inner = inner_state_dict(state_dict)
    if not isinstance(inner, Mapping):
        raise ValueError(f"the checkpoint holds a {type(inner).__name__} where its state dict should be")
    converted: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in inner.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the checkpoint's entry {name!r} is a {type(value).__name__}, not a tensor")
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
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

    With `new_head` a classifier for another number of classes is left as it was initialised. Returns one line for each
    table that was resized or left out.

    Raises:
        ValueError: the checkpoint is of another model; says what differs.
    """
    state, own = convert_state_dict(state_dict), model.state_dict()
    if "pos_embed" in state and "pos_embed" not in own and model.pos_embed is not None:
        check_fixed_table(state.pop("pos_embed"), model.pos_embed)
    notes = _fit(state, own, model.resizers(), new_head=new_head)
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
            "choose the variant, position, join, bias and rotary that it was trained with"
        )
    model.load_state_dict(state)
    return notes


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
