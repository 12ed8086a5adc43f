"""A checkpoint as a feature extractor for detection and segmentation, in a folder that needs no lape_ray.

Shapes: B images, N tokens = prefix tokens + patches, D width, S side of the model's input in pixels.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from lape_ray.config import Join
from lape_ray.inference.predict import Predictor
from lape_ray.model import Network, build_model, resolve
from lape_ray.model.compact import ResidualNormBlock
from lape_ray.model.swin import Swin
from lape_ray.model.variants import VARIANTS, VariantSpec
from lape_ray.model.vit import VisionTransformer

TOLERANCE = 1e-5
TEMPLATE = Path(__file__).with_name("backbone_module.py")
SUPPORTED = tuple(name for name, spec in VARIANTS.items() if spec.patch_size is not None)
WRITTEN = {
    "position": ("none", "learnable", "sincos1d", "sincos2d"),
    "join": tuple(name for name in get_args(Join) if name != "mpvg"),
    "bias": ("none", "relative2d", "alibi2d"),
    "rotary": ("none", "axial", "mixed", "spiral"),
}
"""The position embeddings that the template has."""
# Names here, and in the template, where a ViT is the one stage of a network and all parts are its stages'.
_RENAMES = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed."),
    (re.compile(r"^patch_embed\.norm\."), "patch_norm."),
    (re.compile(r"^cls_token$"), "prefix.0"),
    (re.compile(r"^dist_token$"), "prefix.1"),
    (re.compile(r"^layers\."), "stages."),
    (re.compile(r"^(blocks|join|bias|rotary)\."), r"stages.0.\1."),
    (re.compile(r"\bjoin\.norms\."), "pe_norms."),
    (re.compile(r"\bbias\.table\.table_LRH$"), "bias_table"),
    (re.compile(r"\bbias\.norms\."), "bias_norms."),
    (re.compile(r"\brotary\.frequencies_L2HF$"), "frequencies"),
    (re.compile(r"\bdownsample\.norm\."), "merge_norm."),
    (re.compile(r"\bdownsample\.reduction\."), "reduction."),
    (re.compile(r"\bls([12])\.gamma$"), r"gamma_\1"),
)
_HEAD = re.compile(r"(head|head_dist|pool)\.")


def export_backbone(predictor: Predictor, folder: Path) -> str:
    """Write backbone.py, config.json and model.safetensors; returns how to load them.

    The written folder is loaded, and its maps are compared with the network's.

    Raises:
        ValueError: `SUPPORTED` or `WRITTEN` has not what the network is made of, or the file computes another network.
    """
    spec = resolve(predictor.config.model)
    if predictor.config.model.variant not in SUPPORTED:
        raise ValueError(
            f"{predictor.config.model.variant} is not written as a backbone, for its tokens are no patches; those that "
            f"are: {', '.join(SUPPORTED)}"
        )
    for field, names in WRITTEN.items():
        if (found := getattr(predictor.config.model, field)) not in names:
            raise ValueError(
                f"{field}={found} is not written as a backbone; those that are: {', '.join(names)}"
            )
    network = build_model(predictor.config.model)
    network.load_state_dict(predictor.model.network.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    weights = {_name(name): tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    weights = {name: tensor for name, tensor in weights.items() if not _HEAD.match(name)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(predictor, spec, network), indent=1) + "\n")
    (folder / "backbone.py").write_text(TEMPLATE.read_text())
    try:
        difference = _compare(network.eval(), folder)
    except (
        RuntimeError,
        KeyError,
        AttributeError,
    ) as error:  # of load_state_dict, of a name that it does not know
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder}/backbone.py does not compute this network: {reason}") from None
    if difference > TOLERANCE:
        raise ValueError(
            f"{folder}/backbone.py does not compute this network: its maps differ by {difference:.1e} of their largest "
            f"value, more than {TOLERANCE:g}"
        )
    return f"from backbone import Backbone; its maps equal the network's within {difference:.1e} of their largest value"


def _name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _config(predictor: Predictor, spec: VariantSpec, network: Network) -> dict[str, Any]:
    model, data, names = predictor.config.model, predictor.config.data, network.state_dict()
    patches = (spec.image_size // (spec.patch_size or 1)) ** 2
    rows = patches + spec.num_prefix if network.pos_embed is None else network.pos_embed.shape[1]
    return {
        "architecture": model.variant,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "patch_norm": "patch_embed.norm.weight" in names,
        "embed_dim": spec.embed_dim,
        "depths": list(spec.depths or (spec.depth,)),
        "num_heads": spec.num_heads,
        "mlp_ratio": spec.mlp_ratio,
        "qkv_bias": spec.qkv_bias,
        "eps": spec.eps,
        "residual_norm": issubclass(spec.block, ResidualNormBlock),
        "layer_scale": any(name.endswith(".ls1.gamma") for name in names),
        "window_size": spec.window_size if spec.depths else None,
        "num_prefix": spec.num_prefix,
        "table_prefix": rows - patches,
        **{key: getattr(model, key) for key in ("position", "join", "bias", "bias_join", "rotary")},
        "mean": list(data.mean),
        "std": list(data.std),
    }


def load_module(file: Path) -> Any:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compare(network: Network, folder: Path) -> float:
    """Compute the largest difference in any map over the map's largest value, on random images."""
    backbone = load_module(folder / "backbone.py").Backbone()
    stages = network.stages()
    backbone.outputs = list(range(len(stages if len(stages) > 1 else stages[0].blocks)))
    size = backbone.config["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pairs = zip(backbone.eval()(images), feature_maps(network, images), strict=True)
        return max(float((theirs - ours).abs().max() / ours.abs().max()) for theirs, ours in pairs)


def feature_maps(network: Network, images_BCHW: Tensor) -> list[Tensor]:
    """Compute the map (B, D, rows, columns) of each block, or of each stage where the network has several."""
    blocks = [stage.blocks[-1] for stage in network.stages()]
    if len(blocks) == 1:
        blocks = list(network.stages()[0].blocks)
    tokens: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, x_BND: tokens.append(x_BND)) for block in blocks]
    network(images_BCHW)
    for hook in hooks:
        hook.remove()
    assert isinstance(network, VisionTransformer | Swin)
    rows, columns = network.grid
    if isinstance(network, VisionTransformer):
        return [_image(x_BND[:, network.num_prefix :], rows, columns) for x_BND in tokens]
    return [_image(x_BND, rows >> index, columns >> index) for index, x_BND in enumerate(tokens)]


def _image(x_BPD: Tensor, rows: int, columns: int) -> Tensor:
    return x_BPD.transpose(1, 2).unflatten(2, (rows, columns))
