"""The position embedding of a network as attention sees it, layer by layer.

The functions are pure: of weights and images.

The chain of embeddings is the network's own (`VisionTransformer.layer_positions`); nothing is computed a second way.

Shapes: L layers, B images, H heads, N tokens = prefix tokens + P patches in row-major order, D width, F pairs of
channels.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lape_ray.model import Network, VisionTransformer
from lape_ray.model.block import Block
from lape_ray.model.compact import ResidualNormBlock
from lape_ray.model.position import LayerPosition


def cosine(rows_ND: Tensor) -> Tensor:
    """Compute the (N, N) cosine similarity of every pair of rows (LaPE paper, eq. 12); NaN where a row is all zeros."""
    norm_N1 = rows_ND.norm(dim=-1, keepdim=True)
    unit_ND = torch.where(norm_N1 > 0, rows_ND / norm_N1, torch.nan)
    return (unit_ND @ unit_ND.T).clamp(-1, 1)


def seen_by_attention(network: VisionTransformer) -> Tensor | None:
    """Compute the (L, N, D) position embedding as each layer's attention reads it; None without a token embedding.

    A join that gives attention its own summand (LaPE) is read as it is: LN_w,l(w_{l-1}). A join that adds to the
    residual stream passes the layer's common LayerNorm, where its share is l2 * LN_l(w) (eq. 6-7); w is all that was
    added so far. l2 depends on the image but is a positive factor of a row, which no cosine sees: it is left out.

    Raises:
        ValueError: position is added to the stream of Compact Transformers more than once. Their blocks normalise that
            stream, so that how much each addition counts depends on the image.
    """
    if network.join is None:
        return None
    seen, carried_1ND = [], torch.zeros(1, 1, 1)
    with torch.no_grad():
        for index, (block, layer) in enumerate(zip(network.blocks, network.layer_positions(), strict=True)):
            assert isinstance(block, Block)
            if layer.attention_1ND is not None:
                seen.append(layer.attention_1ND[0])
                continue
            if layer.residual_1ND is not None:
                if index > 0 and isinstance(block, ResidualNormBlock):
                    raise ValueError(
                        "position is added before every block of a Compact Transformer, whose blocks normalise the "
                        "sum: its share depends on the image and has no map; report joins basic, lape, lape_shared"
                    )
                carried_1ND = carried_1ND.to(layer.residual_1ND.device) + layer.residual_1ND
            seen.append(block.norm1(carried_1ND)[0])
            carried_1ND = _past_norm2(block, carried_1ND, 1.0)
    return torch.stack(seen)


def _past_norm2(block: Block, carried_BND: Tensor, scale: Tensor | float) -> Tensor:
    """Return what the block leaves of a summand in the stream.

    That is all of it, or its share where a norm sits on the stream. `scale` is the stream's standard deviation before
    that norm.
    """
    if not isinstance(block, ResidualNormBlock):
        return carried_BND
    return block.norm2.weight * (carried_BND - carried_BND.mean(-1, keepdim=True)) / scale


def correlations(network: VisionTransformer) -> Tensor | None:
    """Compute the (L, N, N) cosine similarity of the position embedding's rows as each layer sees them."""
    seen_LND = seen_by_attention(network)
    return None if seen_LND is None else torch.stack([cosine(rows_ND.float()) for rows_ND in seen_LND])


def biases(network: VisionTransformer) -> Tensor | None:
    """Compute the (L, H, P, P) that are added to attention's logits for each query (row) and key (column) patch."""
    prefix = network.num_prefix
    with torch.no_grad():
        layers = [layer.logits_1HNN for layer in network.layer_positions()]
    found = [bias_1HNN[0, :, prefix:, prefix:] for bias_1HNN in layers if bias_1HNN is not None]
    return torch.stack(found) if found else None


