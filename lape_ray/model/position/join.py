"""Joins: where and how an absolute position embedding w enters the blocks.

A join turns the table(s) w_TND into one `LayerPosition` for each layer. It runs once in a forward pass: w has
no batch dimension, so its cost does not grow with the batch.

Shapes: T tables (1, or one a layer), L layers, N tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.position.absolute import AbsoluteKind
from lape_ray.model.position.layout import LayerPosition, Layout


class Join(nn.Module):
    """The interface of a join; `per_layer` says whether it wants a table for each layer."""

    per_layer: ClassVar[bool] = False
    staged: ClassVar[bool] = False
    """Whether it is defined for a network of several stages, between which grid and width change."""
    partial: ClassVar[bool] = False
    """Whether it lacks a part of LaPE, to show what that part does; spaces of all joins leave it out."""

    pooled: ClassVar[bool] = False
    """Whether it is defined for a network of one stage without class token alone, whose head reads a mean of tokens."""

    def __init__(self, layout: Layout, kind: AbsoluteKind, *, eps: float) -> None:
        super().__init__()
        self.depth = layout.depth

    def forward(self, w_TND: Tensor) -> list[LayerPosition]:
        """Give each layer its share of w."""
        raise NotImplementedError

    def carried(self, layers: list[LayerPosition]) -> Tensor | None:
        """Return the (1, N, D) that goes on to the next stage after the last of `layers`; None: nothing."""
        return None

    def behind(self, w_TND: Tensor) -> Tensor | None:
        """Return the (1, N, D) that is added to the last block's normalised tokens; None: nothing."""
        return None


class Basic(Join):
    """x_0 = x + w, once: the default of ViT and DeiT (LaPE paper, eq. 2)."""

    staged = True

    def forward(self, w_TND: Tensor) -> list[LayerPosition]:
        return [LayerPosition(residual_1ND=w_TND)] + [LayerPosition()] * (self.depth - 1)


class Share(Join):
    """x = x + w before every block, the same w (the paper's "shared" rows of table 7)."""

    def forward(self, w_TND: Tensor) -> list[LayerPosition]:
        return [LayerPosition(residual_1ND=w_TND)] * self.depth


class Unshare(Join):
    """x = x + w_l before every block, a table for each layer (the paper's "unshared" rows)."""

    per_layer = True

    def forward(self, w_TND: Tensor) -> list[LayerPosition]:
        return [LayerPosition(residual_1ND=w_ND.unsqueeze(0)) for w_ND in w_TND.unbind(0)]


class LapeShared(Join):
    """Attention reads LN_x(x) + LN_l(w), the same w in every layer (first version, arXiv 2212.05262v1)."""

    def __init__(self, layout: Layout, kind: AbsoluteKind, *, eps: float) -> None:
        super().__init__(layout, kind, eps=eps)
        self.norms = _norms(layout, eps)

    def forward(self, w_TND: Tensor) -> list[LayerPosition]:
        return [LayerPosition(attention_1ND=norm(w_TND)) for norm in self.norms]


class Lape(Join):
    """Attention reads LN_x(x) + w_l with w_l = LN_l(w_{l-1}) (LaPE paper, ICCV 2023, eq. 8-11).

    A row of zeros (the class token of sincos2d) needs care. LayerNorm's derivative at a constant row is
    gamma / sqrt(eps), 1000 for eps 1e-6, so through a chain of freshly initialised norms the gradient of the
    first ones grows to 1000^L and overflows float32. Where a row's variance is below eps its LayerNorm is a
    linear amplifier of noise, not a normalisation, and we stop the gradient into that row there: the forward
    pass is the paper's to the bit, the gradient is the paper's wherever rows are not degenerate, and every
    layer's own gamma and beta are always trained. A row above the threshold leaves its norm with a variance
    of at least half a unit, so that no two large factors can follow each other.
    """

    staged = True
    normalised: ClassVar[bool] = True

    def __init__(self, layout: Layout, kind: AbsoluteKind, *, eps: float) -> None:
        super().__init__(layout, kind, eps=eps)
        self.norms = self.make_norms(layout, eps)
        self.zero_rows = self.normalised and kind.zero_prefix and layout.num_prefix > 0
        self.eps = eps

    def make_norms(self, layout: Layout, eps: float) -> nn.ModuleList:
        """Make LN_l of every layer."""
        return _norms(layout, eps)

    def forward(self, w_TND: Tensor) -> list[LayerPosition]:
        layers = []
        for norm in self.norms:
            w_TND = norm(self._stop_degenerate_rows(w_TND) if self.zero_rows else w_TND)
            layers.append(LayerPosition(attention_1ND=w_TND))
        return layers

    def carried(self, layers: list[LayerPosition]) -> Tensor | None:
        return layers[-1].attention_1ND

    def _stop_degenerate_rows(self, w_TND: Tensor) -> Tensor:
        degenerate_TN1 = w_TND.detach().var(dim=-1, keepdim=True, correction=0) < self.eps
        return torch.where(degenerate_TN1, w_TND.detach(), w_TND)


