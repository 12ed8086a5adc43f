"""Swin (arXiv 2103.14030): stages of blocks whose attention sees shifted windows, and a merging between stages.

Shapes: B images, N = R x R tokens of a stage in row-major order, D its width, H heads, E width of a head, M = 3 D (or
more), V = W x W tokens of a window, X = (R / W)^2 windows of an image, w position embedding (no batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lape_ray.model.block import Attention, Block, Heads
from lape_ray.model.network import Network, Stage
from lape_ray.model.position import Grid, LayerPosition, PositionEmbeddings, bias_resizers, resize_absolute
from lape_ray.model.vit import PatchEmbed


class NormedPatchEmbed(PatchEmbed):
    """Patches through one linear map and a layer norm."""

    def __init__(self, *, image_size: int, patch_size: int, embed_dim: int) -> None:
        super().__init__(image_size=image_size, patch_size=patch_size, embed_dim=embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.norm(super().forward(images_BCHW))


class WindowAttention(Attention):
    """Attention inside windows of W x W tokens, which the grid is first shifted against.

    Windows count as heads of their image, so that a bias or a mask is the same for every image.
    """

    def __init__(self, *, side: int, window: int, shift: int, **options: Any) -> None:
        super().__init__(**options)
        self.side, self.window, self.shift = side, window, shift
        mask_XVV = _border_mask(side, window, shift) if shift else None
        self.register_buffer("mask_XVV", mask_XVV, persistent=False)

    def heads(self, made_BNM: Tensor, position: LayerPosition) -> Heads:
        """Split what `project` made into windows and heads: queries, keys and values, (B, X H, V, E) each."""
        q, k, v, logits = super().heads(made_BNM, position)
        if logits is not None and logits.ndim > 4:
            logits = logits.flatten(1, 2)
        return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), logits

    def parts(self, made_BNM: Tensor, count: int) -> list[Tensor]:
        """Split into `count` parts, and each into windows and heads, (B, X, H, V, M / count / H)."""
        image = self._rolled(made_BNM.unflatten(1, (self.side, self.side)), -self.shift)
        # Rows and columns of windows and in them, the parts with their heads; one copy puts all into their places.
        parts = image.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        parts = parts.unflatten(-1, (count, self.num_heads, -1)).permute(5, 0, 1, 3, 6, 2, 4, 7)
        return list(parts.flatten(5, 6).flatten(2, 3).unbind(0))

    def mix_values(self, q: Tensor, k: Tensor, v: Tensor, logits_1HVV: Tensor | None) -> Tensor:
        """Mix the values inside each window, (B, N, H, E); a query's weights are those of its window's V keys."""
        across = self.side // self.window
        mixed = self.scaled_dot_product(q, k, v, self._logits(logits_1HVV, q.shape[1]))
        parts = mixed.unflatten(2, (self.window, self.window)).unflatten(1, (across, across, self.num_heads))
        image = parts.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return self._rolled(image, self.shift).flatten(1, 2).unflatten(2, (self.num_heads, -1))

    @staticmethod
    def _rolled(image: Tensor, shift: int) -> Tensor:
        return image.roll((shift, shift), dims=(1, 2)) if shift else image

    def _logits(self, bias: Tensor | None, heads: int) -> Tensor | None:
        """Add the windows' mask to the bias, (1, H, V, V) for all windows or (B, X H, V, V): (B or 1, X H, V, V)."""
        mask_XVV = cast("Tensor | None", self.mask_XVV)
        if mask_XVV is None:
            return None if bias is None else bias.repeat(1, heads // bias.shape[1], 1, 1)
        mask_X1VV = mask_XVV.unsqueeze(1)
        if bias is None:
            return mask_X1VV.expand(-1, self.num_heads, -1, -1).flatten(0, 1).unsqueeze(0)
        return (mask_X1VV + bias.unflatten(1, (-1, self.num_heads))).flatten(1, 2)


def _border_mask(side: int, window: int, shift: int) -> Tensor:
    """Compute -100 for two tokens of one window that the shift brought together from opposite borders, (X, V, V)."""
    place = torch.arange(side)
    region = (place >= side - window).int() + (place >= side - shift).int()
    label = (3 * region[:, None] + region[None, :]).unflatten(1, (-1, window)).unflatten(0, (-1, window))
    label_XV = label.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return torch.where(label_XV[:, :, None] == label_XV[:, None, :], 0.0, -100.0)


class WindowBlock(Block):
    """The block of ViT and LaPE, x = x + MSA(LN(x) + w); x = x + MLP(LN(x)), whose attention sees windows."""

    def __init__(self, *, side: int, window: int, shift: int, **options: Any) -> None:
        super().__init__(**options)
        self.attn = WindowAttention(
            side=side,
            window=window,
            shift=shift,
            embed_dim=options["embed_dim"],
            num_heads=options["num_heads"],
            qkv_bias=options["qkv_bias"],
            dropout=options["attention_dropout"],
        )


class PatchMerging(nn.Module):
    """2 x 2 neighbours through a layer norm and one linear map: (B, N, D) to (B, N / 4, 2 D)."""

    def __init__(self, *, side: int, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * embed_dim, eps=eps)
        self.reduction = nn.Linear(4 * embed_dim, 2 * embed_dim, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.reduction(self.norm(self.neighbours(x_BND)))

    def neighbours(self, x_BND: Tensor) -> Tensor:
        """Put each 2 x 2 neighbours into one vector, (B, N / 4, 4 D)."""
        parts = x_BND.unflatten(1, (self.side // 2, 2, self.side // 2, 2))
        return parts.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # row parity runs fastest


class SwinStage(nn.Module):
    """Blocks on one grid, what they receive of position, and the merging at the end of all stages but the last.

    Args:
        window: rows and columns of a window, on which bias and rotation are defined.
    """

    def __init__(
        self,
        *,
        blocks: Iterable[nn.Module],
        window: Grid,
        position: PositionEmbeddings,
        downsample: PatchMerging | None,
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(blocks)
        _, self.join, self.bias, self.rotary, _, self.conditional = position
        self.downsample = downsample

    def layer_positions(self, w_1ND: Tensor | None) -> list[LayerPosition]:
        """Compute what every block receives of position, with w as it enters the stage."""
        position = PositionEmbeddings(w_1ND, self.join, self.bias, self.rotary, conditional=self.conditional)
        return list(position.layers(len(self.blocks)))

    def carried(self, layers: list[LayerPosition]) -> Tensor | None:
        """Merge what the join leaves of w after the last of `layers`, as the tokens are merged; None: nothing."""
        w_1ND = None if self.join is None else self.join.carried(layers)
        return None if w_1ND is None or self.downsample is None else self.downsample(w_1ND)


class Swin(Network):
    """Swin, and Swin with LaPE, whose w passes from stage to stage through the tokens' own merging.

    Args:
        patch_embed: images (B, 3, H, W) to tokens (B, N, D).
        grid: rows and columns of the first stage's tokens.
        stages: in the order of the forward pass.
        pos_embed: the (1, N, D) table of the first stage's tokens.
        head: the mean of all normalised tokens (B, D) to logits (B, K).
    """

    def __init__(
        self,
        *,
        patch_embed: nn.Module,
        grid: Grid,
        stages: Iterable[SwinStage],
        pos_embed: Tensor | None,
        norm: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.grid, self.num_prefix = grid, 0
        self.patch_embed = patch_embed
        self.pos_embed = pos_embed
        self.layers = nn.ModuleList(stages)
        self.norm = norm
        self.head = head

    def features(self, images_BCHW: Tensor) -> Tensor:
        x_BND, positions = self.patch_embed(images_BCHW), self.layer_positions()
        for stage in self._layers():
            for block in stage.blocks:
                x_BND = block(x_BND, next(positions))
            if stage.downsample is not None:
                x_BND = stage.downsample(x_BND)
        return self.norm(x_BND).mean(dim=1)

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)

    def layer_positions(self) -> Iterator[LayerPosition]:
        found: list[LayerPosition] = []
        w_1ND = self.pos_embed
        for stage in self._layers():
            layers = stage.layer_positions(w_1ND)
            w_1ND = stage.carried(layers)
            found += layers
        return iter(found)  # the biases of windows are small

    def _layers(self) -> list[SwinStage]:
        return [cast(SwinStage, stage) for stage in self.layers]

    def stages(self) -> list[Stage]:
        rows, columns = self.grid
        return [
            Stage(stage.blocks, (rows >> index, columns >> index), stage.window, merge=stage.downsample)
            for index, stage in enumerate(self._layers())
        ]

    def position_parameters(self) -> set[str]:
        """Name what Swin's code exempts from weight decay as it does norms and biases: all tables, biases' too."""
        inside = (".bias.table.", ".rotary.", ".conditional.")
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if name == "pos_embed" or any(part in name for part in inside)}

    def resizers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        found: dict[str, Callable[[Tensor], Tensor]] = {
            "pos_embed": partial(resize_absolute, grid=self.grid, num_prefix=0)
        }
        for index, stage in enumerate(self._layers()):
            biases = bias_resizers(stage.window)
            found |= {f"layers.{index}.{name}": resize for name, resize in biases.items()}
        return found
