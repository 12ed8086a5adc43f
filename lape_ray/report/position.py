"""The position embedding of a network as attention sees it, layer by layer.

The functions are pure: of weights and images.

The chain of embeddings is the network's own (`Network.layer_positions`); nothing is computed a second way. A network of
several stages is shown stage by stage, each on its grid.

Shapes: L layers, B images, H heads, N tokens = prefix tokens + P patches in row-major order, D width, F pairs of
channels.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lape_ray.model import Network
from lape_ray.model.block import Block
from lape_ray.model.compact import ResidualNormBlock
from lape_ray.model.position import Grid, LayerPosition
from lape_ray.model.swin import PatchMerging


def cosine(rows_ND: Tensor) -> Tensor:
    """Compute the (N, N) cosine similarity of every pair of rows (LaPE paper, eq. 12); NaN where a row is all zeros."""
    norm_N1 = rows_ND.norm(dim=-1, keepdim=True)
    unit_ND = torch.where(norm_N1 > 0, rows_ND / norm_N1, torch.nan)
    return (unit_ND @ unit_ND.T).clamp(-1, 1)


def seen_by_attention(network: Network) -> list[Tensor] | None:
    """Compute the (N, D) position embedding as each layer's attention reads it; None without a token embedding.

    A join that gives attention its own summand (LaPE) is read as it is: LN_w,l(w_{l-1}). A join that adds to the
    residual stream passes the layer's common LayerNorm, where its share is l2 * LN_l(w) (eq. 6-7); w is all that was
    added so far. l2 depends on the image but is a positive factor of a row, which no cosine sees: it is left out. It is
    left out of the norm of a merging of stages too, which then puts four such rows into one: what later stages see is
    that of an image whose tokens all have the same deviation.

    Raises:
        ValueError: position is added to the stream of Compact Transformers more than once. Their blocks normalise that
            stream, so that how much each addition counts depends on the image.
    """
    if network.pos_embed is None:
        return None
    seen: list[Tensor] = []
    carried: Tensor | None = None
    with torch.no_grad():
        layers = iter(network.layer_positions())
        for stage in network.stages():
            for block, layer in zip(stage.blocks, itertools.islice(layers, len(stage.blocks)), strict=True):
                assert isinstance(block, Block)
                if layer.residual_1ND is not None:
                    if seen and isinstance(block, ResidualNormBlock):
                        raise ValueError(
                            "position is added before every block of a Compact Transformer, whose blocks normalise the "
                            "sum: its share depends on the image and has no map; report joins basic, lape, lape_shared"
                        )
                    carried = layer.residual_1ND if carried is None else carried + layer.residual_1ND
                if layer.attention_1ND is not None:
                    seen.append(layer.attention_1ND[0])
                elif carried is not None:
                    seen.append(block.norm1(carried)[0])
                else:  # a plugin's join may begin later
                    tokens = network.num_prefix + stage.grid[0] * stage.grid[1]
                    seen.append(torch.zeros(tokens, len(block.norm1.weight)))
                carried = None if carried is None else _past_norm2(block, carried, 1.0)
            if carried is not None and stage.merge is not None:
                carried = _past_merging(stage.merge, carried, 1.0)
    return seen


def _past_norm2(block: Block, carried_BND: Tensor, scale: Tensor | float) -> Tensor:
    """Return what the block leaves of a summand in the stream.

    That is all of it, or its share where a norm sits on the stream. `scale` is the stream's standard deviation before
    that norm.
    """
    return _share(block.norm2, carried_BND, scale) if isinstance(block, ResidualNormBlock) else carried_BND


def _past_merging(merge: nn.Module, carried_BND: Tensor, scale: Tensor | float) -> Tensor:
    """Return what merging makes of a summand in the stream; `scale` is as of `_past_norm2`."""
    assert isinstance(merge, PatchMerging)
    merged: Tensor = merge.reduction(_share(merge.norm, merge.neighbours(carried_BND), scale))
    return merged


def _share(norm: nn.LayerNorm, part_BND: Tensor, scale: Tensor | float) -> Tensor:
    return norm.weight * (part_BND - part_BND.mean(-1, keepdim=True)) / scale


Maps = list[Tensor] | list[None]
"""A tensor for each stage, or for each that it has none."""


def _by_stage(network: Network, layers: Sequence[Tensor] | None) -> Maps:
    """Stack what the layers have, for each stage."""
    stages = network.stages()
    if not layers:
        return [None] * len(stages)
    rest = iter(layers)
    return [torch.stack(list(itertools.islice(rest, len(stage.blocks)))) for stage in stages]


def correlations(network: Network) -> Maps:
    """Compute the (L, N, N) cosine similarity of the position embedding's rows as each layer of a stage sees them."""
    seen = seen_by_attention(network)
    return _by_stage(network, None if seen is None else [cosine(rows_ND.float()) for rows_ND in seen])