class Mpvg(Lape):
    """x_0 = x + w, and LaPE from the second layer on and behind the last norm (MPVG, arXiv 2502.02919, eq. 8-11).

    w_l = LN_l(w_{l-1}) with w_0 = w enters attention of the layers l = 1 ... L - 1; the head reads the mean of
    LN(x_L) + LN_L(w), of the first w and not the last. There are L norms, as in LaPE: sizes that the paper prints (with
    behind's own norm DeiT-B has 86.584 million, without it 86.583) say so where its text does not.
    """

    staged = False
    pooled = True

    def forward(self, w_TND: Tensor) -> list[LayerPosition]:
        layers = [LayerPosition(residual_1ND=w_TND)]
        for norm in self.norms[:-1]:
            w_TND = norm(w_TND)
            layers.append(LayerPosition(attention_1ND=w_TND))
        return layers

    def behind(self, w_TND: Tensor) -> Tensor | None:
        last: Tensor = self.norms[-1](w_TND)
        return last


class PartialNorm(nn.Module):
    """Some parts of a LayerNorm, weight * (x - mean) / deviation + bias, under the names that they have in a whole one.

    Args:
        weights: how many gains, which begin at 1: 0, 1 for all channels, or one for each of `dim`.
        bias: whether a shift is added, which begins at 0.
    """

    def __init__(self, dim: int, *, eps: float, normalised: bool, weights: int, bias: bool) -> None:
        super().__init__()
        self.dim, self.eps, self.normalised = dim, eps, normalised
        self.weight = nn.Parameter(torch.ones(weights)) if weights else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, w_TND: Tensor) -> Tensor:
        if self.normalised:
            w_TND = F.layer_norm(w_TND, (self.dim,), eps=self.eps)
        if self.weight is not None:
            w_TND = w_TND * self.weight
        return w_TND if self.bias is None else w_TND + self.bias


class PartialLape(Lape):
    """LaPE with a part of LN_l for the whole of it: the rows of the paper's table 8, for w_l = f(w_{l-1})."""

    partial = True
    scaled: ClassVar[str] = "no"
    """By "no" gain, by a "scalar" one for each layer, or by a "vector" of one for each channel."""
    shifted: ClassVar[bool] = False

    def make_norms(self, layout: Layout, eps: float) -> nn.ModuleList:
        dim = layout.embed_dim
        weights = {"no": 0, "scalar": 1, "vector": dim}[self.scaled]
        return nn.ModuleList(
            PartialNorm(dim, eps=eps, normalised=self.normalised, weights=weights, bias=self.shifted)
            for _ in range(layout.depth)
        )


class LapeIdentity(PartialLape):
    """Attention reads LN_x(x) + w, the same w in every layer."""

    normalised = False


class LapeScalar(LapeIdentity):
    """w_l = g_l w_{l-1}, with one g_l for all channels."""

    scaled = "scalar"


class LapeGamma(LapeIdentity):
    """w_l = gamma_l w_{l-1}, with one gamma for each channel."""

    scaled = "vector"


class LapeAffine(LapeGamma):
    """w_l = gamma_l w_{l-1} + beta_l."""

    shifted = True


class LapeNorm(PartialLape):
    """w_l = Norm(w_{l-1}): the mean of each row subtracted, and the rest divided by its deviation."""


class LapeScalarNorm(LapeNorm):
    """w_l = g_l Norm(w_{l-1}), with one g_l for all channels."""

    scaled = "scalar"


class LapeGammaNorm(LapeNorm):
    """w_l = gamma_l Norm(w_{l-1}), with one gamma for each channel."""

    scaled = "vector"


def _norms(layout: Layout, eps: float) -> nn.ModuleList:
    """Make LN_w,l of every layer."""
    return nn.ModuleList(nn.LayerNorm(layout.embed_dim, eps=eps) for _ in range(layout.depth))


JOINS: dict[str, type[Join]] = {
    "basic": Basic,
    "share": Share,
    "unshare": Unshare,
    "lape": Lape,
    "lape_shared": LapeShared,
    "mpvg": Mpvg,
    "lape_identity": LapeIdentity,
    "lape_scalar": LapeScalar,
    "lape_gamma": LapeGamma,
    "lape_affine": LapeAffine,
    "lape_norm": LapeNorm,
    "lape_scalar_norm": LapeScalarNorm,
    "lape_gamma_norm": LapeGammaNorm,
}
