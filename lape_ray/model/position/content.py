"""Biases of attention's logits that depend on the image: made of what attention reads, for each layer.

Shapes: L layers, H heads, P patches in row-major order, N tokens = prefix tokens + patches, D width, E width of a head,
C parabolas of a head, K buckets of offsets, X = 2 H C rows of a linear map; "..." images, and windows of an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.position.layout import LayerPosition, Layout


class ContentBias(nn.Module):
    """The interface of such a bias: a module for each layer, which goes into a field of its `LayerPosition`."""

    field: ClassVar[str]
    layer: ClassVar[type[nn.Module]]

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer(layout) for _ in range(layout.depth))

    def placed(self, layers: Iterable[LayerPosition]) -> Iterator[LayerPosition]:
        """Put each layer's module into what the layer receives."""
        for layer, module in zip(layers, self.layers, strict=True):
            part: dict[str, Any] = {self.field: module}
            yield layer._replace(**part)


class Parabolas(nn.Module):
    """The parabolas of one layer, as further channels of queries and keys, so that fused attention stays.

    A logit gets sum_c [-a_c (p_c - p'_c)^2 + b_c (p_c - p'_c)] for query and key at p_c = v_c . x and p'_c = v_c . x',
    before the scale 1 / sqrt(E). a = softplus(W_a h) and b = W_b h are the query's, v_c is trained. With A = sum a_c
    v_c v_c^T and beta = sum b_c v_c this is -(x - x')^T A (x - x') + beta . (x - x'), of which all that depends on the
    key is a product of 5 numbers of the query with (x'_1^2, x'_1 x'_2, x'_2^2, x'_1, x'_2); the rest is the same for
    all keys, which no softmax sees. So 8 channels (3 of them zeros, for kernels want multiples of 8) are enough for any
    number of parabolas; the authors' code has 3 C + 2.
    """

    parabolas = 50

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        heads, dim = layout.num_heads, layout.embed_dim
        self.weight_XD = nn.Parameter(
            torch.empty(2 * heads * self.parabolas, dim).uniform_(-1, 1) / math.sqrt(dim)
        )
        self.direction_HC2 = nn.Parameter(
            torch.empty(heads, self.parabolas, 2).uniform_(-1, 1) / math.sqrt(2)
        )
        row_P, column_P = layout.patch_rows_columns()
        place_P2 = torch.stack((column_P, row_P), dim=-1) + 1.0
        place_N2 = F.pad(place_P2, (0, 0, layout.num_prefix, 0))
        # Seen from the grid's centre, which changes no difference, channels are small and lose less to bfloat16.
        centre_2 = torch.tensor([layout.grid[1] + 1.0, layout.grid[0] + 1.0]) / 2
        self.register_buffer("place_N2", place_N2 - centre_2, persistent=False)

    def rows(self) -> Tensor:
        """Give the (H (C + 2), D) that make a and beta of what attention reads; beta's are the sum over all b."""
        a_HCD, b_HCD = self.weight_XD.unflatten(0, (2, *self.direction_HC2.shape[:2])).unbind(0)
        return torch.cat((a_HCD, self.direction_HC2.mT @ b_HCD), dim=1).flatten(0, 1)

    def extend(self, q_NE: Tensor, k_NE: Tensor, made_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Append 8 channels to queries and keys (..., H, N, E), from the (..., H, N, C + 2) that `rows` make."""
        exact = (
            self.direction_HC2.dtype
        )  # and not autocast's: what is summed over 50 parabolas is rounded once
        with torch.autocast(q_NE.device.type, enabled=False):
            query_N5 = self._query(*made_NC.to(exact).tensor_split((self.parabolas,), dim=-1))
        x_N, y_N = self.get_buffer("place_N2").unbind(-1)
        key_N5 = torch.stack((x_N**2, x_N * y_N, y_N**2, x_N, y_N), dim=-1).expand(*k_NE.shape[:-1], -1)
        q, k = (
            torch.cat((part_NE, F.pad(further_N5, (0, 3)).to(part_NE.dtype)), dim=-1)
            for part_NE, further_N5 in ((q_NE, query_N5), (k_NE, key_N5))
        )
        return q, k

    def _query(self, a_NC: Tensor, beta_N2: Tensor) -> Tensor:
        """Compute a query's factors of the key's x^2, x y, y^2, x and y, (..., H, N, 5)."""
        (x_N, y_N), (x_HC, y_HC) = self.get_buffer("place_N2").unbind(-1), self.direction_HC2.unbind(-1)
        square_HC3 = torch.stack((x_HC**2, 2 * x_HC * y_HC, y_HC**2), dim=-1)
        xx_N, xy_N, yy_N = (F.softplus(a_NC) @ square_HC3).unbind(-1)  # A, with A_12 + A_21 as one
        beta_x_N, beta_y_N = beta_N2.unbind(-1)
        to_x_N = 2 * xx_N * x_N + xy_N * y_N - beta_x_N
        to_y_N = 2 * yy_N * y_N + xy_N * x_N - beta_y_N
        return torch.stack((-xx_N, -xy_N, -yy_N, to_x_N, to_y_N), dim=-1)


class Pape(ContentBias):
    """Parabolas of the distance along trained directions, whose shape the query decides (PaPE, arXiv 2602.01418).

    50 parabolas a head, and the uniform initialisation of linear layers, as in the authors' code. There as here the
    class token's place is (0, 0), and patches are counted from (1, 1); a distillation token has the class token's.
    There is nothing to resize: a larger grid goes on.
    """

    field = "channels"
    layer = Parabolas


def bucket_of(offset: Tensor) -> Tensor:
    """Compute the bucket -3 ... 3 of offsets along an axis: iRPE's piecewise function, alpha 1.9, beta 3.8, gamma 15.2.

    Offsets 0 and +-1 have their own, larger ones share some by their logarithm.
    """
    alpha, beta, gamma = 1.9, 3.8, 15.2
    size = offset.abs().double()
    far = alpha + (size.clamp(min=alpha) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    return offset.sign() * torch.where(size <= alpha, size.round(), far.round().clamp(max=beta)).long()


class ContextualKeys(nn.Module):
    """The trained vectors of one layer, one for each bucket of offsets, shared by heads."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        row_P, column_P = layout.patch_rows_columns()
        row_PP, column_PP = (bucket_of(index[:, None] - index) for index in (row_P, column_P))
        prefix = (layout.num_prefix, 0, layout.num_prefix, 0)
        index_NN = F.pad(7 * (row_PP + 3) + column_PP + 3, prefix, value=49)
        self.register_buffer("index_NN", index_NN, persistent=False)
        self.table_EK = nn.Parameter(torch.zeros(layout.head_dim, 50 if layout.num_prefix else 49))

    def forward(self, q_NE: Tensor) -> Tensor:
        """Compute what is added to the logits before their scale, (..., H, N, N)."""
        by_bucket_NK = q_NE @ self.table_EK
        return by_bucket_NK.gather(-1, self.get_buffer("index_NN").expand(*q_NE.shape[:-1], -1))


class IrpeK(ContentBias):
    """q . r for a vector r of the offset's bucket: iRPE on keys, contextual product (arXiv 2107.14222).

    Rows and columns of the offset have 7 buckets each, 49 together; vectors are shared by heads and begin at zero, as
    in the authors' code. A class token, as a query and as a key, has the 50th bucket; so has a distillation token.
    There is nothing to resize: a larger grid has the same buckets. q is that before a rotation, which would make the
    product depend on places. The (B, H, N, N) logits are made, and where they need a gradient no fused kernel of the
    CPU is used, as with every trained bias.
    """

    field = "contextual"
    layer = ContextualKeys


CONTENT_BIASES: dict[str, type[ContentBias]] = {"pape": Pape, "irpe_k": IrpeK}
