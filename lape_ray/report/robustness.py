"""Accuracy where the input is not that of training: other sizes, parts, shifts and aspect ratios of images.

Every input is made from the file in one step, by the resampling of evaluation, at the scale at which it is read:
nothing is resized twice. So the same weights at the network's own size give what `evaluate` gives.

Shapes: B images, H x W pixels, N tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import psutil
import torch

from lape_ray.config import TrainConfig
from lape_ray.data.batch import Batch, Batches
from lape_ray.data.loader import Loader
from lape_ray.data.ready import Normalized
from lape_ray.inference.evaluate import by_name, evaluation_loader
from lape_ray.inference.samples import batches_at, evenly_spaced
from lape_ray.model import Network, build_model, resolve
from lape_ray.model.convert import load_weights
from lape_ray.model.position import Grid
from lape_ray.model.variants import VariantSpec
from lape_ray.training.loop import evaluate
from lape_ray.training.recompute import optimise_blocks
from lape_ray.training.state import autocast_for

SIZES_OF_224 = (128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
CROPS = (1, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)
"""Sides of parts, as shares of the image's side."""
SHIFTS = (0, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 4)
"""Shifts in tokens; half the image comes last."""
RATIOS = {1 / 4: "1:4", 1 / 2: "1:2", 2 / 3: "2:3", 1: "1:1", 3 / 2: "3:2", 2: "2:1", 4: "4:1"}
"""Widths over heights, and how they are written."""
_BATCH_PIXELS = {"cpu": 2**22, "cuda": 2**25}
"""Four images of 1,024 px on a CPU: 0.6 GB of activations of a network of width 768; 32 on a GPU."""


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
class Part:
    """A loader of a part of each image, as it is in the image.

    Args:
        size: rows and columns of the part, in pixels.
        spread: the first image's part is its upper left one, and eight places more follow in turn, centre and corners
            among them; else all are the centre's.
    """

    loader: Batches
    size: tuple[int, int]
    spread: bool

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        done = 0
        with contextlib.closing(self.loader.epoch(epoch)) as batches:
            for batch in batches:
                parts = [self._part(image, index) for index, image in enumerate(batch.images, done)]
                done += len(parts)
                yield batch._replace(images=torch.stack(parts))

    def _part(self, image_CHW: torch.Tensor, index: int) -> torch.Tensor:
        thirds = (index // 3 % 3, index % 3) if self.spread else (1, 1)
        for dim, (size, third) in enumerate(zip(self.size, thirds, strict=True), 1):
            image_CHW = image_CHW.narrow(dim, (image_CHW.shape[dim] - size) * third // 2, size)
        return image_CHW


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
    """Top-1 in percent of one network over inputs.

    Attributes:
        patch: pixels from one token to the next.
        images: that all was measured on.
        sizes: by side in pixels.
        crops: by side of a part, as a share of the image's side; parts fill the network's own size.
        shifts: by pixels.
        ratios: by width over height.
        refused: why an input cannot be measured, by the name of one of these fields and its key.
        resized: what `load_weights` says of the largest size.
    """

    label: str
    trained_size: int
    patch: int
    images: int
    sizes: Mapping[int, float] = field(default_factory=dict)
    crops: Mapping[float, float] = field(default_factory=dict)
    shifts: Mapping[int, float] = field(default_factory=dict)
    ratios: Mapping[float, float] = field(default_factory=dict)
    refused: Mapping[tuple[str, float], str] = field(default_factory=dict)
    resized: Sequence[str] = ()


def sizes_for(spec: VariantSpec) -> list[int]:
    """List image sizes in pixels, ascending: 128 to 1,024 for a network of 224.

    For another size they are the same shares of it, in whole tokens, of the last stage where there are several.
    """
    unit = spec.token_stride << (len(spec.depths) - 1 if spec.depths else 0)
    sizes = {max(2, round(size / 224 * spec.image_size / unit)) * unit for size in SIZES_OF_224}
    return sorted(sizes | {spec.image_size})


def shifts_for(spec: VariantSpec) -> list[int]:
    """List shifts in pixels, ascending: parts of a token, whole ones, and half the image."""
    stride = spec.token_stride
    half = spec.image_size // 2 // stride * stride
    return sorted({shift for tokens in SHIFTS if (shift := round(tokens * stride)) < half} | {half})


def ratios_for(spec: VariantSpec) -> dict[float, Grid]:
    """Give rows and columns of about as many tokens as the network's own, by width over height, ascending."""
    grids = {ratio: grid_of(spec.image_size, spec.token_stride, ratio) for ratio in RATIOS}
    return {
        ratio: (rows, columns) for ratio, (rows, columns) in grids.items() if rows != columns or ratio == 1
    }


def grid_of(image_size: int, stride: int, ratio: float) -> Grid:
    """Return rows and columns of about as many tokens as a square image's, at a width over height."""
    side = image_size / stride
    return max(1, round(side / ratio**0.5)), round(side * ratio**0.5)


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
    """Measure top-1 on `images` of `data.val` (None: all) for every size, part, shift and aspect ratio.

    The network's output for each class of the data is `places_K` (see `val_places`).

    Images smaller than a size are enlarged to it, as `data.upscale` does. The largest sizes take most of the time.
    """
    measure = _Measurement(config, weights, device, images, places_K)
    progress(f"{label}: {measure.spec.image_size} px")
    own = measure.top1(measure.own, measure.loader(measure.spec.image_size))
    found: dict[str, dict[float, float]] = {
        "sizes": {measure.spec.image_size: own}, "crops": {1: own}, "shifts": {0: own}, "ratios": {1: own},
    }  # fmt: skip
    refused: dict[tuple[str, float], str] = {}
    todo = [(name, value) for name, value in measure.plan() if value not in found[name]]
    for number, (name, value) in enumerate(todo, 1):
        progress(f"{label}: {input_name(name, value)} ({number} of {len(todo)})")
        try:
            network, loader = measure.input(name, value)
        except _RefusedError as error:
            refused[name, value] = str(error)
        else:
            found[name][value] = measure.top1(network, loader)
    return Robustness(
        label=label,
        trained_size=measure.spec.image_size,
        patch=measure.spec.token_stride,
        images=measure.counted,
        refused=refused,
        resized=measure.resized,
        **{name: dict(sorted(values.items())) for name, values in found.items()},  # type: ignore[arg-type]
    )


KINDS = {
    "sizes": "{} px", "crops": "part of {} % of the side", "shifts": "shift by {} px", "ratios": "width to height {}",
}  # fmt: skip
"""The kinds of inputs, and how one or several of a kind are called."""


def value_name(kind: str, value: float) -> str:
    """Write the value of an input, in the unit that its kind is called by."""
    return RATIOS[value] if kind == "ratios" else f"{100 * value if kind == 'crops' else value:g}"


def input_name(kind: str, *values: float) -> str:
    """Name an input, or several of a kind."""
    return KINDS[kind].format(", ".join(value_name(kind, value) for value in values))


class _RefusedError(ValueError):
    """A network cannot take this input; says why."""


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
        # A resident reader would decode the whole file into memory for every size; its pixels are the native one's.
        backend = "native" if config.data.backend == "resident" else config.data.backend
        self.config = dataclasses.replace(config, data=dataclasses.replace(config.data, backend=backend))
        self.weights, self.device, self.images, self.places_K = weights, device, images, places_K
        self.spec = resolve(config.model)
        self.autocast = autocast_for(config, device)
        self.resized: list[str] = []
        self.counted = 0

    def plan(self) -> list[tuple[str, float]]:
        """List the inputs to measure."""
        return [
            *(("sizes", size) for size in sizes_for(self.spec)),
            *(("crops", share) for share in CROPS),
            *(("shifts", pixels) for pixels in shifts_for(self.spec)),
            *(("ratios", ratio) for ratio in ratios_for(self.spec)),
        ]

    @cached_property
    def own(self) -> Network:
        """The network as it was trained."""
        return self._network(self.spec.image_size, None)

    def input(self, name: str, value: Any) -> tuple[torch.nn.Module, Batches]:
        """Return the network and the images of an input; a `_RefusedError` where they do not go together."""
        side = self.spec.image_size
        if name == "sizes":
            return self._other(value, None), self.loader(value)
        if name == "crops":
            whole = self.loader(round(side / value))
            return self.own, Part(loader=whole, size=(side, side), spread=True)
        if name == "shifts":
            return self.own, Shifted(loader=self.loader(side), pixels=value)
        rows, columns = grid = ratios_for(self.spec)[value]
        network, stride = self._other(side, grid), self.spec.token_stride
        whole = self.loader(max(grid) * stride)
        return network, Part(loader=whole, size=(rows * stride, columns * stride), spread=False)

    def _other(self, size: int, grid: Grid | None) -> Network:
        try:
            self._check_memory(size)
            return self._network(size, grid)
        except ValueError as error:
            raise _RefusedError(str(error)) from error

    def _network(self, size: int, grid: Grid | None) -> Network:
        model = build_model(dataclasses.replace(self.config.model, image_size=size), grid=grid)
        notes = load_weights(model, self.weights)
        if size != self.spec.image_size:
            self.resized = notes
        return optimise_blocks(model).to(self.device)

    def _check_memory(self, size: int) -> None:
        """Refuse a size at which the logits of a layer, N x N for each head, are more than fits into memory."""
        # Looked up, put in order, put behind prefix tokens, and the layer's before: measured were 3 to 4.5 at once.
        at_once = 4
        need = at_once * self._logits_bytes * (size / self.spec.image_size) ** 4
        free = (
            torch.cuda.mem_get_info(self.device)[0]
            if self.device.type == "cuda"
            else psutil.virtual_memory().available
        )
        if need > free:
            raise ValueError(
                f"the bias of a layer takes about {need / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are "
                "free here; measure on a larger machine"
            )

    @cached_property
    def _logits_bytes(self) -> int:
        """The bytes of what a layer adds to logits, where that grows with the image; windows do not."""
        if len(self.own.stages()) > 1:
            return 0
        with torch.inference_mode():
            logits = (layer.logits_1HNN for layer in self.own.layer_positions())
            return max((one.nbytes for one in logits if one is not None), default=0)

    def loader(self, size: int) -> Batches:
        """Load squares of `size` pixels, so few at once that the largest fit into memory."""
        most = max(1, _BATCH_PIXELS[self.device.type] // size**2)
        data = dataclasses.replace(
            self.config.data, eval_batch_size=min(most, self.config.data.eval_batch_size)
        )
        config = dataclasses.replace(self.config, data=data)
        loader = evaluation_loader(config, self.device, image_size=size)
        chosen = loader if self.images is None else Few(loader=loader, count=self.images)
        return by_name(Normalized(chosen, data, self.device), self.places_K)

    def top1(self, network: torch.nn.Module, loader: Batches) -> float:
        """Return top-1 in percent."""
        with self.autocast():
            result = evaluate(network, loader)
        self.counted = int(result["images"])
        return result["acc1"]


def relative_area(one: Robustness, *, upwards: bool) -> float | None:
    """Compute the area under top-1 over the logarithm of the size, per octave, in percent of top-1 at the own size.

    It reaches from the own size to the largest, or from the smallest to the own. None: that end was not measured, or
    top-1 is 0 at the own size.
    """
    own = one.trained_size
    tried = [*one.sizes, *(value for name, value in one.refused if name == "sizes")]
    end = max(tried) if upwards else min(tried)
    sizes = sorted(size for size in one.sizes if min(own, end) <= size <= max(own, end))
    if end not in sizes or end == own or not one.sizes[own]:
        return None
    area = sum((one.sizes[low] + one.sizes[high]) / 2 * math.log(high / low) for low, high in pairwise(sizes))
    return 100 * area / math.log(sizes[-1] / sizes[0]) / one.sizes[own]
