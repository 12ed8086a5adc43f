"""The model that MLflow serves: images in, classes and probabilities out. MLflow calls `_load_pyfunc`; this module
needs no mlflow.

A request is a table with the column `image`: the path of an image file that the server can read, or an image file's
bytes in base64 (a `data:` address, or bare). Shapes: K classes, S side of the model's input in pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lape_ray.config import TrainConfig, from_dict
from lape_ray.data.sources import load_image
from lape_ray.predict import Predictor, make_predictor

WEIGHTS, FACTS = "model.safetensors", "served.json"
REQUIREMENTS = ("torch", "safetensors", "numpy", "pillow", "pandas")
COLUMNS = {"class": "string", "probability": "double", "probabilities": "array"}
LONGEST_PATH = 4096
BATCH = 64


def encode(image_CSS: Tensor) -> str:
    """A uint8 image (3, S, S) as a request's text: PNG in base64, as a `data:` address."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_CSS.permute(1, 2, 0).numpy())).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def decode(text: str) -> Image.Image:
    """The image that a request's text names or holds; a ValueError says what is wrong with it."""
    short = text if len(text) <= 60 else f"{text[:57]}..."
    bare = text.removeprefix("data:").partition(";base64,")[2] if text.startswith("data:") else text
    path = Path(text) if len(text) <= LONGEST_PATH and not text.startswith("data:") else None
    if path is not None and path.is_file():
        return load_image(path.read_bytes(), text)
    try:
        return load_image(base64.b64decode(bare, validate=True), f"the image {short!r}")
    except binascii.Error:
        raise ValueError(f"{short!r} is neither the path of a file nor an image in base64") from None


class Served:
    """What MLflow calls."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """A table (class, probability, probabilities (K)) with a row for each row of `model_input`'s column `image`."""
        import pandas as pd

        table = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame(model_input)
        if "image" not in table:
            raise ValueError(f"a request needs the column 'image'; this one has {', '.join(map(str, table))}")
        texts = [str(text) for text in table["image"]]
        parts = [
            self.predictor.probabilities([decode(text) for text in texts[start : start + BATCH]])
            for start in range(0, len(texts), BATCH)
        ]
        best = [
            (self.predictor.classes[row.argmax()], float(row.max()), row.tolist())
            for part in parts
            for row in part
        ]
        return pd.DataFrame(best, columns=list(COLUMNS))


def _load_pyfunc(path: str) -> Served:
    folder = Path(path)
    facts = json.loads((folder / FACTS).read_text())
    config = from_dict(TrainConfig, facts["config"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Served(make_predictor(str(folder / WEIGHTS), config, classes=facts["classes"], device=device))
