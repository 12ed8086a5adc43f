"""Export a checkpoint to the formats of other tools: the steps behind jobs/export.py.

Shapes: B images, S side of the model's input in pixels.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import lape_ray
from lape_ray import tracking
from lape_ray.config import to_dict
from lape_ray.inference import serving
from lape_ray.inference.backbone import export_backbone
from lape_ray.inference.card import model_card
from lape_ray.inference.checkpoints import open_predictor
from lape_ray.inference.official import export_official
from lape_ray.inference.onnx import export_onnx, require_packages
from lape_ray.inference.predict import Predictor
from lape_ray.inference.samples import folder_images, validation_images
from lape_ray.inference.timm import export_timm, not_for_timm
from lape_ray.storage import check_push, push, written_folder, written_path


def export(
    spec: str,
    *,
    overrides: Mapping[str, Any],
    timm: str | Path | None = None,
    official: str | Path | None = None,
    backbone: str | Path | None = None,
    onnx: str | Path | None = None,
    hub: str | None = None,
    hub_public: bool = False,
    mlflow: bool = False,
    register: str | None = None,
    images: Path | None = None,
    ema: bool = False,
) -> Iterator[str]:
    """Make every requested export and yield a line about each. Raises ValueError and OSError for bad input."""
    if register and not mlflow:
        raise ValueError(f"--register {register} needs --mlflow")
    if hub_public and not hub:
        raise ValueError("--hub-public needs --hub OWNER/NAME")
    if onnx is not None:
        require_packages()
    if hub is not None:
        check_push(hub)
    predictor, run_id = open_predictor(spec, overrides, ema=ema)
    if mlflow and run_id is None:
        raise ValueError(f"{spec} does not know its MLflow run: give the run's id instead")
    if timm is not None:
        with written_folder(timm) as folder:
            written = export_timm(predictor, folder)
        yield f"{timm}: {written.replace(str(folder), str(timm))}"
    if official is not None:
        with written_path(official) as file:
            written = export_official(predictor, file)
        yield f"{official}: {written}"
    if backbone is not None:
        with written_folder(backbone) as folder:
            written = export_backbone(predictor, folder)
        yield f"{backbone}: {written}"
    if hub is not None:
        yield push_to_hub(predictor, hub, public=hub_public, ema=ema)
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


def push_to_hub(predictor: Predictor, name: str, *, public: bool, ema: bool) -> str:
    """Push what `export_timm` writes and a model card to the hub; returns a line about it. See `storage.push`."""
    with tempfile.TemporaryDirectory(prefix="lape-hub-") as temporary:
        folder = Path(temporary)
        export_timm(predictor, folder)
        (folder / "README.md").write_text(model_card(predictor, name, ema=ema), encoding="utf-8")
        page, seen = push(folder, name, public=public)
    reason = not_for_timm(predictor.config)
    loads = f'timm.create_model("hf-hub:{name}", pretrained=True), or' if reason is None else "loads with"
    return f"{page}: pushed, {'public' if seen else 'private'}; {loads} hf-hub:{name} in the place of a checkpoint"


def write_pyfunc(predictor: Predictor, folder: Path) -> Path:
    """Write what `lape_ray.inference.serving` loads: weights, config and names of classes. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.cpu().contiguous() for name, t in predictor.model.network.state_dict().items()}
    save_file(state, folder / serving.WEIGHTS)
    served = {"config": to_dict(predictor.config), "classes": list(predictor.classes)}
    (folder / serving.CONFIG).write_text(json.dumps(served, indent=1))
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
            data=write_pyfunc(predictor, Path(folder) / "model"),
            package=Path(lape_ray.__file__).parent,
            requirements=[f"{name}=={version(name)}" for name in serving.REQUIREMENTS],
            example=serving.image_to_text(images_BCHW[0]),
            columns=serving.COLUMNS,
            register=register,
        )
