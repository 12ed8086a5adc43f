"""A checkpoint in the names of the code that its family was published with."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lape_ray.config import ModelConfig, plugin_names
from lape_ray.inference.predict import Predictor
from lape_ray.model import Network
from lape_ray.model.ceit import CeiT
from lape_ray.model.position import ABSOLUTES
from lape_ray.model.swin import Swin
from lape_ray.model.t2t import TokensToToken

# The reverse of those in `lape_ray.model.convert`: these are the names of all families.
_RENAMES = (
    (re.compile(r"\bjoin\.norms\.(\d+)\."), r"blocks.\1.pe_norm."),
    (re.compile(r"\bbias\.norms\.(\d+)\."), r"blocks.\1.attn.pe_norm."),
    (re.compile(r"\bls([12])\.gamma$"), r"gamma_\1"),
)
_OF_CEIT = (
    (re.compile(r"^patch_embed\."), "i2t."),
    (re.compile(r"^(blocks\.\d+)\.mlp\."), r"\1.leff."),
    (re.compile(r"^lca\.mlp\."), "lca.feedforward."),
    (re.compile(r"^lca\.pos_layer_embed$"), "pos_layer_embed"),
)
_OF_T2T = ((re.compile(r"^patch_embed\."), "tokens_to_token."),)
_BIAS = re.compile(r"\bbias\.table\.table_LRH$")


def not_official(model: ModelConfig) -> str | None:
    """Say why no published code has a network of this kind; None where one has."""
    if model.variant.startswith(("vit_lite", "cvt", "cct")):
        return "the Compact Transformers' code builds its networks of other parts"
    for of, name in plugin_names(model).items():
        return f"no published code has {of}={name}"
    if model.pool is not None:
        return f"the code of this family reads a class token, and not pool={model.pool}"
    if model.position not in ABSOLUTES:
        return f"no published code of these families has position={model.position}"
    if model.bias not in ("none", "relative2d"):
        return f"no published code of these families has bias={model.bias}"
    if model.rotary != "none":
        return f"no published code of these families has rotary={model.rotary}"
    return None


def official_state(network: Network) -> dict[str, Tensor]:
    """Name the weights of a network as its family's code does, and those of LaPE as its authors' code does.

    A fixed table is among them, and a relative bias is one table for each block.
    """
    t2t = isinstance(getattr(network, "patch_embed", None), TokensToToken)
    renames = [*_RENAMES, *(_OF_T2T if t2t else ()), *(_OF_CEIT if isinstance(network, CeiT) else ())]
    named: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if _BIAS.search(name):
            for layer, table_RH in enumerate(tensor.unbind(0)):
                table = f"blocks.{layer}.attn.relative_position_bias_table"
                named[_BIAS.sub(table, name)] = table_RH
        elif name != "pos_embed":
            for pattern, replacement in renames:
                name = pattern.sub(replacement, name)
            named[name] = tensor
    if (table_TND := network.pos_embed) is None:
        return named
    if len(table_TND) > 1:  # of join=unshare
        return named | {f"pos_embed{layer}": table for layer, table in enumerate(table_TND.split(1))}
    return named | {"absolute_pos_embed" if isinstance(network, Swin) else "pos_embed": table_TND}


def export_official(predictor: Predictor, file: Path) -> str:
    """Write the weights under their names in the published code: a .safetensors, or a .pth as that code reads it.

    Raises:
        ValueError: no published code has this network, or the file is of another kind.
    """
    if reason := not_official(predictor.config.model):
        raise ValueError(f"--official: {reason}; the names of lape_ray are in --timm's folder")
    state, t2t = official_state(predictor.model.network), predictor.config.model.variant.startswith("t2t")
    if predictor.config.model.position == "sincos1d" and not t2t:
        state["pos_embed"] = state["pos_embed"].squeeze(0)  # as LaPE's authors keep it
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(weights, file, metadata={"format": "pt"})
    elif file.suffix == ".pth":
        torch.save({"state_dict" if t2t else "model": weights}, file)
    else:
        raise ValueError(f"--official {file}: its name must end with .safetensors or .pth")
    return f"{len(weights)} tensors in the names of its published code"
