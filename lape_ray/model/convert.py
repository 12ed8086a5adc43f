"""Checkpoints of other code: names, and tables of another resolution.

Shapes: T tables, N tokens = prefix tokens + patches, D width, L layers, R relative offsets, H heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_ray.model.position import POSITIONS, Grid
from lape_ray.model.vit import VisionTransformer

# The official LaPE code keeps a layer's position parts in its block; here they live in the port that uses them.
_RENAMES = (
    (re.compile(r"^blocks\.(\d+)\.pe_norm\.(weight|bias)$"), r"join.norms.\1.\2"),
    (re.compile(r"^blocks\.(\d+)\.attn\.pe_norm\.(weight|bias)$"), r"bias.norms.\1.\2"),
)
_STACKS = (
    (re.compile(r"^blocks\.(\d+)\.attn\.relative_position_bias_table$"), "bias.table.table_LRH"),
    (re.compile(r"^pos_embed(\d+)$"), "pos_embed"),
)
_WRAPPERS = ("module.", "_orig_mod.")
_DERIVED = re.compile(r"relative_position_index$")


def convert_state_dict(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """Rename a checkpoint of the official LaPE code, DeiT or timm to this package's names.

    Takes `{"model": ...}` or a bare state dict, with or without the prefixes of DDP and torch.compile. A state
    dict of this package passes through unchanged. Sizes are left alone: `load_weights` resizes.
    """
    inner = state_dict.get("model", state_dict)
    if not isinstance(inner, Mapping):
        raise ValueError(f"the checkpoint's entry 'model' is a {type(inner).__name__}, not a state dict")
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
                stacks.setdefault(target, {})[int(match[1])] = value
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
    return converted


def resize_position(table_TND: Tensor, grid: Grid, num_prefix: int) -> Tensor:
    """A token table for another grid: patch rows resized (bicubic), prefix rows kept.

    The table's own grid is taken to be square; a ValueError says so if it is not.
    """
    prefix_TPD, patches_TND = table_TND[:, :num_prefix], table_TND[:, num_prefix:]
    image_TDHW = _square(patches_TND, "pos_embed").permute(0, 3, 1, 2)
    resized = _bicubic(image_TDHW, grid).flatten(2).transpose(1, 2)
    return torch.cat((prefix_TPD, resized), dim=1)


def resize_relative_bias(table_LRH: Tensor, grid: Grid) -> Tensor:
    """A relative bias table for another grid: its map of offsets resized (bicubic)."""
    image_LHYX = _square(table_LRH, "bias.table.table_LRH").permute(0, 3, 1, 2)
    return _bicubic(image_LHYX, (2 * grid[0] - 1, 2 * grid[1] - 1)).flatten(2).transpose(1, 2)


def _resize_patch_vector(vector_P: Tensor, grid: Grid) -> Tensor:
    image = _square(vector_P[None, :, None], "bias.norms").permute(0, 3, 1, 2)
    return _bicubic(image, grid).flatten()


def _bicubic(image: Tensor, size: Grid) -> Tensor:
    return F.interpolate(image.float(), size=size, mode="bicubic", align_corners=False).to(image.dtype)


def _square(rows: Tensor, name: str) -> Tensor:
    side = math.isqrt(rows.shape[1])
    if side * side != rows.shape[1]:
        raise ValueError(
            f"{name} holds {rows.shape[1]} patch rows, which is no square grid and cannot be resized"
        )
    return rows.unflatten(1, (side, side))


def _resizers(model: VisionTransformer) -> dict[str, Callable[[Tensor], Tensor]]:
    grid, prefix = model.grid, model.num_prefix
    return {
        "pos_embed": lambda table: resize_position(table, grid, prefix),
        "bias.table.table_LRH": lambda table: resize_relative_bias(table, grid),
        "bias.norms.": lambda vector: _resize_patch_vector(vector, grid),
    }


def load_weights(
    model: VisionTransformer, state_dict: Mapping[str, object], *, new_head: bool = False
) -> list[str]:
    """Load any checkpoint that `convert_state_dict` reads into `model`, resizing position tables where needed.

    With `new_head` a classifier for another number of classes is left as it was initialised. Returns one line for each
    table that was resized or left out. A checkpoint of another model is a ValueError that says what differs.
    """
    state = convert_state_dict(state_dict)
    own = model.state_dict()
    notes: list[str] = []
    fixed = "pos_embed" in state and "pos_embed" not in own
    if fixed and isinstance(getattr(model, "pos_embed", None), Tensor):
        # Sines are computed, not loaded; but a *trained* table in their place means another model.
        table = state.pop("pos_embed")
        if table.shape == model.pos_embed.shape and not torch.allclose(
            table.float(), model.pos_embed.cpu(), atol=1e-4
        ):
            raise ValueError(
                "the checkpoint's pos_embed is not the fixed table of this model; "
                f"choose model.position=learnable instead of {_fixed_names()}"
            )
    for name, value in list(state.items()):
        if name not in own or value.shape == own[name].shape:
            continue
        resizer = next((f for prefix, f in _resizers(model).items() if name.startswith(prefix)), None)
        if name.startswith("head") and new_head:
            state[name] = own[name]
            notes.append(f"{name} {tuple(value.shape)} left out: the model has {own[name].shape[0]} classes")
        elif resizer is not None and (resized := resizer(value)).shape == own[name].shape:
            state[name] = resized
            notes.append(f"{name} resized from {tuple(value.shape)} to {tuple(resized.shape)}")
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


def _fixed_names() -> str:
    return "/".join(name for name, kind in POSITIONS.items() if kind is not None and not kind.trained)
