"""Relative position biases: a bias_LHNN that is added to every layer's attention logits.

Shapes: L layers, H heads, P patches in row-major order, N tokens = prefix tokens + patches, R relative offsets =
(2 * height - 1) * (2 * width - 1). Prefix tokens get no bias: their rows and columns are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.position.layout import LayerPosition, Layout


def relative_index(layout: Layout) -> Tensor:
    """Compute the (P, P) rows of the relative table that query p reads for key q: offset by row, then by column."""
    height, width = layout.grid
    row_P, column_P = layout.patch_rows_columns()
    row_PP = row_P[:, None] - row_P[None, :] + height - 1
    column_PP = column_P[:, None] - column_P[None, :] + width - 1
    return row_PP * (2 * width - 1) + column_PP


class Bias(nn.Module):
    """The interface of a bias.

    Args:
        std: of its tables' truncated normal initialisation, where it has any; 0: they begin at zero.
    """

    unnormed: ClassVar[str] = ""
    """Why no LayerNorm over keys may follow it; empty: one may."""

    def __init__(self, layout: Layout, *, std: float = 0.0) -> None:
        super().__init__()

    def forward(self, layers: slice) -> Tensor:
        """Compute the (L, H, P, P) biases of some of the layers."""
        raise NotImplementedError


class Relative2d(Bias):
    """A trained bias for every 2-D offset, head and layer (Swin, arXiv 2103.14030, eq. 4)."""

    def __init__(self, layout: Layout, *, std: float = 0.0) -> None:
        super().__init__(layout, std=std)
        height, width = layout.grid
        offsets = (2 * height - 1) * (2 * width - 1)
        table_LRH = torch.zeros(layout.depth, offsets, layout.num_heads)
        self.table_LRH = nn.Parameter(nn.init.trunc_normal_(table_LRH, std=std) if std > 0 else table_LRH)
        self.register_buffer("index_PP", relative_index(layout), persistent=False)

    def forward(self, layers: slice) -> Tensor:
        """Look up the (L, H, P, P) biases."""
        return self.table_LRH[layers, self.get_buffer("index_PP")].permute(0, 3, 1, 2)


class LogCpb(Bias):
    """A small MLP of the offset's logarithm for every layer: log-CPB of Swin V2 (arXiv 2111.09883, eq. 3-4).

    bias = W_2 ReLU(W_1 d + b_1), with d = sign(offset) * log(1 + |offset|) of rows and columns, in patches, and 512
    hidden units. Its weights have no size of the grid: a larger one has the same bias at the same offset, and goes on
    from there. Weights begin as those of other linear layers. Swin V2's code measures offsets in windows and takes 16 *
    sigmoid of the bias, for its cosine attention; neither is in the equations, nor here. FIRE (arXiv 2310.04418)
    feeds its MLP with logarithms too, but divides by the query's place in a sequence, which an image has not.
    """

    hidden = 512

    def __init__(self, layout: Layout, *, std: float = 0.0) -> None:
        super().__init__(layout, std=std)
        self.mlps = nn.ModuleList(self._mlp(layout.num_heads) for _ in range(layout.depth))
        self.register_buffer("index_PP", relative_index(layout), persistent=False)
        height, width = layout.grid
        row_R, column_R = Layout((2 * height - 1, 2 * width - 1), *layout[1:]).patch_rows_columns()
        offset_R2 = torch.stack((row_R - height + 1, column_R - width + 1), dim=-1)
        self.register_buffer("log_R2", offset_R2.sign() * offset_R2.abs().log1p(), persistent=False)

    def _mlp(self, num_heads: int) -> nn.Sequential:
        mlp = nn.Sequential(
            nn.Linear(2, self.hidden), nn.ReLU(), nn.Linear(self.hidden, num_heads, bias=False)
        )
        for name, parameter in mlp.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.trunc_normal_(parameter, std=0.02)
        return mlp

    def forward(self, layers: slice) -> Tensor:
        """Compute the (L, H, P, P) biases, each offset once."""
        table_LRH = torch.stack([mlp(self.get_buffer("log_R2")) for mlp in self.mlps[layers]])
        return table_LRH[:, self.get_buffer("index_PP")].permute(0, 3, 1, 2)


class Alibi2d(Bias):
    """Minus the Euclidean distance of two patches, in patches, times a head's fixed slope (arXiv 2311.00566).

    Slopes are the geometric series 2^(-8/H), 2^(-16/H), ... of ALiBi (arXiv 2108.12409).
    """

    def __init__(self, layout: Layout, *, std: float = 0.0) -> None:
        super().__init__(layout, std=std)
        row_P, column_P = (index.double() for index in layout.patch_rows_columns())
        distance_PP = torch.hypot(row_P[:, None] - row_P[None, :], column_P[:, None] - column_P[None, :])
        heads = layout.num_heads
        slope_H = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        bias_HPP = (-slope_H[:, None, None] * distance_PP).float()
        self.depth = layout.depth
        self.register_buffer("bias_HPP", bias_HPP, persistent=False)

    def forward(self, layers: slice) -> Tensor:
        """Give the (L, H, P, P) biases, the same for every layer."""
        return self.get_buffer("bias_HPP").expand(self.depth, -1, -1, -1)[layers]


class LookHere(Bias):
    """Minus the distance of two patches, in patches, for the keys that a head looks at, minus infinity for the others.

    LookHere (NeurIPS 2024, arXiv 2405.13985), with a field of view of 90 degrees (its LH-90). Two thirds of the heads
    look into one of 8 directions each and see the keys within 45 degrees of it, and the query itself; the others see
    all keys. The slope is 2 * s_layer * s_head: s_layer falls from 1.5 to 0.5 over the layers (of a stage), s_head is
    1/2 for heads with a direction and 1/4, 1/16, 1/64, 1/256 for those without, as in the authors' code. There are no
    parameters, and nothing to resize.

    The paper's networks have 12 heads: 8 with a direction, the same in every layer. Networks of other numbers of heads
    are our definition: directions go on from layer to layer where the one before it stopped, so that 3 heads look into
    all 8 in 4 layers. Prefix tokens see all tokens and are seen by all, without a bias, as in the paper.
    """

    unnormed = "hides keys behind minus infinity, of which a LayerNorm over keys makes no number"
    # x to the right, y down; in the order of the authors' heads.
    directions = ((-1, -1), (1, -1), (-1, 1), (1, 1), (0, -1), (0, 1), (-1, 0), (1, 0))

    def __init__(self, layout: Layout, *, std: float = 0.0) -> None:
        super().__init__(layout, std=std)
        row_P, column_P = layout.patch_rows_columns()
        y_PP, x_PP = row_P - row_P[:, None], column_P - column_P[:, None]  # from query to key
        square_PP = x_PP**2 + y_PP**2
        seen = [square_PP >= 0]  # all, in the view 0 of heads without a direction
        for x, y in self.directions:
            along_PP = x * x_PP + y * y_PP
            seen.append((along_PP >= 0) & (2 * along_PP**2 >= (x**2 + y**2) * square_PP))  # within 45 degrees
        view_LH, slope_LH = self._heads(layout.depth, layout.num_heads)
        self.register_buffer("distance_PP", square_PP.float().sqrt(), persistent=False)
        self.register_buffer("hidden_VPP", ~torch.stack(seen), persistent=False)
        self.register_buffer("view_LH", view_LH, persistent=False)
        self.register_buffer("slope_LH", slope_LH, persistent=False)

    def _heads(self, depth: int, num_heads: int) -> tuple[Tensor, Tensor]:
        """Give the view and the slope of every layer's heads, (L, H) each."""
        free = num_heads // 3
        looking = num_heads - free
        turn_LH = torch.arange(depth * looking).unflatten(0, (depth, looking)) % len(self.directions)
        slope_H = torch.cat((torch.full((looking,), 0.5), 0.25 ** (1 + torch.arange(free) % 4)))
        slope_L1 = 2.0 * torch.linspace(1.5, 0.5, depth)[:, None]
        return F.pad(turn_LH + 1, (0, free)), slope_L1 * slope_H

    def forward(self, layers: slice) -> Tensor:
        """Compute the (L, H, P, P) biases."""
        bias_LHPP = -self.get_buffer("slope_LH")[layers, :, None, None] * self.get_buffer("distance_PP")
        hidden_LHPP = self.get_buffer("hidden_VPP")[self.get_buffer("view_LH")[layers]]
        return bias_LHPP.masked_fill(hidden_LHPP, -math.inf)


