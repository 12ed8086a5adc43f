"""A checkpoint as an ONNX file, compared with PyTorch before it is kept.

Shapes: B images, K classes, S side of the model's input in pixels.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from lape_ray.inference.predict import Predictor

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4


def require_packages() -> list[ModuleType]:
    """Import the packages that write and run ONNX; a ValueError names all that are missing."""
    found, missing = [], []
    for name in PACKAGES:
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

    onnxruntime then runs the file on the given images. Returns the largest difference of a logit from PyTorch's.

    Raises:
        ValueError: a package is missing (all are named), or the outputs differ by more than 1e-4; an earlier file
            stays.
    """
    require_packages()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    _write(predictor.model.cpu(), partial, images_BCHW)
    difference = compare_onnx(predictor, partial, images_BCHW)
    if not difference <= TOLERANCE:
        partial.unlink()
        raise ValueError(
            f"the ONNX model's logits differ from PyTorch's by {difference:.1e}, more than {TOLERANCE:g}; {file} is "
            "not written"
        )
    partial.replace(file)
    return difference


def _write(model: nn.Module, file: Path, images_BCHW: Tensor) -> None:
    two_BCHW = images_BCHW[:1].repeat(2, 1, 1, 1)  # a batch of one would be taken for a constant
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # With gradients on, the exporter cannot lay out attention that adds a trained bias.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model,
            (two_BCHW,),
            str(file),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images_BCHW": {0: torch.export.Dim("batch", min=1, max=65536)}},
            dynamo=True,
            external_data=False,
            verbose=False,
            optimize=False,  # onnxscript's takes the 1e-8 that T2T-ViT adds to a divisor for 0; onnxruntime has its own
        )


def compare_onnx(predictor: Predictor, file: Path, images_BCHW: Tensor) -> float:
    """Compute the largest difference of a logit between onnxruntime and PyTorch, on the same uint8 (B, 3, S, S)."""
    *_, onnxruntime = require_packages()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (theirs_BK,) = session.run(["logits"], {"images": images_BCHW.numpy()})
    with torch.inference_mode():
        ours_BK = predictor.model.cpu()(images_BCHW)
    return float(np.abs(theirs_BK - ours_BK.numpy()).max())
