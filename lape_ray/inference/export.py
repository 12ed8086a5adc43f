"""A checkpoint in the formats of other tools: timm's folder, ONNX, and a folder that MLflow can serve.

Shapes: B images, K classes, S side of the model's input in pixels.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import lape_ray
from lape_ray import tracking
from lape_ray.config import TrainConfig, to_dict
from lape_ray.data.beton import Manifest, manifest_path, set_files
from lape_ray.data.remote import remote_manifest
from lape_ray.inference import serving
from lape_ray.inference.checkpoints import find_subjects
from lape_ray.inference.predict import Predictor, make_predictor
from lape_ray.inference.samples import folder_images, validation_images
from lape_ray.model import resolve
from lape_ray.model.variants import VariantSpec
from lape_ray.storage import is_remote, written_folder, written_path
from lape_ray.training.checkpoint import read_metadata

TIMM_NAMES = {
    name: f"{name}_patch16_224"
    for size in ("tiny", "small", "base")
    for name in (f"deit_{size}", f"deit_{size}_distilled")
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TOLERANCE = 1e-4
log = logging.getLogger(__name__)


def class_names(config: TrainConfig) -> tuple[str, ...] | None:
    """Read the names of classes in the manifest of `data.val`, else of `data.train`; None where neither exists."""
    for path in (config.data.val, config.data.train):
        if path:
            with contextlib.suppress(FileNotFoundError):
                return _manifest(path).classes
    return None


def _manifest(path: str) -> Manifest:
    if is_remote(path):
        return remote_manifest(path)
    # A manifest is enough, without its images; a set has one for each of its files.
    files = (path,) if manifest_path(path).is_file() else set_files(path)
    return Manifest.of_set([Manifest.load(file) for file in files], path)


# --- timm -----------------------------------------------------------------------------------------------------


def not_for_timm(config: TrainConfig) -> str | None:
    """Say why timm has no model of this kind; None where it has."""
    model = config.model
    if model.variant not in TIMM_NAMES:
        return f"timm has no {model.variant}"
    if model.join != "basic":
        return f"timm has no join={model.join}"
    if model.bias != "none":
        return f"timm's DeiT has no bias={model.bias}"
    if model.rotary != "none":
        return f"timm's DeiT has no rotary={model.rotary}"
    return None


def export_timm(predictor: Predictor, folder: Path) -> str:
    """Write model.safetensors and config.json in timm's layout and names; returns how to load them.

    A network that timm has (DeiT with join=basic) loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
    Every other is written in the same layout under its own names, and the returned line says so. Fixed tables
    (sincos) are written as weights, and no position as zeros.
    """
    config, network = predictor.config, predictor.model.network
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    reason = not_for_timm(config)
    if reason is None:
        table = getattr(network, "pos_embed", None)
        spec = resolve(config.model)
        tokens = spec.num_prefix + (spec.image_size // (spec.patch_size or 1)) ** 2
        zeros = torch.zeros(1, tokens, spec.embed_dim)
        weights["pos_embed"] = (table if isinstance(table, Tensor) else zeros).detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_timm_config(predictor), indent=1) + "\n")
    if reason is None:
        return f'timm.create_model("local-dir:{folder}", pretrained=True)'
    return f"names as in lape_ray; timm cannot load it, for {reason}"


def _timm_config(predictor: Predictor) -> dict[str, Any]:
    config, spec = predictor.config, resolve(predictor.config.model)
    return {
        "architecture": TIMM_NAMES.get(config.model.variant, config.model.variant),
        "num_classes": spec.num_classes,
        "num_features": spec.embed_dim,
        "label_names": list(predictor.classes),
        "model_args": _timm_arguments(spec),
        "position": {
            key: getattr(config.model, key) for key in ("position", "join", "bias", "bias_join", "rotary")
        },
        "pretrained_cfg": {
            "input_size": [3, spec.image_size, spec.image_size],
            "fixed_input_size": True,
            "num_classes": spec.num_classes,
            "mean": list(config.data.mean),
            "std": list(config.data.std),
            "crop_pct": config.data.eval_crop,
            "crop_mode": "center",
            "interpolation": "bilinear" if config.data.interpolation == "bilinear" else "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if spec.num_prefix == 2 else "head",
        },
    }


def _timm_arguments(spec: VariantSpec) -> dict[str, Any]:
    return {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "embed_dim": spec.embed_dim,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        "mlp_ratio": spec.mlp_ratio,
    }


# --- ONNX -----------------------------------------------------------------------------------------------------


def _onnx_packages() -> list[ModuleType]:
    """Import the packages that write and run ONNX; a ValueError names all that are missing."""
    found, missing = [], []
    for name in ONNX_PACKAGES:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            missing.append(name)
    if missing:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install {' '.join(missing)}"
        )
    return found


def export_onnx(predictor: Predictor, file: Path, images_BCHW: Tensor) -> float:
    """Write the network with its normalisation as ONNX: uint8 `images` (B, 3, S, S), any B, to `logits` (B, K).

    The file is then run by onnxruntime on the given images and compared with PyTorch; returns the largest difference
    of a logit.

    Raises:
        ValueError: a package is missing (all are named), or the outputs differ by more than 1e-4; a file that was there
            before stays.
    """
    _onnx_packages()
    model = predictor.model.cpu()
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.partial")
    two_BCHW = images_BCHW[:1].repeat(2, 1, 1, 1)  # a batch of one would be taken for a constant
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model,
            (two_BCHW,),
            str(fresh),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images_BCHW": {0: torch.export.Dim("batch", min=1, max=65536)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    difference = compare_onnx(predictor, fresh, images_BCHW)
    if not difference <= ONNX_TOLERANCE:
        fresh.unlink()
        raise ValueError(
            f"the ONNX model's logits differ from PyTorch's by {difference:.1e}, more than {ONNX_TOLERANCE:g}; {file} "
            "is not written"
        )
    fresh.replace(file)
    return difference


def compare_onnx(predictor: Predictor, file: Path, images_BCHW: Tensor) -> float:
    """Compute the largest difference of a logit between onnxruntime and PyTorch, on the same uint8 (B, 3, S, S)."""
    onnxruntime = _onnx_packages()[-1]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (theirs_BK,) = session.run(["logits"], {"images": images_BCHW.numpy()})
    with torch.inference_mode():
        ours_BK = predictor.model.cpu()(images_BCHW)
    return float(np.abs(theirs_BK - ours_BK.numpy()).max())


# --- MLflow ---------------------------------------------------------------------------------------------------


def write_served(predictor: Predictor, folder: Path) -> Path:
    """Write what `lape_ray.inference.serving` loads: weights, config and names of classes. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.cpu().contiguous() for name, t in predictor.model.network.state_dict().items()}
    save_file(state, folder / serving.WEIGHTS)
    facts = {"config": to_dict(predictor.config), "classes": list(predictor.classes)}
    (folder / serving.FACTS).write_text(json.dumps(facts, indent=1))
    return folder


