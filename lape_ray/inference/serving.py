"""The model that MLflow serves: images in, classes and probabilities out.

MLflow calls `_load_pyfunc`; this module needs mlflow only to refuse a request.

A request is a table with the column `image`, of IMAGES rows at most. A cell is text, and holds an image file's bytes in
base64 (a `data:...;base64,` address, or bare), or names a file: `file:birds/jay.png`. Base64 has no colon, so that no
text is both. Files are read only where the server's owner sets $LAPE_RAY_SERVE_ROOT to a folder: their names are
relative to it, and they lie below it after links are followed. All others are refused in the same words, so that
nobody learns which files exist.

A file has BYTES bytes and an image PIXELS pixels at most, in one of FORMATS; what its header says of its size is
compared with that before it is decoded.

Shapes: K classes, S side of the model's input in pixels.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lape_ray import tracking
from lape_ray.config import TrainConfig, from_dict, replace_fields
from lape_ray.data.sources import to_rgb
from lape_ray.inference.predict import Predictor, make_predictor
from lape_ray.values.plugin import TRUST, trusted

WEIGHTS, CONFIG = "model.safetensors", "served.json"
REQUIREMENTS = ("torch", "safetensors", "numpy", "pillow", "pandas")
COLUMNS = {"class": "string", "probability": "double", "probabilities": "array"}
BATCH = 64
ROOT_VARIABLE = "LAPE_RAY_SERVE_ROOT"
FILE = "file:"
IMAGES = 1024
BYTES = 20 * 2**20
PIXELS = 50_000_000
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "PPM",
)  # Pillow's others include some that run other programs
ACCEPTED = f"send an image file ({', '.join(FORMATS)}) in base64, as data:...;base64,... or bare"
REFUSED_FILE = f"this server reads no image of that name; {ACCEPTED}"
log = logging.getLogger(__name__)


def image_to_text(image_CSS: Tensor) -> str:
    """Return a uint8 image (3, S, S) as a request's text: PNG in base64, as a `data:` address."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_CSS.permute(1, 2, 0).numpy())).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_from_text(cell: object, root: Path | None = None) -> Image.Image:
    """Return the RGB image that a request's cell holds, or names below `root`; a ValueError says what is accepted."""
    if not isinstance(cell, str) or not cell:
        raise ValueError(f"the cell holds no text; {ACCEPTED}")
    if not cell.startswith(FILE):
        return _open(_bytes(cell))
    try:
        return _open(_file(cell.removeprefix(FILE), root).read_bytes())
    except (ValueError, OSError, RuntimeError):  # RuntimeError: links that lead to each other
        raise ValueError(REFUSED_FILE) from None


def _file(name: str, root: Path | None) -> Path:
    """Return the regular file below `root` that `name` leads to; a ValueError, OSError or RuntimeError refuses it."""
    if root is None:
        raise ValueError("no files are served")
    path = (root / name).resolve(strict=True)
    if not path.is_relative_to(root.resolve()) or not path.is_file() or path.stat().st_size > BYTES:
        raise ValueError("outside of the root, no file, or too large")
    return path


def _bytes(text: str) -> bytes:
    if len(text) > 4 * BYTES // 3 + 100:
        raise ValueError(f"the image is larger than {BYTES:,} bytes; send a smaller one")
    bare = text.partition(";base64,")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(bare, validate=True)
    except ValueError:
        raise ValueError(
            f"the text is not base64, which is one line of A-Z a-z 0-9 + / =; {ACCEPTED}"
        ) from None


def _open(encoded: bytes) -> Image.Image:
    """Return the RGB image in a file's bytes, which is decoded only where it is not too large."""
    if len(encoded) > BYTES:
        raise ValueError(f"the image is larger than {BYTES:,} bytes; send a smaller one")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if small := image.width * image.height <= PIXELS:
            image.load()
    except Image.DecompressionBombError:
        small = False
    except Exception:  # Pillow's readers raise OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"the bytes are not a whole image that this server reads; {ACCEPTED}") from None
    if not small:
        raise ValueError(f"the image has more than {PIXELS:,} pixels; send a smaller one")
    return to_rgb(image, "the image")


class RefusedError(ValueError):
    """The fault of a request, in words for the person who sent it."""


class PyfuncModel:
    """Answer MLflow's requests; files are read below `root` only, and none where it is None."""

    def __init__(self, predictor: Predictor, root: Path | None = None) -> None:
        self.predictor = predictor
        self.root = root

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Return a table (class, probability, probabilities (K)) with a row for each row of `model_input`'s `image`.

        Every error is MLflow's own, with one line: of any other its server would send the traceback.
        """
        import pandas as pd

        try:
            return pd.DataFrame(self._answers(pd.DataFrame(model_input)), columns=list(COLUMNS))
        except RefusedError as error:
            raise tracking.serving_error(400, str(error)) from None
        except Exception:
            log.exception("a request failed")
            raise tracking.serving_error(500, "the model failed; the server's log says why") from None

    def _answers(self, table: Any) -> list[tuple[str, float, list[float]]]:
        if "image" not in table:
            raise RefusedError("a request needs the column 'image'")
        if len(table) > IMAGES:
            raise RefusedError(
                f"a request has {IMAGES:,} images at most, this one {len(table):,}; send several"
            )
        cells, classes = list(enumerate(table["image"])), self.predictor.classes
        return [
            (classes[row_K.argmax()], float(row_K.max()), row_K.tolist())
            for start in range(0, len(cells), BATCH)
            for row_K in self.predictor.probabilities(
                self._image(row, cell) for row, cell in cells[start : start + BATCH]
            )
        ]

    def _image(self, row: int, cell: object) -> Image.Image:
        try:
            return image_from_text(cell, self.root)
        except ValueError as error:
            raise RefusedError(f"row {row}: {error}") from None


def _load_pyfunc(path: str) -> PyfuncModel:
    folder = Path(path)
    served = json.loads((folder / CONFIG).read_text())
    config = from_dict(TrainConfig, served["config"])
    # Whoever loads a pyfunc runs its code: this package comes from it, too.
    config = replace_fields(config, {"model.plugin": trusted(config.model.plugin, TRUST)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = make_predictor(str(folder / WEIGHTS), config, classes=served["classes"], device=device)
    return PyfuncModel(predictor, _root())


def _root() -> Path | None:
    """Return the folder that the server's owner lets requests read; a ValueError where it is none."""
    if not (name := os.environ.get(ROOT_VARIABLE)):
        return None
    if not Path(name).is_dir():
        raise ValueError(f"{ROOT_VARIABLE}={name} is not a folder; name one, or unset it to read no files")
    return Path(name).resolve()
