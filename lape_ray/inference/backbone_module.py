"""A vision transformer with layer-adaptive position embedding (LaPE), for detection and segmentation.

config.json and model.safetensors lie beside this file, which needs PyTorch and safetensors alone:

    maps = Backbone(out_indices=(2, 5, 8, 11))(images)     # a list of (B, D, H / 16, W / 16), as timm's features_only

Images are floats (B, 3, H, W), normalised by `mean` and `std` of config.json.

Shapes: B images, C channels, N tokens = prefix tokens + P patches in row-major order, D width, H heads, F pairs of
channels, T tables (1, or one a layer), L layers, V tokens of a window, X windows of an image, w position embedding.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Grid = tuple[int, int]
FOLDER = Path(__file__).parent


class Backbone(nn.Module):
    """Maps images (B, 3, H, W) to feature maps (B, D, rows, columns): of blocks, or of stages where there are several.

    H and W divide by the patch size; position embeddings are resized to them.

    Args:
        img_size: side, or height and width, for which the position tables are stored and trained on (default: as they
            were trained).
        out_indices: of the blocks or stages; negative ones count from the end (default: four, evenly spaced).
        norm: whether the network's last norm is applied: to every block's map, or to the last stage's.
        drop_path_rate: stochastic depth of the last block in training; grows linearly from 0.
        folder: of config.json and model.safetensors.
        pretrained: whether model.safetensors is loaded.
    """

    def __init__(
        self,
        img_size: int | Grid | None = None,
        out_indices: tuple[int, ...] | None = None,
        *,
        norm: bool = False,
        drop_path_rate: float = 0.0,
        folder: str | Path = FOLDER,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.config = config = json.loads((Path(folder) / "config.json").read_text())
        depths, width, self.patch_size = config["depths"], config["embed_dim"], config["patch_size"]
        side = config["image_size"] // self.patch_size
        self.grid: Grid = (side, side)
        self.patch_embed = nn.Conv2d(3, width, self.patch_size, stride=self.patch_size)
        self.patch_norm = nn.LayerNorm(width, eps=config["eps"]) if config["patch_norm"] else nn.Identity()
        prefix = (torch.zeros(1, 1, width) for _ in range(config["num_prefix"]))
        self.prefix = nn.ParameterList(nn.Parameter(token) for token in prefix)
        if config["position"] == "learnable":
            tables = depths[0] if config["join"] == "unshare" else 1
            rows = config["table_prefix"] + side * side
            self.pos_embed = nn.Parameter(torch.zeros(tables, rows, width))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            Stage(config, index, side >> index, [next(rates) for _ in range(depth)])
            for index, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(width << len(depths) - 1, eps=config["eps"])
        self.outputs, self.normed = self._outputs(out_indices), norm
        doublings = [index if len(depths) > 1 else 0 for index in self.outputs]
        self.feature_info = FeatureInfo(
            [width << times for times in doublings], [self.patch_size << times for times in doublings]
        )
        if pretrained:
            self.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        if img_size is not None:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
            self._resize((height, width))

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        grid, maps = self._grid(images_BCHW.shape[-2:]), []
        x_BND = self.patch_norm(self.patch_embed(images_BCHW).flatten(2).transpose(1, 2))
        prefix = [token_11D.expand(len(x_BND), -1, -1) for token_11D in self.prefix]
        x_BND, w_TND = torch.cat([*prefix, x_BND], dim=1), self._table(grid, x_BND.device)
        for stage in self.stages:
            blocks, w_TND = stage(x_BND, w_TND, grid, len(prefix))
            x_BND = blocks[-1]
            maps += [(out_BND, grid) for out_BND in (blocks if len(self.stages) == 1 else blocks[-1:])]
            x_BND, grid = stage.merge(x_BND, grid)  # type: ignore[operator]
        return [self._map(index, *maps[index], len(prefix)) for index in self.outputs]

    def _map(self, index: int, x_BND: Tensor, grid: Grid, num_prefix: int) -> Tensor:
        if self.normed and (len(self.stages) == 1 or index == len(self.stages) - 1):
            x_BND = self.norm(x_BND)
        return x_BND[:, num_prefix:].transpose(1, 2).unflatten(2, grid).contiguous()

    def _outputs(self, out_indices: tuple[int, ...] | None) -> list[int]:
        depths = self.config["depths"]
        count = depths[0] if len(depths) == 1 else len(depths)
        default = sorted({(index + 1) * count // 4 - 1 for index in range(4)} - {-1})
        chosen = default if out_indices is None else out_indices
        if wrong := [index for index in chosen if not -count <= index < count]:
            raise ValueError(
                f"out_indices={tuple(chosen)}: {wrong[0]} is none of the {count} maps; choose from 0 on"
            )
        return [index % count for index in chosen]

    def _grid(self, size: tuple[int, ...]) -> Grid:
        height, width = size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height} x {width} pixels does not divide by patches of {self.patch_size}; pad it"
            )
        return height // self.patch_size, width // self.patch_size

    def _table(self, grid: Grid, device: torch.device) -> Tensor | None:
        """Return the (T, N, D) table of w for a grid; None: there is no table."""
        kind, width, num_prefix = (self.config[name] for name in ("position", "embed_dim", "table_prefix"))
        if kind == "none":
            return None
        if kind == "sincos1d":
            return sincos(num_prefix + grid[0] * grid[1], width, device).unsqueeze(0)
        if kind == "sincos2d":
            y, x = (sincos(count, width // 2, device) for count in grid)
            both = torch.cat((x.expand(grid[0], -1, -1), y[:, None].expand(-1, grid[1], -1)), dim=2)
            return F.pad(both.flatten(0, 1), (0, 0, num_prefix, 0)).unsqueeze(0)
        prefix, patches = self.pos_embed[:, :num_prefix], self.pos_embed[:, num_prefix:]
        return torch.cat((prefix, resize(patches, self.grid, grid)), dim=1)

    def _resize(self, img_size: Grid) -> None:
        grid = self._grid(img_size)
        if (table := self._table(grid, self.norm.weight.device)) is not None and hasattr(self, "pos_embed"):
            self.pos_embed = nn.Parameter(table.detach())
        self.grid = grid
        if self.config["window_size"] is None:
            self.stages[0].resize(grid)  # type: ignore[operator]


class FeatureInfo:
    """The channels of each map, and how many pixels one of its points stands for; read as timm's."""

    def __init__(self, channels: list[int], reduction: list[int]) -> None:
        self._channels, self._reduction = channels, reduction

    def channels(self) -> list[int]:
        return self._channels

    def reduction(self) -> list[int]:
        return self._reduction


