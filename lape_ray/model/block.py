"""The transformer block: x = x + MSA(LN(x) + w); x = x + MLP(LN(x)), each branch perhaps times a LayerScale.

Shapes: B images, N tokens (prefix + patches), Q queries (N, or fewer), D width, H heads, E = D / H width of a head,
M = 3 D, or more.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.position import LayerPosition

Heads = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys and values of the heads, (B, H, N, E) each, and what is added to their logits, (B or 1, H, N, N)."""


class Block(nn.Module):
    """Pre-norm block of ViT and DeiT, and of LaPE (ICCV 2023, eq. 8-11) where position comes with w for attention.

    Training runs it with less memory and fewer operations: see `lape_ray.training.recompute`.

    Args:
        layer_scale: initial factor of both branches; 0: they have none.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        eps: float,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=eps)
        self.attn = Attention(
            embed_dim=embed_dim, num_heads=num_heads, qkv_bias=qkv_bias, dropout=attention_dropout
        )
        self.ls1 = LayerScale(embed_dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dim, eps=eps)
        self.mlp = Mlp(embed_dim=embed_dim, hidden_dim=int(embed_dim * mlp_ratio))
        self.ls2 = LayerScale(embed_dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BND: Tensor, position: LayerPosition) -> Tensor:
        x_BND = position.enter(x_BND)
        h_BND = self.norm1(x_BND)
        if position.attention_1ND is not None:
            h_BND = h_BND + position.attention_1ND
        x_BND = x_BND + self.drop_path(self.ls1(self.attn(h_BND, position)))
        return x_BND + self.drop_path(self.ls2(self.mlp(self.norm2(x_BND))))


class Attention(nn.Module):
    """Multi-head self-attention through PyTorch's fused kernel, with optional logit bias and rotation."""

    def __init__(self, *, embed_dim: int, num_heads: int, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} does not divide by num_heads={num_heads}; change one of them"
            )
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, h_BND: Tensor, position: LayerPosition) -> Tensor:
        return self.attend(*self.heads(self.project(h_BND, position), position))

    def project(self, h_BND: Tensor, position: LayerPosition) -> Tensor:
        """Compute queries, keys and values of all heads, and behind them what further channels are made of."""
        if position.channels is None:
            return self.qkv(h_BND)
        rows_XD = position.channels.rows()
        bias = None if self.qkv.bias is None else F.pad(self.qkv.bias, (0, len(rows_XD)))
        return F.linear(h_BND, torch.cat((self.qkv.weight, rows_XD)), bias)

    def heads(self, made_BNM: Tensor, position: LayerPosition) -> Heads:
        """Split what `project` made into the heads' queries, keys and values; compute what is added to their logits.

        Queries and keys are rotated, and then may get further channels.
        """
        if position.channels is None:
            q, k, v = self.parts(made_BNM, 3)
        else:
            qkv_BNM, further_BNM = made_BNM.tensor_split((self.qkv.out_features,), dim=-1)
            q, k, v = self.parts(qkv_BNM, 3)
        logits = position.logits_1HNN
        if position.contextual is not None:
            logits = position.contextual(q) / math.sqrt(self.head_dim)
        if position.rotation is not None:
            q, k = rotate(q, position.rotation), rotate(k, position.rotation)
        if position.channels is not None:
            q, k = position.channels.extend(q, k, *self.parts(further_BNM, 1))
        return q, k, v, logits

    def parts(self, made_BNM: Tensor, count: int) -> list[Tensor]:
        """Split into `count` parts, and each into the heads, (B, H, N, M / count / H)."""
        # Taken apart here and not after a transposition, so that the gradients are put together in one copy.
        parts = made_BNM.unflatten(-1, (count, self.num_heads, -1)).unbind(2)
        return [part_BNHE.transpose(1, 2) for part_BNHE in parts]

    def attend(self, q_BHQE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, logits_1HQN: Tensor | None) -> Tensor:
        """Mix the values for each query and project the result, (B, Q, D)."""
        return self.proj(self.mix_values(q_BHQE, k_BHNE, v_BHNE, logits_1HQN).flatten(2))

    def mix_values(
        self, q_BHQE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, logits_1HQN: Tensor | None
    ) -> Tensor:
        """Mix the values for each query, (B, Q, H, E)."""
        return self.scaled_dot_product(q_BHQE, k_BHNE, v_BHNE, logits_1HQN).transpose(1, 2)

    def weights(self, h_BND: Tensor, position: LayerPosition) -> Tensor:
        """Compute the weights (B, H, N, N) that `forward` mixes the values with; rows sum to 1.

        Where attention sees windows, a query has weights for the keys of its window alone.
        """
        q_BHNE, k_BHNE, _, logits = self.heads(self.project(h_BND, position), position)
        # The fused kernel returns no weights, but applied to an identity it returns nothing else.
        identity_NN = torch.eye(k_BHNE.shape[2], dtype=h_BND.dtype, device=h_BND.device)
        identity_BHNN = identity_NN.expand(*q_BHNE.shape[:2], -1, -1)
        return self.mix_values(q_BHNE, k_BHNE, identity_BHNN, logits).transpose(1, 2)

    def scaled_dot_product(
        self, q_BHQE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, logits_1HQN: Tensor | None
    ) -> Tensor:
        """Compute attention, (B, H, Q, E), through the fused kernel where that has all gradients."""
        if logits_1HQN is not None and logits_1HQN.requires_grad and not q_BHQE.is_cuda:
            return self._plain_dot_product(q_BHQE, k_BHNE, v_BHNE, logits_1HQN)
        further = q_BHQE.shape[-1] - self.head_dim  # channels; most kernels want values as wide as queries
        mixed = F.scaled_dot_product_attention(
            q_BHQE,
            k_BHNE,
            F.pad(v_BHNE, (0, further)) if further else v_BHNE,
            attn_mask=None if logits_1HQN is None else logits_1HQN.to(q_BHQE.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            scale=1 / math.sqrt(self.head_dim),
        )
        return mixed[..., : v_BHNE.shape[-1]] if further else mixed

    def _plain_dot_product(
        self, q_BHQE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, logits_1HQN: Tensor
    ) -> Tensor:
        """Compute it where the fused kernel knows no gradient of logits: PyTorch's own way then takes more passes."""
        scores_BHQN = (q_BHQE * self.head_dim**-0.5) @ k_BHNE.mT
        weights_BHQN = (scores_BHQN + logits_1HQN.to(scores_BHQN.dtype)).softmax(-1)
        return F.dropout(weights_BHQN, self.dropout, self.training) @ v_BHNE


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class LayerScale(nn.Module):
    """A trained factor of each channel of a branch (CaiT, arXiv 2103.17239, eq. 4)."""

    def __init__(self, embed_dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), initial))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a branch for whole images, scale the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BND: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x_BND
        keep = 1 - self.rate
        return x_BND * x_BND.new_empty(x_BND.shape[0], 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def rotate(x_BHNE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of neighbouring channels by its position's angle (RoFormer, arXiv 2104.09864, eq. 34)."""
    cos, sin = rotation
    even, odd = x_BHNE.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BHNE.dtype)