class LogitBias(nn.Module):
    """The bias of a table, normed for each layer, as the blocks add it to their logits.

    Args:
        norms: one module for each layer, from (1, H, P, P) to the same.
    """

    def __init__(self, table: nn.Module, norms: nn.ModuleList, *, num_prefix: int) -> None:
        super().__init__()
        self.table = table
        self.num_prefix = num_prefix
        self.norms = norms

    def forward(self) -> Iterator[Tensor]:
        """Compute one (1, H, N, N) bias for each layer.

        Where they are kept for gradients anyhow, all are made at once; else each as it is asked for, since at 1,024
        pixels those of one layer take 0.2 to 0.8 GB.
        """
        prefix = (self.num_prefix, 0, self.num_prefix, 0)
        each = [slice(layer, layer + 1) for layer in range(len(self.norms))]
        for layers in [slice(None)] if torch.is_grad_enabled() else each:
            for norm, bias_1HPP in zip(self.norms[layers], self.table(layers).split(1), strict=True):
                yield F.pad(norm(bias_1HPP), prefix)

    def placed(self, layers: Iterable[LayerPosition]) -> Iterator[LayerPosition]:
        """Put each layer's bias into what the layer receives."""
        for layer, bias_1HNN in zip(layers, self(), strict=True):
            yield layer._replace(logits_1HNN=bias_1HNN)


def _as_it_is(layout: Layout) -> nn.ModuleList:
    return nn.ModuleList(nn.Identity() for _ in range(layout.depth))


def _over_keys(layout: Layout) -> nn.ModuleList:
    """Make the norms of LaPE for relative biases: a weight for each key, shared by heads and queries; eps 1e-5."""
    return nn.ModuleList(nn.LayerNorm(layout.num_patches, eps=1e-5) for _ in range(layout.depth))


BIASES: dict[str, type[Bias] | None] = {
    "none": None,
    "relative2d": Relative2d,
    "alibi2d": Alibi2d,
    "log_cpb": LogCpb,
    "lookhere": LookHere,
}
BIAS_JOINS: dict[str, Callable[[Layout], nn.ModuleList]] = {"basic": _as_it_is, "lape": _over_keys}