def biases(network: Network) -> Maps:
    """Compute the (L, H, P, P) that are added to attention's logits for each query (row) and key (column) patch.

    NaN stands for a key that the query cannot see.
    """
    prefix = network.num_prefix
    with torch.no_grad():
        layers = [layer.logits_1HNN for layer in network.layer_positions()]
    shown = [bias[0, :, prefix:, prefix:] for bias in layers if bias is not None]
    return _by_stage(network, [bias.masked_fill(bias.isneginf(), torch.nan) for bias in shown])


def rotations(network: Network) -> Maps:
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
    return _by_stage(network, found)


@dataclass(frozen=True, kw_only=True)
class Strength:
    """The strength with which each layer uses position, for each query token, as means over images (and heads)."""

    norm_ratio_LN: Tensor | None
    """Length of attention's input that is position over length that is token: |l2 LN(w)| / |l1 LN(x)| of eq. 7, or
    |w_l| / |LN_x(x)| with LaPE. None where nothing is added to tokens."""
    moved_LN: Tensor
    """Share of a query's attention, 0 to 1, that goes elsewhere when the layer gets no position (total variation)."""


def measure_strength(network: Network, images_BCHW: Tensor) -> list[Strength]:
    """Run normalised images through the network in evaluation mode and see what position does, for each stage."""
    stages = network.stages()
    probes = [[_Probe() for _ in stage.blocks] for stage in stages]
    carried = _Carried()
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for stage, own in zip(stages, probes, strict=True):
            for block, probe in zip(stage.blocks, own, strict=True):
                assert isinstance(block, Block)
                stack.callback(block.register_forward_pre_hook(_on_block(carried, probe)).remove)
                if probe is not probes[-1][-1]:  # after which nothing reads what it carries
                    stack.callback(block.norm2.register_forward_pre_hook(_on_norm2(carried, block)).remove)
            if stage.merge is not None:
                stack.callback(stage.merge.register_forward_pre_hook(_on_merging(carried)).remove)
        was_training = network.training
        network.eval()(images_BCHW)
        network.train(was_training)
    return [
        _strength([probe.norm_ratio_N for probe in own], [probe.moved_N for probe in own]) for own in probes
    ]


def _strength(ratios: Sequence[Tensor | None], moved: Sequence[Tensor]) -> Strength:
    found = [ratio_N for ratio_N in ratios if ratio_N is not None]
    if found:  # before the first addition nothing is position
        found = [torch.zeros_like(found[0]) if ratio_N is None else ratio_N for ratio_N in ratios]
    return Strength(norm_ratio_LN=torch.stack(found) if found else None, moved_LN=torch.stack(list(moved)))


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
        entered_BND = layer.enter(x_BND)
        if layer.residual_1ND is not None or layer.conditional is not None:
            added_BND = entered_BND - x_BND if layer.residual_1ND is None else layer.residual_1ND
            carried.part_BND = added_BND + (0 if carried.part_BND is None else carried.part_BND)
        x_BND = entered_BND
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


