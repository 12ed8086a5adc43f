"""Tokens of T2T-ViT (arXiv 2101.11986): image to tokens in three soft splits, with a performer after the first two.

Shapes: B images, C channels, H x W pixels, N tokens, I width of an unfolded token, E width inside, M = E / 2 random
features, D width of a token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 16  # pixels from one token to the next: 4, then twice 2


class TokensToToken(nn.Module):
    """Tokens from overlapping neighbourhoods (section 3.1): 7x7 pixels, then twice 3x3 tokens, each made one vector."""

    def __init__(self, *, image_size: int, embed_dim: int, token_dim: int = 64) -> None:
        super().__init__()
        if image_size % STRIDE:
            raise ValueError(
                f"image_size={image_size} does not divide by {STRIDE}, as the tokens of T2T-ViT need it; change it"
            )
        self.grid = (image_size // STRIDE, image_size // STRIDE)
        self.attention1 = Performer(3 * 7 * 7, token_dim)
        self.attention2 = Performer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BNI = _soft_split(images_BCHW, 7, stride=4)
        x_BNI = _soft_split(_as_image(self.attention1(x_BNI)), 3, stride=2)
        x_BNI = _soft_split(_as_image(self.attention2(x_BNI)), 3, stride=2)
        return self.project(x_BNI)


def _soft_split(image_BCHW: Tensor, kernel: int, *, stride: int) -> Tensor:
    """Make each overlapping kernel x kernel neighbourhood one vector (channel, row, column), (B, N, I)."""
    padding = kernel // 3  # 2 of 7, 1 of 3
    return F.unfold(image_BCHW, kernel, stride=stride, padding=padding).transpose(1, 2)


def _as_image(x_BNE: Tensor) -> Tensor:
    side = math.isqrt(x_BNE.shape[1])
    return x_BNE.transpose(1, 2).unflatten(2, (side, side))


class Performer(nn.Module):
    """A transformer layer with linear attention through random features (arXiv 2009.14794), from width I to E.

    Attention is phi(q) (phi(k)^T v) over phi(q) sum(phi(k)), with phi(z) = exp(Wz - |z|^2 / 2) / sqrt(M). The values
    are the residual stream. W has orthogonal rows of length sqrt(M); it is drawn once and never trained, so it is part
    of the state. All is computed in the weights' precision, whatever autocast says: small phi vanish in a shorter one.
    """

    EPSILON = 1e-8

    def __init__(self, in_dim: int, dim: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(dropout))
        self.dropout = nn.Dropout(dropout)
        self.num_features = dim // 2
        w_ME = nn.init.orthogonal_(torch.empty(self.num_features, dim)) * math.sqrt(self.num_features)
        self.register_buffer("w", w_ME)

    def forward(self, x_BNI: Tensor) -> Tensor:
        w_ME = self.get_buffer("w")
        with torch.autocast(x_BNI.device.type, enabled=False):
            k_BNE, q_BNE, v_BNE = self.kqv(self.norm1(x_BNI.to(w_ME.dtype))).chunk(3, dim=-1)
            k_BNM, q_BNM = self._features(k_BNE, w_ME), self._features(q_BNE, w_ME)
            total_BN1 = q_BNM @ k_BNM.sum(1).unsqueeze(-1) + self.EPSILON
            attended_BNE = q_BNM @ (k_BNM.mT @ v_BNE) / total_BN1
            y_BNE = v_BNE + self.dropout(self.proj(attended_BNE))
            return y_BNE + self.mlp(self.norm2(y_BNE))

    def _features(self, z_BNE: Tensor, w_ME: Tensor) -> Tensor:
        half_norm_BN1 = z_BNE.square().sum(-1, keepdim=True) / 2
        return (z_BNE @ w_ME.T - half_norm_BN1).exp() / math.sqrt(self.num_features)
