"""Everything that is done to a batch of images after the random resized crop and the flip.

Shapes: B images, C=3 channels (red, green, blue), H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lape_ray.config import DataConfig
from lape_ray.data.augment.erasing import RandomErasing, erase
from lape_ray.data.augment.jitter import ColorJitter
from lape_ray.data.augment.layers import Layer, plan_layers, run_plan
from lape_ray.data.augment.randaugment import RandAugment, parse_rand_augment
from lape_ray.data.augment.three_augment import ThreeAugment
from lape_ray.data.augment.transfer import to_device

# A CPU finishes about so many pixels before it starts on the next, so that they stay in the core's cache. A GPU
# takes the whole batch in one step.
_CPU_CHUNK_PIXELS = 2**18


_Run = Callable[[Tensor, Mapping[str, Tensor], Tensor], Iterator[tuple[slice, Tensor]]]


class _Policy(Protocol):
    def draw(self, epoch: int, epoch_index: np.ndarray) -> list[Layer]: ...


class Augment:
    """Augment and normalise batches; made by `build_augment`.

    Calling it draws everything on the host, sends it to the images' device in one copy and queues the kernels; it
    never waits for the device. An image's result depends on its pixels, the seed, the epoch and its epoch index
    alone, and not on the batch it comes in; where images are small, several batches in one call spare a GPU
    launches.
    """

    def __init__(
        self,
        policies: Sequence[_Policy],
        erasing: RandomErasing | None,
        *,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        fused: bool = False,
    ) -> None:
        self.fused = fused
        self.policies = tuple(policies)
        self.erasing = erasing
        self.image_size = image_size
        mean_C11, std_C11 = (np.array(values, dtype=np.float64).reshape(3, 1, 1) for values in (mean, std))
        self.constants: dict[str, np.ndarray] = {
            "fill_C": np.array([round(255 * m) for m in mean], dtype=np.uint8),
            "scale_C11": (1 / (255 * std_C11)).astype(np.float32),
            "shift_C11": (-mean_C11 / std_C11).astype(np.float32),
        }

    @torch.no_grad()
    def __call__(
        self, images_BCHW: Tensor, *, epoch: int, epoch_index: np.ndarray | Sequence[int] | Tensor
    ) -> Tensor:
        """Augment images; returns (x / 255 - mean) / std, as float32 in channels_last memory.

        Args:
            images_BCHW: uint8 (B, 3, H, W) of the augment's image size, on any device, with any strides; not
                changed.
            epoch: from 0.
            epoch_index: (B,) integers on the host, the images' indices in the epoch's order over all ranks.
        """
        epoch_index_B = np.asarray(epoch_index) if len(epoch_index) else np.empty(0, dtype=np.int64)
        self._check(images_BCHW, epoch_index_B)
        layers = [layer for policy in self.policies for layer in policy.draw(epoch, epoch_index_B)]
        plan, run = self._plan(layers, images_BCHW)
        boxes = self.erasing.draw(epoch, epoch_index_B) if self.erasing else None
        arrays = to_device({**plan, **(boxes.arrays if boxes else {}), **self.constants}, images_BCHW.device)
        x_BCHW = torch.empty(
            images_BCHW.shape,
            dtype=torch.float32,
            device=images_BCHW.device,
            memory_format=torch.channels_last,
        )
        # Under the caller's autocast, the blur would run in half precision.
        with torch.autocast(images_BCHW.device.type, enabled=False):
            for chunk, augmented in run(images_BCHW, arrays, arrays["fill_C"]):
                # One pass over the memory: it reads uint8 and writes float32.
                torch.addcmul(arrays["shift_C11"], augmented, arrays["scale_C11"], out=x_BCHW[chunk])
                if boxes:
                    erase(x_BCHW, chunk, boxes, arrays)
        return x_BCHW

    def _plan(self, layers: Sequence[Layer], images_BCHW: Tensor) -> tuple[dict[str, np.ndarray], _Run]:
        """Plan the layers; returns the arrays that they need on the device, and what runs them there."""
        if self.fused:
            # Only here: it needs Triton, which comes with GPUs.
            from lape_ray.data.augment.fused import plan_fused, run_fused

            return plan_fused(layers), partial(run_fused, len(layers))
        plan = plan_layers(layers, size=len(images_BCHW), chunk_size=self._chunk_size(images_BCHW))
        return plan.arrays, partial(run_plan, plan)

    def _chunk_size(self, images_BCHW: Tensor) -> int:
        if images_BCHW.device.type != "cpu":
            return max(1, len(images_BCHW))
        height, width = self.image_size
        return max(1, _CPU_CHUNK_PIXELS // (height * width))

    def _check(self, images_BCHW: Tensor, epoch_index_B: np.ndarray) -> None:
        shape = (len(epoch_index_B), 3, *self.image_size)
        if tuple(images_BCHW.shape) != shape or images_BCHW.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 of shape {shape} (epoch_index, channels, image size); "
                f"got {images_BCHW.dtype} of shape {tuple(images_BCHW.shape)}"
            )


def build_augment(
    data: DataConfig, *, image_size: int | tuple[int, int], seed: int, fused: bool = False
) -> Augment:
    """Build the augmentation of a training run: RandAugment or 3-Augment, colour jitter, random erasing.

    Colour jitter acts whenever it is above 0. (timm leaves it out with RandAugment, so for DeiT's recipe it is 0.)

    Args:
        image_size: side of the square images, or (height, width), in pixels; at least 8.
        seed: of the run, from 0 to 2^64 - 1.
        fused: with our kernels, which want a GPU and Triton, in place of PyTorch's operators.

    Raises:
        ValueError: for a size or a RandAugment that cannot be used.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 8:
        raise ValueError(f"image_size={image_size} must be at least 8 pixels")
    size, policies = (height, width), list[_Policy]()
    if data.rand_augment is not None:
        rand = parse_rand_augment(data.rand_augment)
        policies.append(RandAugment(rand, image_size=size, interpolation=data.interpolation, seed=seed))
    if data.three_augment:
        policies.append(ThreeAugment(seed=seed))
    if data.color_jitter > 0:
        policies.append(ColorJitter(data.color_jitter, seed=seed))
    erasing = None
    if data.erase_prob > 0:
        erasing = RandomErasing(data.erase_prob, "pixel", image_size=size, seed=seed)
    return Augment(policies, erasing, image_size=size, mean=data.mean, std=data.std, fused=fused)