def log_to_mlflow(
    predictor: Predictor, uri: str, run_id: str, images_BCHW: Tensor, register: str | None
) -> str:
    """Log the predictor as a pyfunc model of the run, with an example of a request; returns its address.

    The example is the first of the uint8 images (B, 3, S, S). With `register` the model becomes a new version of that
    registered name.
    """
    with tempfile.TemporaryDirectory(prefix="lape-served-") as folder:
        return tracking.log_pyfunc(
            uri,
            run_id,
            loader_module=serving.__name__,
            data=write_served(predictor, Path(folder) / "model"),
            package=Path(lape_ray.__file__).parent,
            requirements=[f"{name}=={version(name)}" for name in serving.REQUIREMENTS],
            example=serving.encode(images_BCHW[0]),
            columns=serving.COLUMNS,
            register=register,
        )


# --- all of it ------------------------------------------------------------------------------------------------


def open_predictor(
    written: str, overrides: Mapping[str, Any], *, ema: bool = False
) -> tuple[Predictor, str | None]:
    """Open the predictor of what a person types (see `find_subjects`), and name its MLflow run, if any.

    Its classes have the names that the checkpoint holds, else those of `class_names`; else a warning says that they are
    numbers.
    """
    with tempfile.TemporaryDirectory(prefix="lape-model-") as downloads:
        (one,) = find_subjects([written], overrides, downloads=Path(downloads))
        run_id, names = one.run_id, None
        if Path(one.checkpoint).is_dir():
            meta = read_metadata(Path(one.checkpoint))
            run_id, names = run_id or meta.mlflow_run_id, meta.classes
        names = names or class_names(one.config)
        predictor = make_predictor(one.checkpoint, one.config, classes=names, ema=ema)
    if names is None:
        log.warning(
            "%s: classes are named by their number, as their names are neither in the checkpoint nor in a manifest of "
            "data.val or data.train; give --data.val FILE.beton, beside which there is one",
            written,
        )
    return predictor, run_id


def export(
    subject: str,
    *,
    overrides: Mapping[str, Any],
    timm: str | Path | None = None,
    onnx: str | Path | None = None,
    mlflow: bool = False,
    register: str | None = None,
    images: Path | None = None,
    ema: bool = False,
) -> Iterator[str]:
    """Make every export that is asked for; yields a line about each. Raises ValueError and OSError for bad input."""
    if register and not mlflow:
        raise ValueError(f"--register {register} needs --mlflow")
    if onnx is not None:
        _onnx_packages()
    predictor, run_id = open_predictor(subject, overrides, ema=ema)
    if mlflow and run_id is None:
        raise ValueError(f"{subject} does not know its MLflow run: give the run's id instead")
    if timm is not None:
        with written_folder(timm) as folder:
            written = export_timm(predictor, folder)
        yield f"{timm}: {written.replace(str(folder), str(timm))}"
    if onnx is None and not mlflow:
        return
    config = predictor.config
    real_BCHW = folder_images(images, config, 16) if images else validation_images(config, 16)
    if onnx is not None:
        with written_path(onnx) as file:
            difference = export_onnx(predictor, file, real_BCHW)
        yield f"{onnx}: logits of {len(real_BCHW)} images equal PyTorch's within {difference:.1e}"
    if run_id is not None and mlflow:
        uri = tracking.tracking_uri(config)
        address = log_to_mlflow(predictor, uri, run_id, real_BCHW, register)
        yield f"{address}: logged to MLflow run {run_id}" + (
            f", registered as {register}" if register else ""
        )
