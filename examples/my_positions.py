"""A position embedding and a join of your own; docs/positions.md says what such a file holds.

    python jobs/imagenet_deit.py deit_tiny_basic \\
      --model.plugin examples/my_positions.py --model.bias decay --model.join gated

Shapes: L layers, H heads, P patches, T tables, N tokens, D width.
"""

import torch
from torch import Tensor, nn

from lape_ray.model.position import LayerPosition, Layout
from lape_ray.model.position.absolute import AbsoluteKind
from lape_ray.model.position.join import Join
from lape_ray.model.position.relative import Bias


class Decay(Bias):
    """Minus the distance of two patches times a slope that every head of every layer learns."""

    def __init__(self, layout: Layout, *, std: float = 0.0) -> None:
        super().__init__(layout, std=std)
        place_P2 = torch.stack(layout.patch_rows_columns(), dim=1).float()
        self.register_buffer("distance_PP", (place_P2[:, None] - place_P2).norm(dim=-1), persistent=False)
        self.slope_LH = nn.Parameter(torch.full((layout.depth, layout.num_heads), 0.1))

    def forward(self, layers: slice) -> Tensor:
        """Compute the (L, H, P, P) that are added to the attention logits of some of the layers."""
        return -self.slope_LH[layers, :, None, None] * self.get_buffer("distance_PP")


class Gated(Join):
    """Attention of layer l reads LN(x) + g_l LN(w): as `lape_shared`, with one trained gate for each layer."""

    def __init__(self, layout: Layout, kind: AbsoluteKind, *, eps: float) -> None:
        super().__init__(layout, kind, eps=eps)
        self.norm = nn.LayerNorm(layout.embed_dim, eps=eps)
        self.gate_L = nn.Parameter(torch.ones(layout.depth))

    def forward(self, w_TND: Tensor) -> list[LayerPosition]:
        """Give each of the L layers its share of the table, here T = 1."""
        return [LayerPosition(attention_1ND=gate * self.norm(w_TND)) for gate in self.gate_L]


BIASES = {"decay": Decay}
JOINS = {"gated": Gated}
