"""Accuracy where positions change: other resolutions, and cyclic shifts of the image.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from lape_ray.config import TrainConfig
from lape_ray.data.batch import Batch, Batches
from lape_ray.data.loader import Loader
from lape_ray.data.ready import Normalized
from lape_ray.inference.evaluate import by_name, evaluation_loader
from lape_ray.inference.samples import batches_at, evenly_spaced
from lape_ray.model import build_model, resolve
from lape_ray.model.build import stage_sides
from lape_ray.model.convert import load_weights
from lape_ray.model.variants import VariantSpec
from lape_ray.report.figures import curves_figure
from lape_ray.training.loop import evaluate
from lape_ray.training.recompute import optimise_blocks
from lape_ray.training.state import autocast_for

SIZES_OF_224 = (160, 192, 224, 256, 288, 320, 352, 384)


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """A loader whose images are rolled down and to the right by `pixels`, around the border."""

    loader: Batches
    pixels: int

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        with contextlib.closing(self.loader.epoch(epoch)) as batches:
            for batch in batches:
                rolled = batch.images.roll((self.pixels, self.pixels), dims=(2, 3))
                yield batch._replace(images=rolled)


@dataclass(frozen=True, kw_only=True)
class Few:
    """`count` of a loader's images, spread evenly over its file, so that every class of a sorted one has its share."""

    loader: Loader
    count: int

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        index_N = evenly_spaced(self.loader.num_samples, self.count)
        labels_N, device, done = self.loader.labels_N[index_N], self.loader.device, 0
        with contextlib.closing(batches_at(self.loader, index_N)) as batches:
            for images_BCHW in batches:
                part = slice(done, done + len(images_BCHW))
                labels_B = torch.as_tensor(labels_N[part]).to(device)
                yield Batch(images_BCHW.to(device), labels_B, index_N[part])
                done = part.stop


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Top-1 in percent of one network over image size and over shift, both in pixels."""

    label: str
    trained_size: int
    patch: int
    sizes: Mapping[int, float]
    shifts: Mapping[int, float]


def sizes_for(spec: VariantSpec) -> list[int]:
    """List image sizes in pixels, ascending: 160 to 384 for a network of 224.

    For another size they are the same shares of it, in whole tokens. A network of windows takes fewer: those which its
    windows fill, up to twice its own.
    """
    stride = spec.token_stride
    if spec.depths is not None:
        last = stride << len(spec.depths) - 1  # pixels from one token of the last stage to the next
        candidates = range(last, 2 * spec.image_size + 1, last)
        least = SIZES_OF_224[0] * spec.image_size / 224
        return [size for size in candidates if size >= least and _windows_fill(spec, size)]
    sizes = {max(2, round(size / 224 * spec.image_size / stride)) * stride for size in SIZES_OF_224}
    return sorted(sizes | {spec.image_size})


def _windows_fill(spec: VariantSpec, size: int) -> bool:
    try:
        stage_sides(spec, size // spec.token_stride)
    except ValueError:
        return False
    return True


def shifts_for(spec: VariantSpec) -> list[int]:
    """List shifts in pixels, ascending: 0 to half the image, at whole and half tokens, nine at most."""
    stride = spec.token_stride
    step = max(1, stride // 2)
    steps = spec.image_size // 2 // step
    every = -(-steps // 8)
    return [k * step for k in range(0, steps + 1, every)]


def measure_robustness(
    label: str,
    config: TrainConfig,
    weights: Mapping[str, Any],
    *,
    device: torch.device,
    images: int | None = None,
    places_K: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Robustness:
    """Measure top-1 on `images` of `data.val` (None: all) for each size of `sizes_for` and shift of `shifts_for`.

    The network's output for each class of the data is `places_K` (see `val_places`).

    Images smaller than a size are enlarged to it, as `data.upscale` does.
    """
    spec = resolve(config.model)
    measure = _Measurement(config, weights, device, images, places_K)
    sizes, shifts = {}, {}
    image_sizes = sizes_for(spec)
    for number, size in enumerate(image_sizes, 1):
        progress(f"{label}: {size} px ({number} of {len(image_sizes)} sizes)")
        sizes[size] = measure.top1(measure.network(size), measure.loader(size))
    shifts[0] = sizes[spec.image_size]
    network, loader = measure.network(spec.image_size), measure.loader(spec.image_size)
    moved = shifts_for(spec)[1:]
    for number, pixels in enumerate(moved, 1):
        progress(f"{label}: shifted by {pixels} px ({number} of {len(moved)} shifts)")
        shifts[pixels] = measure.top1(network, Shifted(loader=loader, pixels=pixels))
    return Robustness(
        label=label, trained_size=spec.image_size, patch=spec.token_stride, sizes=sizes, shifts=shifts
    )


class _Measurement:
    """A checkpoint's networks and its validation images, at any size."""

    def __init__(
        self,
        config: TrainConfig,
        weights: Mapping[str, Any],
        device: torch.device,
        images: int | None,
        places_K: Sequence[int] | None,
    ) -> None:
        self.places_K = places_K
        self.config, self.weights, self.device, self.images = config, weights, device, images
        self.autocast = autocast_for(config, device)

    def network(self, size: int) -> torch.nn.Module:
        model = build_model(dataclasses.replace(self.config.model, image_size=size))
        load_weights(model, self.weights)
        return optimise_blocks(model).to(self.device)

    def loader(self, size: int) -> Batches:
        data = self.config.data
        loader = evaluation_loader(self.config, self.device, image_size=size)
        chosen = loader if self.images is None else Few(loader=loader, count=self.images)
        return by_name(Normalized(chosen, data, self.device), self.places_K)

    def top1(self, network: torch.nn.Module, loader: Batches) -> float:
        """Return top-1 in percent."""
        with self.autocast():
            return evaluate(network, loader)["acc1"]


def robustness_figure(results: Sequence[Robustness]) -> Figure:
    """Draw two panels: top-1 over image size, and over shift."""
    sizes = [(one.label, list(one.sizes), list(one.sizes.values())) for one in results]
    shifts = [(one.label, list(one.shifts), list(one.shifts.values())) for one in results]
    return curves_figure(
        [
            ("Resized position embedding", "image size, px", "top-1, %", sizes),
            ("Cyclic shift of the image", "shift, px", "top-1, %", shifts),
        ]
    )


def robustness_tables(results: Sequence[Robustness]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Make header and rows of both tables; a network that was not measured at a value has a dash there."""
    tables = []
    for what, field in (("px", "sizes"), ("px shift", "shifts")):
        values: list[Mapping[int, float]] = [getattr(result, field) for result in results]
        columns = sorted(set().union(*values))
        rows = [
            (result.label, *(f"{found[column]:.2f}" if column in found else "–" for column in columns))
            for result, found in zip(results, values, strict=True)
        ]
        tables.append((("top-1, %", *(f"{column} {what}" for column in columns)), rows))
    return tables
