"""Blocks that compute what `Block` does with less memory and fewer operations, put into a network from outside.

- Outputs of norms and of GELU are not kept for the backward pass but computed again: they cost no matrix product.
- LN(x) + w = gamma * x_hat + (beta + w): beta joins w, which has no batch dimension, so that the sum of beta's gradient
  over B x N tokens falls out of the sum over B that w's gradient needs anyway.
- A LayerScale is joined to the linear layer before it: gamma * (W x + b) = (gamma W) x + gamma b.
- Where a head reads the prefix tokens alone, the last block computes no other token.

Shapes: B images, N tokens, Q tokens that are read after the block, D width, H heads, E width of a head, M hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lape_ray.model import Network
from lape_ray.model.block import Block, LayerScale
from lape_ray.model.ceit import LeFFBlock
from lape_ray.model.compact import ResidualNormBlock
from lape_ray.model.position import LayerPosition
from lape_ray.model.swin import WindowBlock

Cheap = Callable[[Tensor], Tensor]
N = TypeVar("N", bound=Network)


def optimise_blocks(network: N) -> N:
    """Replace the network's blocks by ones that compute the same for less; changes `network` and returns it.

    Parameters and their names stay. Blocks of a kind that `OPTIMISED` does not hold stay as they are.
    """
    for stage in network.stages():
        for index, block in enumerate(stage.blocks):
            num_queries = stage.num_read if index == len(stage.blocks) - 1 else None
            if type(block) in OPTIMISED:
                stage.blocks[index] = OPTIMISED[type(block)](block, num_queries)
    return network


class RecomputingBlock(Block):
    """A `Block` that takes less memory and fewer operations.

    Args:
        block: whose parts this takes over.
        num_queries: the first tokens, for which alone the block is computed; None: all.
    """

    def __init__(self, block: Block, num_queries: int | None) -> None:
        nn.Module.__init__(self)  # a block that is made of another's parts draws no weights
        _take_over(self, block)
        self.num_queries = num_queries

    def forward(self, x_BND: Tensor, position: LayerPosition) -> Tensor:
        """Compute the tokens (B, Q, D) after the block."""
        x_BQD = _attention_branch(self, x_BND, position, self.num_queries)
        hidden_BQM = recomputed(self.mlp.fc1, self.norm2, x_BQD)
        return x_BQD + self.drop_path(recomputed(_scaled(self.mlp.fc2, self.ls2), F.gelu, hidden_BQM))


class RecomputingResidualNormBlock(ResidualNormBlock):
    """A `ResidualNormBlock` that takes less memory and fewer operations; arguments as of `RecomputingBlock`."""

    def __init__(self, block: Block, num_queries: int | None) -> None:
        nn.Module.__init__(self)
        _take_over(self, block)
        self.num_queries = num_queries

    def forward(self, x_BND: Tensor, position: LayerPosition) -> Tensor:
        """Compute the tokens (B, Q, D) after the block."""
        x_BQD = self.norm2(_attention_branch(self, x_BND, position, self.num_queries))
        hidden_BQM = self.mlp.fc1(x_BQD)
        return x_BQD + self.drop_path(recomputed(_scaled(self.mlp.fc2, self.ls2), F.gelu, hidden_BQM))


class RecomputingLeFFBlock(LeFFBlock):
    """A `LeFFBlock` that takes less memory; its `LeFF` runs once, so that statistics move once.

    Args:
        block: whose parts this takes over.
        num_queries: not used, for the convolutions and their statistics need every token.
    """

    def __init__(self, block: Block, num_queries: int | None) -> None:
        nn.Module.__init__(self)
        _take_over(self, block)

    def forward(self, x_BND: Tensor, position: LayerPosition) -> Tensor:
        x_BND = _attention_branch(self, x_BND, position, None)
        return x_BND + self.drop_path(self.ls2(self.mlp(self.norm2(x_BND))))


OPTIMISED: dict[type[nn.Module], Callable[[Any, int | None], Block]] = {
    Block: RecomputingBlock,
    ResidualNormBlock: RecomputingResidualNormBlock,
    LeFFBlock: RecomputingLeFFBlock,
    WindowBlock: RecomputingBlock,  # windows are its attention's affair
}


def _take_over(block: Block, other: Block) -> None:
    """Make the parts of `other` those of `block`, under the same names."""
    for name, part in other.named_children():
        setattr(block, name, part)
    block.train(other.training)


def _attention_branch(
    block: Block, x_BND: Tensor, position: LayerPosition, num_queries: int | None
) -> Tensor:
    """Compute x + MSA(LN(x) + w) for the first tokens, (B, Q, D)."""
    x_BND = position.enter(x_BND)
    project = partial(block.attn.project, position=position)
    made_BNM = recomputed(project, _norm_with_position(block.norm1, position), x_BND)
    q_BHQE, k_BHNE, v_BHNE, logits_1HQN = block.attn.heads(made_BNM, position)
    if num_queries is not None:
        q_BHQE = q_BHQE[:, :, :num_queries]
        logits_1HQN = None if logits_1HQN is None else logits_1HQN[:, :, :num_queries]
    mixed_BQD = block.attn.mix_values(q_BHQE, k_BHNE, v_BHNE, logits_1HQN).flatten(2)
    return x_BND[:, :num_queries] + block.drop_path(_scaled(block.attn.proj, block.ls1)(mixed_BQD))


def _scaled(linear: nn.Linear, scale: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compute x -> gamma * (W x + b) as (gamma W) x + gamma b, whose gradient needs no output of `linear`."""
    if not isinstance(scale, LayerScale):
        return linear
    weight, bias = scale.gamma.unsqueeze(1) * linear.weight, scale.gamma * linear.bias
    return lambda x: F.linear(x, weight, bias)


def _norm_with_position(norm: nn.LayerNorm, position: LayerPosition) -> Cheap:
    """Compute x -> LN(x) + w, with beta joined to w."""
    if position.attention_1ND is None:
        return norm
    shift_1ND = position.attention_1ND + norm.bias
    return lambda x_BND: F.layer_norm(x_BND, norm.normalized_shape, norm.weight, None, norm.eps) + shift_1ND


def recomputed(product: Callable[[Tensor], Tensor], cheap: Cheap, x: Tensor) -> Tensor:
    """Compute `product(cheap(x))`, a linear layer of a norm or an activation; backward computes `cheap(x)` again.

    Only x is saved, which the gradient of `cheap` needs anyway. Results and gradients are the same to the bit.
    """
    if not torch.is_grad_enabled():
        return product(cheap(x))
    if not torch.compiler.is_compiling():
        return _recomputed_by_hooks(product, cheap, x)
    if x.is_cuda:  # where the compiler decides what to keep
        return product(cheap(x))
    result: Tensor = checkpoint(
        lambda x: product(cheap(x)), x, use_reentrant=False, context_fn=_products_are_kept
    )
    return result


def _products_are_kept() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default, torch.ops.aten.mm.default])


def _recomputed_by_hooks(product: Callable[[Tensor], Tensor], cheap: Cheap, x: Tensor) -> Tensor:
    """Recompute in eager mode, where a second pass of torch.utils.checkpoint costs 3 % of a DeiT-Ti step on a CPU."""
    device = x.device.type
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    given = cheap(x)
    if autocast:
        given = given.to(dtype)  # as the product would do, but into memory that can be told from others
    address, given_dtype = given.data_ptr(), given.dtype

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.data_ptr() == address else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast):
            again = cheap(x)
        return again.to(given_dtype).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return product(given)
