"""A checkpoint as a classifier of image files: what evaluation does to an image, for one image at a time.

Needs torch, Pillow and safetensors, and neither Ray nor FFCV nor a tracker, so that an exported model stays small.

Shapes: B images, K classes, S side of the model's input in pixels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lape_ray.config import DataConfig, TrainConfig
from lape_ray.data.center import center_crop
from lape_ray.data.normalize import Normalize
from lape_ray.data.sources import EXTENSIONS, load_image, to_rgb
from lape_ray.model import Network, build_model, resolve
from lape_ray.model.convert import load_weights
from lape_ray.storage import write_rows, written_path
from lape_ray.training.checkpoint import Metadata, about, read_weights
from lape_ray.training.recompute import optimise_blocks

BYTES = 2**29
"""The largest file of an image that is read. Of its pixels Pillow decodes 179 million at most."""
log = logging.getLogger(__name__)


def find_images(folder: Path) -> list[Path]:
    """Find all image files below `folder`, sorted; a ValueError where it has none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of images")
    found = [
        Path(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    ]
    if not found:
        raise ValueError(f"{folder} holds no image; known endings are {', '.join(EXTENSIONS)}")
    return sorted(found)


def read_image(path: Path) -> Image.Image:
    """Read the RGB image in a file; a ValueError or OSError names one that cannot be read, or is too large."""
    if path.stat().st_size > BYTES:
        raise ValueError(
            f"{path} cannot be read: it has more than {BYTES:,} bytes; give a smaller copy of it"
        )
    return to_rgb(load_image(path.read_bytes(), str(path)), str(path))


def square(image: Image.Image, *, size: int, data: DataConfig) -> Image.Image:
    """Return the RGB square (S, S) of an RGB image that evaluation sees."""
    return center_crop(image, size=size, share=data.eval_crop, interpolation=data.interpolation)


def to_tensor(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Stack RGB squares of one size, as images or as uint8 (S, S, 3), to uint8 (B, 3, S, S)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


class NormalizedModel(nn.Module):
    """uint8 images (B, 3, S, S) to logits (B, K) of `network`: the normalisation belongs to the model."""

    network: Network

    def __init__(self, network: Network, data: DataConfig) -> None:
        super().__init__()
        self.normalize = Normalize(data)
        self.network = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.network(self.normalize(images_BCHW))


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A network in evaluation mode with its names of classes."""

    model: NormalizedModel
    config: TrainConfig
    classes: tuple[str, ...]
    device: torch.device
    trained: Metadata | None = None
    """The facts of its checkpoint, where that is a folder of ours and they were asked for."""

    @property
    def size(self) -> int:
        return resolve(self.config.model).image_size

    def probabilities(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Compute (B, K) float32 probabilities of images of any size and mode; each row sums to 1.

        Of each image only its square is kept, so that an iterator that decodes them holds one whole image at a time.
        """
        squares = [self.square(to_rgb(image, f"image {i}")) for i, image in enumerate(images)]
        return self.probabilities_of(squares)

    def square(self, image: Image.Image) -> np.ndarray:
        """Return what the network sees of an RGB image: uint8 (S, S, 3)."""
        return np.asarray(square(image, size=self.size, data=self.config.data))

    def probabilities_of(self, squares: Sequence[np.ndarray]) -> np.ndarray:
        """Compute (B, K) float32 probabilities of uint8 squares (S, S, 3); each row sums to 1."""
        with torch.inference_mode():
            logits_BK = self.model(to_tensor(squares).to(self.device))
        return np.asarray(logits_BK.float().softmax(-1).cpu())


def load_network(
    checkpoint: str, config: TrainConfig, *, ema: bool = False, new_head: bool = False
) -> Network:
    """Build `config.model` with the weights of a checkpoint of any origin, on the CPU, with optimised blocks.

    A warning says which table was resized. With `new_head` the checkpoint may lack the classifier, or have another.
    """
    weights, _ = read_weights(checkpoint, ema=ema)
    with about(checkpoint):
        network = build_model(config.model)
        for note in load_weights(network, weights, new_head=new_head):
            log.warning("%s: %s", checkpoint, note)
    return optimise_blocks(network)


def make_predictor(
    checkpoint: str,
    config: TrainConfig,
    *,
    classes: Sequence[str] | None = None,
    ema: bool = False,
    device: torch.device | None = None,
) -> Predictor:
    """Make a predictor of `config.model` with the checkpoint's weights.

    Without `classes` they are named by their number. Raises a ValueError where their number is not the model's.
    """
    network = load_network(checkpoint, config, ema=ema)
    outputs = resolve(config.model).num_classes
    names = tuple(classes) if classes is not None else tuple(str(index) for index in range(outputs))
    if len(names) != outputs:
        raise ValueError(f"{len(names)} names of classes were given, but {checkpoint} has {outputs} classes")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = NormalizedModel(network, config.data).eval().to(device)
    return Predictor(model=model, config=config, classes=names, device=device)


@dataclass(frozen=True)
class Prediction:
    """One image's best classes, best first; or the reason why it could not be read."""

    path: Path
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict_files(
    predictor: Predictor, paths: Sequence[Path], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Yield predictions in the order of `paths`; an image that cannot be read becomes one with `error`.

    Of a batch only the squares are kept, and one whole image at a time.
    """
    for start in range(0, len(paths), batch_size):
        part = paths[start : start + batch_size]
        squares: dict[Path, np.ndarray] = {}
        errors: dict[Path, str] = {}
        for path in part:
            try:
                squares[path] = predictor.square(read_image(path))
            except (ValueError, OSError) as error:
                errors[path] = str(error)
        best = _best(predictor, list(squares.values()), top) if squares else []
        found = dict(zip(squares, best, strict=True))
        for path in part:
            yield Prediction(path, error=errors[path]) if path in errors else Prediction(path, found[path])


def _best(
    predictor: Predictor, squares: Sequence[np.ndarray], top: int
) -> list[tuple[tuple[str, float], ...]]:
    probabilities_BK = predictor.probabilities_of(squares)
    order_BK = np.argsort(-probabilities_BK, axis=1, kind="stable")[:, :top]
    return [
        tuple((predictor.classes[k], float(row_K[k])) for k in order_K)
        for row_K, order_K in zip(probabilities_BK, order_BK, strict=True)
    ]


def with_csv(predictions: Iterable[Prediction], address: str | Path, *, top: int) -> Iterator[Prediction]:
    """Yield the same predictions, and write a CSV row of each: path, class and probability of `top` ranks, error.

    The row of an image that could not be read has nothing but path and error. A local file holds the row of every
    prediction that was handed on, even if the process is killed; an s3:// address gets the file at the end. Text that a
    spreadsheet would run as a formula has an apostrophe in front (see `storage.csv_rows.inert`).
    """
    ranks = [f"{what}_{rank + 1}" for rank in range(top) for what in ("class", "probability")]
    with (
        written_path(address) as path,
        # each line is written when it is complete, and any file name as it is
        path.open("w", newline="", buffering=1, encoding="utf-8", errors="surrogateescape") as stream,
    ):
        write_rows(stream, [["image", *ranks, "error"]])
        for one in predictions:
            pairs = [value for name, p in one.top for value in (name, f"{p:.6f}")] or [""] * len(ranks)
            write_rows(stream, [[str(one.path), *pairs, one.error or ""]])
            yield one