class Stage(nn.Module):
    """Blocks on one grid, what they receive of position, and the merging before the next stage."""

    def __init__(self, config: dict[str, Any], index: int, side: int, rates: list[float]) -> None:
        super().__init__()
        self.config, depth = config, len(rates)
        self.width, self.heads = config["embed_dim"] << index, config["num_heads"] << index
        window = config["window_size"]
        self.window = None if window is None else min(window, side)
        self.extent: Grid = (self.window or side,) * 2  # the tokens that the weights of the bias are made for
        self.blocks = nn.ModuleList(Block(config, self.width, self.heads, rate) for rate in rates)
        if config["join"].startswith("lape") and config["position"] != "none":
            self.pe_norms = nn.ModuleList(PositionNorm(config, self.width) for _ in range(depth))
        offsets, keys = (2 * self.extent[0] - 1) ** 2, self.extent[0] ** 2
        if config["bias"] == "relative2d":
            self.bias_table = nn.Parameter(torch.zeros(depth, offsets, self.heads))
        if config["bias_join"] == "lape":
            self.bias_norms = nn.ModuleList(nn.LayerNorm(keys) for _ in range(depth))
        if config["rotary"] == "mixed":
            pairs = self.width // self.heads // 2
            self.frequencies = nn.Parameter(torch.zeros(depth, 2, self.heads, pairs))
        if index + 1 < len(config["depths"]):
            self.merge_norm = nn.LayerNorm(4 * self.width, eps=config["eps"])
            self.reduction = nn.Linear(4 * self.width, 2 * self.width, bias=False)

    def forward(
        self, x_BND: Tensor, w_TND: Tensor | None, grid: Grid, num_prefix: int
    ) -> tuple[list[Tensor], Tensor | None]:
        """Compute the tokens after each block, and w as it enters the next stage."""
        seen = grid if self.window is None else self.extent  # the tokens that see each other
        residuals, attentions = self._joined(w_TND, num_prefix)
        biases, rotations = self._biases(seen, num_prefix), self._rotations(seen, num_prefix, x_BND)
        outputs = []
        for index, block in enumerate(self.blocks):
            if residuals[index] is not None:
                x_BND = x_BND + residuals[index]
            x_BND = block(
                x_BND, attentions[index], biases[index], rotations[index], grid, self.window, index % 2
            )
            outputs.append(x_BND)
        w_1ND = attentions[-1] if self.config["join"] != "lape_shared" else None
        return outputs, None if w_1ND is None else self.merge(w_1ND, grid)[0]

    def merge(self, x_BND: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Make one token of each 2 x 2, after padding odd grids; as it is, where no stage follows."""
        if not hasattr(self, "reduction"):
            return x_BND, grid
        image = F.pad(x_BND.unflatten(1, grid), (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        parts = (
            image.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        )  # B, Y, X, column, row, D
        merged = self.reduction(self.merge_norm(parts.flatten(3)))
        return merged.flatten(1, 2), (merged.shape[1], merged.shape[2])

    def _joined(self, w_TND: Tensor | None, num_prefix: int) -> tuple[list[Any], list[Any]]:
        """Compute what each layer adds to the residual stream and to attention's input, (1, N, D) or None each."""
        join, depth = self.config["join"], len(self.blocks)
        nothing: list[Any] = [None] * depth
        if w_TND is None:
            return nothing, nothing
        bare = num_prefix - self.config["table_prefix"]  # prefix tokens without a row
        if not join.startswith("lape"):
            w = F.pad(w_TND, (0, 0, bare, 0))
            joined = {"basic": [w, *nothing[1:]], "share": [w] * depth, "unshare": list(w.split(1))}
            return joined[join], nothing
        attentions, w = [], w_TND
        for norm in self.pe_norms:  # w_l = LN_l(w_{l-1}): each layer reads what the layer before it read
            read = norm(w)
            attentions.append(F.pad(read, (0, 0, bare, 0)))
            w = w_TND if join == "lape_shared" else read
        return nothing, attentions

    def _biases(self, seen: Grid, num_prefix: int) -> list[Any]:
        """Compute what each layer adds to attention's logits: (1, H, N, N), or None."""
        kind, (rows, columns) = self.config["bias"], seen
        if kind == "none":
            return [None] * len(self.blocks)
        y, x = places(seen, self.blocks[0].norm1.weight.device)  # type: ignore[union-attr,arg-type]
        dy, dx = y[:, None] - y, x[:, None] - x
        if kind == "relative2d":
            old = (2 * self.extent[0] - 1, 2 * self.extent[1] - 1)
            table = resize(self.bias_table, old, (2 * rows - 1, 2 * columns - 1))
            bias = table[:, (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1].permute(0, 3, 1, 2)
        else:  # alibi2d
            slope_H = 2.0 ** (-8 * torch.arange(1, self.heads + 1, device=y.device) / self.heads)
            bias = (-slope_H[:, None, None] * torch.hypot(dy.float(), dx.float())).expand(
                len(self.blocks), -1, -1, -1
            )
        layers = list(bias.split(1))
        if self.config["bias_join"] == "lape":
            for index, norm in enumerate(self.bias_norms):
                weight, bias = (resize_keys(vector_P, self.extent, seen) for vector_P in norm.parameters())
                layers[index] = F.layer_norm(layers[index], weight.shape, weight, bias)
        return [F.pad(layer, (num_prefix, 0, num_prefix, 0)) for layer in layers]

    def _rotations(self, seen: Grid, num_prefix: int, like: Tensor) -> list[Any]:
        """Compute by what each layer turns queries and keys: cosines and sines, (H or 1, N, F) each, or None."""
        kind, depth = self.config["rotary"], len(self.blocks)
        if kind == "none":
            return [None] * depth
        if kind == "mixed":
            frequencies = self.frequencies
        else:
            width = self.width // self.heads
            fall = -torch.arange(0, width, 4, device=like.device).float() / width
            if kind == "axial":  # half of the pairs for columns, half for rows
                half = 100.0**fall
                two = torch.block_diag(half[None], half[None])
            else:  # spiral: two pairs for each of four directions, in rotation
                turn = torch.arange(width // 4, device=like.device) // 2 % 2 * math.pi / 4
                turn = torch.cat((turn, turn + math.pi / 2))
                two = (1.5 * 10_000.0**fall).repeat(2) * torch.stack((turn.cos(), turn.sin()))
            frequencies = two[None, :, None].expand(depth, -1, -1, -1)
        y, x = places(seen, like.device)
        angles = torch.einsum("lahf,ap->lhpf", frequencies, torch.stack((x, y)).float())
        return [(a.cos(), a.sin()) for a in F.pad(angles, (0, 0, num_prefix, 0))]

    def resize(self, grid: Grid) -> None:
        """Make the weights of the bias those of another grid."""
        if self.config["bias"] == "relative2d":
            old, new = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (self.extent, grid))
            self.bias_table = nn.Parameter(resize(self.bias_table, old, new).detach())
        for norm in getattr(self, "bias_norms", []):
            for name, vector_P in list(norm.named_parameters()):
                setattr(norm, name, nn.Parameter(resize_keys(vector_P, self.extent, grid).detach()))
        self.extent = grid


class PositionNorm(nn.Module):
    """LN_l of w, or the parts of it that a `lape_*` join has."""

    WEIGHTS: ClassVar = {"lape_identity": 0, "lape_norm": 0, "lape_scalar": 1, "lape_scalar_norm": 1}

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        join = config["join"]
        weights = self.WEIGHTS.get(join, width)
        self.weight = nn.Parameter(torch.ones(weights)) if weights else None
        self.bias = (
            nn.Parameter(torch.zeros(width)) if join in ("lape", "lape_shared", "lape_affine") else None
        )
        self.normalised = join not in ("lape_identity", "lape_scalar", "lape_gamma", "lape_affine")
        self.zero_rows, self.eps = config["position"] == "sincos2d", config["eps"]

    def forward(self, w: Tensor) -> Tensor:
        if self.normalised:
            if (
                self.zero_rows
            ):  # a chain of norms would send gradients of 1 / sqrt(eps) each into a row of zeros
                w = torch.where(w.var(-1, keepdim=True, correction=0) < self.eps, w.detach(), w)
            w = F.layer_norm(w, w.shape[-1:], eps=self.eps)
        w = w if self.weight is None else w * self.weight
        return w if self.bias is None else w + self.bias


class Block(nn.Module):
    """x = x + MSA(LN(x) + w); x = x + MLP(LN(x)), in windows of tokens where `window` is given."""

    def __init__(self, config: dict[str, Any], width: int, heads: int, drop_path_rate: float) -> None:
        super().__init__()
        self.residual_norm, self.rate = config["residual_norm"], drop_path_rate
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=config["eps"]) for _ in range(2))
        self.attn = Attention(width, heads, qkv_bias=config["qkv_bias"])
        hidden = int(width * config["mlp_ratio"])
        parts = {"fc1": nn.Linear(width, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(parts))
        if config["layer_scale"]:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        else:
            self.gamma_1 = self.gamma_2 = None  # type: ignore[assignment]

    def forward(
        self, x: Tensor, w: Any, bias: Any, rotation: Any, grid: Grid, window: int | None, odd: int
    ) -> Tensor:
        h = self.norm1(x) if w is None else self.norm1(x) + w
        if window is None:
            h = self.attn(h, bias, rotation)
        else:
            h = in_windows(self.attn, h, bias, rotation, grid=grid, window=window, odd=odd)
        x = x + self._dropped(h, self.gamma_1)
        if self.residual_norm:  # of Compact Transformers: on the residual stream itself
            x = self.norm2(x)
        return x + self._dropped(self.mlp(x if self.residual_norm else self.norm2(x)), self.gamma_2)

    def _dropped(self, branch: Tensor, gamma: Tensor | None) -> Tensor:
        branch = branch if gamma is None else branch * gamma
        if not self.training or self.rate == 0:
            return branch
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.rate) / (1 - self.rate)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)

    def forward(self, h_BND: Tensor, bias: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(h_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        bias = None if bias is None else bias.to(q.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


def in_windows(
    attn: Attention, h_BND: Tensor, bias: Tensor | None, rotation: Any, *, grid: Grid, window: int, odd: int
) -> Tensor:
    """Attend inside windows of a grid that is padded with zeros to whole ones, and in odd blocks first shifted."""
    shift = [window // 2 if odd and count > window else 0 for count in grid]
    image = h_BND.unflatten(1, grid)
    image = F.pad(image, (0, 0, 0, -grid[1] % window, 0, -grid[0] % window)).roll([-s for s in shift], (1, 2))
    parts = image.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    if any(shift):  # -100 for two tokens that the shift brought together from opposite borders
        y, x = (torch.arange(count, 0, -1, device=h_BND.device) for count in image.shape[1:3])  # from the end
        y, x = ((at <= window).int() + (at <= s).int() for at, s in zip((y, x), shift, strict=True))
        label = (3 * y[:, None] + x).unflatten(1, (-1, window)).unflatten(0, (-1, window))
        label_XV = label.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        mask = (label_XV[:, None, :, None] != label_XV[:, None, None, :]) * -100.0
        bias = (mask if bias is None else bias + mask).repeat(len(h_BND), 1, 1, 1)
    out = attn(parts.flatten(3, 4).flatten(0, 2), bias, rotation)
    out = out.unflatten(0, parts.shape[:3]).unflatten(3, (window, window)).transpose(2, 3)
    image = out.flatten(3, 4).flatten(1, 2).roll(shift, (1, 2))
    return image[:, : grid[0], : grid[1]].flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def resize(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize the rows of a table (T, rows x columns, D) as images are."""
    if old == new:
        return table
    image = table.unflatten(1, old).permute(0, 3, 1, 2).float()
    return F.interpolate(image, size=new, mode="bicubic").flatten(2).transpose(1, 2).to(table.dtype)


def resize_keys(vector_P: Tensor, old: Grid, new: Grid) -> Tensor:
    return resize(vector_P[None, :, None], old, new).flatten()


def places(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give the row and the column of every token, (P,) each."""
    rows, columns = (torch.arange(count, device=device) for count in grid)
    return rows.repeat_interleave(grid[1]), columns.repeat(grid[0])


def sincos(count: int, width: int, device: torch.device) -> Tensor:
    """Compute sines and cosines of an index, (count, width)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width].float().to(device)


def register(name: str = "lape_backbone") -> None:
    """Make `timm.create_model(NAME, features_only=True, ...)` build this file's `Backbone`; needs timm."""
    from timm.models import register_model

    def create(pretrained: bool = True, features_only: bool = True, **options: Any) -> Backbone:
        if not features_only:
            raise ValueError(f"{name} has no classifier; give features_only=True")
        known = {
            key: options[key]
            for key in options
            if not key.startswith("pretrained_cfg") and key != "cache_dir"
        }
        return Backbone(pretrained=pretrained, **known)

    create.__name__ = name
    register_model(create)
