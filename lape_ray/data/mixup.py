"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) of one batch.

As timm's Mixup does in batch mode, which DeiT trains with: one lambda for the batch, the partner of each image
is the image as far from the other end, CutMix's lambda is the area that is really left, and labels are smoothed.
Unlike there, the draws depend only on a key, so a resumed run mixes as the uninterrupted one would have.

Shape suffixes: B images, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from lape_ray.config import DataConfig

MIX_STREAM = 2  # first word of the seed, which keeps these draws apart from the loader's


class Mix(NamedTuple):
    """The mixing of a batch: an image keeps the share `lam`, its partner gives the rest.

    `box` is (top, bottom, left, right) in pixels where CutMix pastes the partner; None: the images are blended.
    """

    lam: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(data: DataConfig, height: int, width: int, rng: np.random.Generator) -> Mix:
    """Draw whether and how a batch of `height` x `width` images is mixed."""
    if not (data.mixup or data.cutmix) or rng.random() >= data.mix_prob:
        return Mix(1.0)
    cut = data.cutmix > 0 and (not data.mixup or rng.random() < data.mix_switch_prob)
    alpha = data.cutmix if cut else data.mixup
    lam = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(lam)
    side = math.sqrt(1 - lam)
    box_height, box_width = int(height * side), int(width * side)
    center_y, center_x = int(rng.integers(height)), int(rng.integers(width))
    # The box is cut off at the border, so that less than 1 - lam may be pasted.
    top, bottom = max(center_y - box_height // 2, 0), min(center_y + (box_height + 1) // 2, height)
    left, right = max(center_x - box_width // 2, 0), min(center_x + (box_width + 1) // 2, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(images_BCHW: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Mix each image with its partner; the input is left as it is."""
    if mix.lam == 1:
        return images_BCHW
    if mix.box is None:
        return torch.lerp(images_BCHW.flip(0), images_BCHW, mix.lam)
    top, bottom, left, right = mix.box
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = images_BCHW[:, :, top:bottom, left:right].flip(0)
    return mixed_BCHW


def mix_labels(labels_B: torch.Tensor, num_classes: int, mix: Mix, label_smoothing: float) -> torch.Tensor:
    """Mix targets (B, K) in float32, each row of sum 1; smoothing spreads its share evenly over all classes."""
    off = label_smoothing / num_classes
    targets_BK = torch.full((len(labels_B), num_classes), off, device=labels_B.device)
    targets_BK.scatter_(1, labels_B[:, None], 1 - label_smoothing + off)
    return targets_BK if mix.lam == 1 else torch.lerp(targets_BK.flip(0), targets_BK, mix.lam)


class Mixer:
    """Mix batches as `data` says (mixup, cutmix, mix_prob, mix_switch_prob, mix_off_epoch)."""

    def __init__(self, data: DataConfig, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.data, self.num_classes, self.label_smoothing = data, num_classes, label_smoothing

    def __call__(
        self, images_BCHW: torch.Tensor, labels_B: torch.Tensor, *, generator_key: tuple[int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix images, which keep their shape, and targets (B, K) in float32; without mixing, the smoothed labels.

        Runs on the tensors' device and never waits for it.

        Args:
            images_BCHW: floating point.
            labels_B: int64, each below `num_classes`.
            generator_key: (seed, epoch, step), which alone decide the draw.
        """
        _, epoch, _ = generator_key
        off = self.data.mix_off_epoch
        mix = Mix(1.0)
        if off is None or epoch < off:
            rng = np.random.default_rng((MIX_STREAM, *generator_key))
            height, width = images_BCHW.shape[-2:]
            mix = draw_mix(self.data, height, width, rng)
        return (
            mix_images(images_BCHW, mix),
            mix_labels(labels_B, self.num_classes, mix, self.label_smoothing),
        )
