"""The transformer block, and the one thing it knows about position: what a layer receives.

Shapes: B images, N tokens (prefix + patches), D width, H heads, E = D / H width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


class LayerPosition(NamedTuple):
    """What position contributes to one block. Every part is optional and none depends on the image."""

    residual_1ND: Tensor | None = None
    """Added to the residual stream before the block."""
    attention_1ND: Tensor | None = None
    """Added to the normalised tokens that attention reads; never enters the residual stream."""
    logits_1HNN: Tensor | None = None
    """Added to the attention logits."""
    rotation: tuple[Tensor, Tensor] | None = None
    """Cosines and sines, each (H or 1, N, E/2), by which queries and keys are rotated."""


def thrifty(product: Callable[[Tensor], Tensor], cheap: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`product(cheap(x))`, a linear layer of a norm or an activation; its gradient computes `cheap(x)` again.

    Kept for that is x alone, which the gradient of `cheap` needs anyway. Nothing that is learned changes by a bit.
    Where a GPU's code is compiled, the compiler decides what to keep.
    """
    if not torch.is_grad_enabled():
        return product(cheap(x))
    if torch.compiler.is_compiling():
        if x.is_cuda:
            return product(cheap(x))
        result: Tensor = checkpoint(
            lambda x: product(cheap(x)), x, use_reentrant=False, context_fn=_products_are_kept
        )
        return result
    # Hooks, and not torch.utils.checkpoint, whose second pass through autograd costs 3 % of a step of DeiT-Ti on a CPU.
    device = x.device.type
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    given = cheap(x)
    if autocast:
        given = given.to(dtype)  # as the product would do, but into memory that can be told from others
    place, given_dtype = given.data_ptr(), given.dtype

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.data_ptr() == place else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast):
            again = cheap(x)
        return again.to(given_dtype).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return product(given)


def _products_are_kept() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default, torch.ops.aten.mm.default])


def rotate(x_BHNE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of neighbouring channels by its position's angle (RoFormer, arXiv 2104.09864, eq. 34)."""
    cos, sin = rotation
    even, odd = x_BHNE.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BHNE.dtype)


class Attention(nn.Module):
    """Multi-head self-attention through PyTorch's fused kernel, with optional logit bias and rotation."""

    def __init__(self, *, embed_dim: int, num_heads: int, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x_BND: Tensor,
        position: LayerPosition,
        prepare: Callable[[Tensor], Tensor],
        first: int | None = None,
    ) -> Tensor:
        """(B, N, D), or (B, first, D): what the first tokens get of all.

        `prepare` turns x into what is read of it: its norm, with position where the join adds it there.
        """
        qkv_BNM = thrifty(self.qkv, prepare, x_BND)
        q_BHNE, k_BHNE, v_BHNE = self._heads(qkv_BNM, position)
        logits_1HNN = position.logits_1HNN
        if first is not None:
            q_BHNE = q_BHNE[:, :, :first]
            logits_1HNN = None if logits_1HNN is None else logits_1HNN[:, :, :first]
        return self.proj(self._attend(q_BHNE, k_BHNE, v_BHNE, logits_1HNN).transpose(1, 2).flatten(2))

    def weights(self, x_BND: Tensor, position: LayerPosition) -> Tensor:
        """The attention weights (B, H, N, N) that `forward` applies to the values where it reads x; rows sum to 1."""
        q_BHNE, k_BHNE, _ = self._heads(self.qkv(x_BND), position)
        # The fused kernel returns no weights, but applied to an identity it returns nothing else.
        identity_NN = torch.eye(x_BND.shape[1], dtype=x_BND.dtype, device=x_BND.device)
        return self._attend(
            q_BHNE, k_BHNE, identity_NN.expand(*q_BHNE.shape[:2], -1, -1), position.logits_1HNN
        )

    def _heads(self, qkv_BNM: Tensor, position: LayerPosition) -> tuple[Tensor, Tensor, Tensor]:
        # Taken apart here and not after a transposition, so that the three gradients are put together in one copy.
        parts = qkv_BNM.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q_BHNE, k_BHNE, v_BHNE = (part_BNHE.transpose(1, 2) for part_BNHE in parts)
        if position.rotation is not None:
            q_BHNE, k_BHNE = rotate(q_BHNE, position.rotation), rotate(k_BHNE, position.rotation)
        return q_BHNE, k_BHNE, v_BHNE

    def _attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, logits_1HNN: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q_BHNE,
            k_BHNE,
            v_BHNE,
            attn_mask=None if logits_1HNN is None else logits_1HNN.to(q_BHNE.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x_BND: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Of `norm(x)`, or of x."""
        hidden_BNM = self.fc1(x_BND) if norm is None else thrifty(self.fc1, norm, x_BND)
        return thrifty(self.fc2, F.gelu, hidden_BNM)


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


class Block(nn.Module):
    """Pre-norm block of ViT and DeiT: x = x + attn(norm1(x) [+ position]); x = x + mlp(norm2(x))."""

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
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=eps)
        self.attn = Attention(
            embed_dim=embed_dim, num_heads=num_heads, qkv_bias=qkv_bias, dropout=attention_dropout
        )
        self.norm2 = nn.LayerNorm(embed_dim, eps=eps)
        self.mlp = Mlp(embed_dim=embed_dim, hidden_dim=int(embed_dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BND: Tensor, position: LayerPosition, first: int | None = None) -> Tensor:
        """(B, N, D), or (B, first, D): the first tokens alone, which is all that a class token's head reads."""
        if position.residual_1ND is not None:
            x_BND = x_BND + position.residual_1ND
        attended_BND = self.attn(x_BND, position, self.reading(position), first)
        return self._mlp_branch(x_BND[:, :first] + self.drop_path(attended_BND))

    def reading(self, position: LayerPosition) -> Callable[[Tensor], Tensor]:
        """What attention reads of the residual stream, as a function of that."""
        norm = self.norm1
        if position.attention_1ND is None:
            return norm
        # LN(x) + w = gamma * x_hat + (beta + w): beta joins w, which has no batch dimension, so the sum of
        # beta's gradient over B x N tokens falls out of the sum over B that w's gradient needs anyway.
        shift_1ND = position.attention_1ND + norm.bias
        return lambda x_BND: (
            F.layer_norm(x_BND, norm.normalized_shape, norm.weight, None, norm.eps) + shift_1ND
        )

    def _mlp_branch(self, x_BND: Tensor) -> Tensor:
        return x_BND + self.drop_path(self.mlp(x_BND, self.norm2))


class ResidualNormBlock(Block):
    """Block of Compact Transformers (arXiv 2104.05704): norm2 sits on the residual stream itself."""

    def _mlp_branch(self, x_BND: Tensor) -> Tensor:
        x_BND = self.norm2(x_BND)
        return x_BND + self.drop_path(self.mlp(x_BND))
