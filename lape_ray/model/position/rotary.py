"""Rotary position embeddings: angles by which queries and keys are turned (arXiv 2403.13298).

Shapes: L layers, H heads, P patches, N tokens = prefix tokens + patches, E width of a head, F = E / 2 pairs of
channels. Prefix tokens are not turned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.position.layout import Layout


class Rotary(nn.Module):
    """Coordinates of the grid, and the frequencies of both axes for every layer and head."""

    xy_2P: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        if layout.head_dim % 4:
            raise ValueError(
                f"a head is {layout.head_dim} wide, but rotary embedding needs a multiple of 4; "
                "change embed_dim or num_heads"
            )
        self.depth = layout.depth
        self.num_prefix = layout.num_prefix
        row_P, column_P = layout.patch_rows_columns()
        self.register_buffer("xy_2P", torch.stack((column_P, row_P)).float(), persistent=False)

    def frequencies(self) -> Tensor:
        """Give the (L or 1, 2, H or 1, F) radians per patch along x and y."""
        raise NotImplementedError

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Compute cosines and sines, each (H or 1, N, F), for each layer."""
        angle_LHPF = torch.einsum("lahf,ap->lhpf", self.frequencies(), self.xy_2P)
        angle_LHNF = F.pad(angle_LHPF, (0, 0, self.num_prefix, 0))
        pairs = list(zip(angle_LHNF.cos().unbind(0), angle_LHNF.sin().unbind(0), strict=True))
        return pairs if len(pairs) == self.depth else pairs * self.depth


def _magnitudes(head_dim: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, head_dim, 4).float() / head_dim)


class Axial(Rotary):
    """Fixed frequencies, half of the channel pairs for each axis, base 100."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        half = _magnitudes(layout.head_dim, 100.0)
        zero = torch.zeros_like(half)
        frequencies = torch.stack((torch.cat((half, zero)), torch.cat((zero, half))))
        self.register_buffer("frequencies_121F", frequencies[None, :, None], persistent=False)

    def frequencies(self) -> Tensor:
        return self.get_buffer("frequencies_121F")


class Mixed(Rotary):
    """Trained 2-D frequencies for every layer and head, base 10; at first two orthogonal directions a head."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        magnitude_F = _magnitudes(layout.head_dim, 10.0)
        direction_LH1 = 2 * math.pi * torch.rand(layout.depth, layout.num_heads, 1)
        direction_LHF = torch.cat(
            [(direction_LH1 + turn).expand(-1, -1, magnitude_F.numel()) for turn in (0.0, math.pi / 2)],
            dim=-1,
        )
        both_F = magnitude_F.repeat(2)
        frequencies = torch.stack((both_F * direction_LHF.cos(), both_F * direction_LHF.sin()), dim=1)
        self.frequencies_L2HF = nn.Parameter(frequencies)

    def frequencies(self) -> Tensor:
        return self.frequencies_L2HF


ROTARIES: dict[str, type[Rotary] | None] = {"none": None, "axial": Axial, "mixed": Mixed}