def _on_merging(carried: _Carried) -> Any:
    def hook(merge: PatchMerging, inputs: tuple[Tensor]) -> None:
        if carried.part_BND is not None:  # else it may be w that is merged
            scale = _deviation(merge.neighbours(inputs[0]), merge.norm.eps)
            carried.part_BND = _past_merging(merge, carried.part_BND, scale)

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
    """All that a page shows of one network's position embedding, or of one of its stages.

    Attributes:
        grid: rows and columns of patches
        window: rows and columns of those that see each other, on which bias and rotation are defined; None: the grid
        stride: patches of the network's first grid along a side of one of these
        first_layer: the network's layers before these
        by_image: whether a part of the network's position depends on the image, and so has no map
    """

    label: str
    description: str
    grid: Grid
    num_prefix: int
    correlation_LNN: Tensor | None
    bias_LHPP: Tensor | None
    rotation_LPP: Tensor | None
    strength: Strength | None = None
    window: Grid | None = None
    stride: int = 1
    first_layer: int = 0
    by_image: bool = False

    @property
    def mapped(self) -> bool:
        """Tell whether there is a map to draw."""
        found = (self.correlation_LNN, self.bias_LHPP, self.rotation_LPP)
        return any(part is not None for part in found)

    @property
    def shown(self) -> bool:
        """Tell whether there is anything to show: a map, or the strength of what has none."""
        return self.mapped or (self.by_image and self.strength is not None)

    def patch(self, token: tuple[int, int] | None) -> int:
        """Return the index among the patches of the one that holds (row, column) of the network's first grid.

        By default it is the centre's.
        """
        rows, columns = (side * self.stride for side in self.grid)
        row, column = token or (rows // 2, columns // 2)
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(
                f"token {row},{column} is not on {self.label}'s grid of {rows} rows and {columns} "
                f"columns; choose from 0,0 to {rows - 1},{columns - 1}"
            )
        return row // self.stride * self.grid[1] + column // self.stride

    def place_in_window(self, token: tuple[int, int] | None) -> tuple[int, int]:
        """Return the (row, column) of that patch in its window (of a block that shifts none); by default the centre."""
        rows, columns = self.window or self.grid
        if token is None:
            return rows // 2, columns // 2
        row, column = divmod(self.patch(token), self.grid[1])
        return row % rows, column % columns

    def window_maps(self, matrix_LPP: Tensor, token: tuple[int, int] | None) -> Tensor:
        """Return the maps (L, rows, columns) of what one patch has with every patch of its window."""
        row, column = self.place_in_window(token)
        window = self.window or self.grid
        return matrix_LPP[:, row * window[1] + column].unflatten(-1, window)

    def correlation_maps(self, patch: int) -> Tensor | None:
        """Return the correlation (L, rows, columns) of one patch with every patch; None without token embedding."""
        if self.correlation_LNN is None:
            return None
        prefix = self.num_prefix
        return self.correlation_LNN[:, prefix + patch, prefix:].unflatten(-1, self.grid)

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


def views(
    network: Network, *, label: str, description: str = "", images_BCHW: Tensor | None = None
) -> list[PositionView]:
    """Compute all that a report shows of each stage of `network`; the strength of position only if images are given."""
    stages = network.stages()
    depths = [len(stage.blocks) for stage in stages]
    strengths = [None] * len(stages) if images_BCHW is None else measure_strength(network, images_BCHW)
    with torch.no_grad():
        by_image = any(layer.depends_on_image for layer in network.layer_positions())
    maps = zip(correlations(network), biases(network), rotations(network), strengths, strict=True)
    return [
        PositionView(
            label=label if len(stages) == 1 else f"{label}, stage {index + 1}",
            description=description,
            grid=stage.grid,
            num_prefix=network.num_prefix,
            correlation_LNN=correlation,
            bias_LHPP=bias,
            rotation_LPP=rotation,
            strength=strength,
            window=stage.window,
            stride=stages[0].grid[0] // stage.grid[0],
            first_layer=sum(depths[:index]),
            by_image=by_image,
        )
        for index, (stage, (correlation, bias, rotation, strength)) in enumerate(
            zip(stages, maps, strict=True)
        )
    ]