def rotations(network: VisionTransformer) -> Tensor | None:
    """Compute the (L, P, P) mean over heads and channel pairs of cos(angle of query - angle of key).

    It is 1 where both turn alike.
    """
    prefix = network.num_prefix
    found = []
    with torch.no_grad():
        for layer in network.layer_positions():
            if layer.rotation is not None:
                cos_HPF, sin_HPF = (part[:, prefix:] for part in layer.rotation)
                both_HPF = torch.cat((cos_HPF, sin_HPF), dim=-1)
                found.append((both_HPF @ both_HPF.mT).mean(0) / cos_HPF.shape[-1])
    return torch.stack(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Strength:
    """The strength with which each layer uses position, for each query token, as means over images (and heads)."""

    norm_ratio_LN: Tensor | None
    """Length of attention's input that is position over length that is token: |l2 LN(w)| / |l1 LN(x)| of eq. 7, or
    |w_l| / |LN_x(x)| with LaPE. None without a token embedding."""
    moved_LN: Tensor
    """Share of a query's attention, 0 to 1, that goes elsewhere when the layer gets no position (total variation)."""


def measure_strength(network: VisionTransformer, images_BCHW: Tensor) -> Strength:
    """Run normalised images through the network in evaluation mode and see what position does in each layer."""
    probes = [_Probe() for _ in network.blocks]
    carried = _Carried()
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for block, probe in zip(network.blocks, probes, strict=True):
            assert isinstance(block, Block)
            hooks = [block.register_forward_pre_hook(_on_block(carried, probe))]
            if block is not network.blocks[-1]:  # after which nothing reads what it carries
                hooks.append(block.norm2.register_forward_pre_hook(_on_norm2(carried, block)))
            for hook in hooks:
                stack.callback(hook.remove)
        was_training = network.training
        network.eval()(images_BCHW)
        network.train(was_training)
    ratios = [probe.norm_ratio_N for probe in probes]
    return Strength(
        norm_ratio_LN=torch.stack([r for r in ratios if r is not None]) if ratios[0] is not None else None,
        moved_LN=torch.stack([probe.moved_N for probe in probes]),
    )


class _Carried:
    """The part of the residual stream that is position, exactly, while images go through the blocks."""

    part_BND: Tensor | None = None


class _Probe:
    """The measurements of one layer."""

    norm_ratio_N: Tensor | None = None
    moved_N: Tensor


def _on_block(carried: _Carried, probe: _Probe) -> Any:
    def hook(block: Block, inputs: tuple[Tensor, LayerPosition]) -> None:
        x_BND, layer = inputs
        if layer.residual_1ND is not None:
            x_BND = x_BND + layer.residual_1ND
            carried.part_BND = layer.residual_1ND + (0 if carried.part_BND is None else carried.part_BND)
        h_BND, position_BND = block.norm1(x_BND), None
        if layer.attention_1ND is not None:
            position_BND, tokens_BND = layer.attention_1ND, h_BND
            h_BND = h_BND + position_BND
        elif carried.part_BND is not None:
            position_BND, tokens_BND = split_common_norm(block.norm1, x_BND, carried.part_BND)
        if position_BND is not None:
            ratio_BN = position_BND.norm(dim=-1) / tokens_BND.norm(dim=-1)
            probe.norm_ratio_N = ratio_BN.mean(0).cpu()
        bare_BND = h_BND if position_BND is None else h_BND - position_BND
        with_BHNN = block.attn.weights(h_BND, layer)
        without_BHNN = block.attn.weights(bare_BND, LayerPosition())
        probe.moved_N = 0.5 * (with_BHNN - without_BHNN).abs().sum(-1).mean((0, 1)).cpu()

    return hook


def _on_norm2(carried: _Carried, block: Block) -> Any:
    def hook(norm: nn.LayerNorm, inputs: tuple[Tensor]) -> None:
        if carried.part_BND is not None:
            carried.part_BND = _past_norm2(block, carried.part_BND, _deviation(inputs[0], norm.eps))

    return hook


def _deviation(x_BND: Tensor, eps: float) -> Tensor:
    """Compute what a LayerNorm divides by."""
    return (x_BND.var(-1, keepdim=True, correction=0) + eps).sqrt()


def split_common_norm(norm: nn.LayerNorm, x_BND: Tensor, w_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the shares l2 * LN(w) and l1 * LN(x - w) of LN(x), whose rest is l3 * beta (LaPE paper, eq. 6-7)."""
    tokens_BND = x_BND - w_BND
    whole = _deviation(x_BND, norm.eps)
    l1, l2 = _deviation(tokens_BND, norm.eps) / whole, _deviation(w_BND, norm.eps) / whole
    return l2 * norm(w_BND), l1 * norm(tokens_BND)


@dataclass(frozen=True, kw_only=True)
class PositionView:
    """All that a page shows of one network's position embedding."""

    label: str
    description: str
    grid: tuple[int, int]
    num_prefix: int
    correlation_LNN: Tensor | None
    bias_LHPP: Tensor | None
    rotation_LPP: Tensor | None
    strength: Strength | None = None

    @property
    def depth(self) -> int:
        found = (self.correlation_LNN, self.bias_LHPP, self.rotation_LPP)
        return max((len(part) for part in found if part is not None), default=0)

    def patch(self, token: tuple[int, int] | None) -> int:
        """Return the index among the patches of the chosen (row, column), by default the centre's."""
        row, column = token or (self.grid[0] // 2, self.grid[1] // 2)
        if not (0 <= row < self.grid[0] and 0 <= column < self.grid[1]):
            raise ValueError(
                f"token {row},{column} is not on {self.label}'s grid of {self.grid[0]} rows and {self.grid[1]} "
                f"columns; choose from 0,0 to {self.grid[0] - 1},{self.grid[1] - 1}"
            )
        return row * self.grid[1] + column

    def patch_maps(self, matrix_LPP: Tensor, patch: int) -> Tensor:
        """Return the maps (L, rows, columns) of what one patch has with every patch."""
        return matrix_LPP[:, patch].unflatten(-1, self.grid)

    def correlation_maps(self, patch: int) -> Tensor | None:
        """Return the correlation (L, rows, columns) of one patch with every patch; None without token embedding."""
        if self.correlation_LNN is None:
            return None
        return self.patch_maps(self.correlation_LNN[:, self.num_prefix :, self.num_prefix :], patch)

    @property
    def prefix(self) -> tuple[str, ...]:
        """The kinds of the tokens before the patches."""
        return ("class token", "distillation token")[: self.num_prefix]

    def prefix_maps(self) -> dict[str, Tensor]:
        """Return the correlation (L, rows, columns) of each token of `prefix` with every patch.

        It is empty without a token embedding.
        """
        if self.correlation_LNN is None:
            return {}
        return {
            name: self.correlation_LNN[:, index, self.num_prefix :].unflatten(-1, self.grid)
            for index, name in enumerate(self.prefix)
        }


def view(
    network: Network, *, label: str, description: str = "", images_BCHW: Tensor | None = None
) -> PositionView:
    """Compute all that a report shows of `network`; the strength of position only if images are given.

    Raises:
        ValueError: the network has several grids of tokens, which no report can draw yet.
    """
    if not isinstance(network, VisionTransformer):
        raise ValueError(
            f"{label} is a {type(network).__name__}, whose stages see different grids; a position report draws "
            "networks of one grid, such as DeiT, T2T-ViT and CeiT"
        )
    return PositionView(
        label=label,
        description=description,
        grid=network.grid,
        num_prefix=network.num_prefix,
        correlation_LNN=correlations(network),
        bias_LHPP=biases(network),
        rotation_LPP=rotations(network),
        strength=None if images_BCHW is None else measure_strength(network, images_BCHW),
    )
