"""Rotary position embeddings: angles by which queries and keys are turned (arXiv 2403.13298, 2602.03227).

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


class Fixed(Rotary):
    """The same frequencies for every layer and head, which are not trained."""

    def __init__(self, layout: Layout, frequencies_2F: Tensor) -> None:
        super().__init__(layout)
        self.register_buffer("frequencies_121F", frequencies_2F[None, :, None], persistent=False)

    def frequencies(self) -> Tensor:
        return self.get_buffer("frequencies_121F")


class Axial(Fixed):
    """Fixed frequencies, half of the channel pairs for each axis, base 100."""

    def __init__(self, layout: Layout) -> None:
        half = _magnitudes(layout.head_dim, 100.0)
        zero = torch.zeros_like(half)
        super().__init__(layout, torch.stack((torch.cat((half, zero)), torch.cat((zero, half)))))


def spiral_frequencies(head_dim: int, *, directions: int, base: float, largest: float) -> Tensor:
    """Compute the (2, F) radians per patch along x and y of `directions`, which divide a half turn evenly.

    Frequencies fall as in `Axial`, from `largest`; neighbouring pairs of them go to the directions of the first quarter
    turn in rotation, and the same ones to the perpendicular directions. Two directions are those of `Axial`.
    """
    magnitude_M = largest * _magnitudes(head_dim, base)
    place_M = torch.arange(magnitude_M.numel()) // 2 % (directions // 2)
    angle_F = math.pi / directions * torch.cat((place_M, place_M + directions // 2))
    return magnitude_M.repeat(2) * torch.stack((angle_F.cos(), angle_F.sin()))


class Spiral(Fixed):
    """Fixed frequencies along 4 directions, 45 degrees apart: between axial and mixed (Spiral RoPE, arXiv 2602.03227).

    A pair of channels turns by its frequency times the patch's projection x cos(phi) + y sin(phi) on its direction.
    Directions, base 10,000 and largest frequency 1.5 are the authors' for classification. Their code takes projections
    from a rotated picture of the grid and so clamps them at its borders; ours are exact, as in the paper. There is
    nothing to resize: a larger grid goes on with the same frequencies.
    """

    directions = 4

    def __init__(self, layout: Layout) -> None:
        if layout.head_dim % (4 * self.directions):
            raise ValueError(
                f"a head is {layout.head_dim} wide, but rotary=spiral needs a multiple of {4 * self.directions}, two "
                f"frequencies for each of {self.directions} directions; change embed_dim or num_heads, or choose "
                "rotary=axial or mixed"
            )
        made = spiral_frequencies(layout.head_dim, directions=self.directions, base=10_000.0, largest=1.5)
        super().__init__(layout, made)


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


ROTARIES: dict[str, type[Rotary] | None] = {
    "none": None,
    "axial": Axial,
    "mixed": Mixed,
    "spiral": Spiral,
}
