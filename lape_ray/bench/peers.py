"""Contenders of `compare`: our network and its peers, all with the same weights, under the same loop.

Shapes: B images, N tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.acceleration import compiled
from lape_ray.bench.synthetic import synthetic_state
from lape_ray.config import Compile, TrainConfig, replace_fields
from lape_ray.model import VisionTransformer, build_model, resolve
from lape_ray.model.block import Block, LayerPosition
from lape_ray.model.convert import load_weights
from lape_ray.optim import Ema, build_optimizer
from lape_ray.state import TrainState

BASIC, LAPE, AGAIN, EXPLICIT = "lape_ray basic", "lape_ray LaPE", "lape_ray basic, again", "explicit softmax"
TIMM, TORCHVISION = "timm", "torchvision (no drop path)"
PEERS = (TIMM, TORCHVISION)

_TORCHVISION_NAMES = (
    (re.compile(r"^cls_token$"), "class_token"),
    (re.compile(r"^pos_embed$"), "encoder.pos_embedding"),
    (re.compile(r"^patch_embed\.proj\."), "conv_proj."),
    (re.compile(r"^norm\."), "encoder.ln."),
    (re.compile(r"^head\."), "heads.head."),
    (re.compile(r"^blocks\.(\d+)\."), r"encoder.layers.encoder_layer_\1."),
    (re.compile(r"\.norm([12])\."), r".ln_\1."),
    (re.compile(r"\.attn\.qkv\."), ".self_attention.in_proj_"),
    (re.compile(r"\.attn\.proj\."), ".self_attention.out_proj."),
    (re.compile(r"\.mlp\.fc1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.fc2\."), ".mlp.3."),
)


def torchvision_name(name: str) -> str:
    """What torchvision calls the parameter that we and timm call `name`."""
    for pattern, replacement in _TORCHVISION_NAMES:
        name = pattern.sub(replacement, name)
    return name


class ExplicitBlock(Block):
    """A block as DeiT's code writes it: all that it computes is kept for backward, (B, H, N, N) too."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.drop_path = block.drop_path

    def forward(self, x_BND: Tensor, position: LayerPosition, first: int | None = None) -> Tensor:
        if position.residual_1ND is not None:
            x_BND = x_BND + position.residual_1ND
        x_BND = x_BND + self.drop_path(self._attended(self.norm1(x_BND)))
        return x_BND + self.drop_path(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x_BND)))))

    def _attended(self, x_BND: Tensor) -> Tensor:
        attn = self.attn
        qkv_3BHNE = attn.qkv(x_BND).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHNE, k_BHNE, v_BHNE = qkv_3BHNE.unbind(0)
        logits_BHNN = (q_BHNE @ k_BHNE.transpose(-2, -1)) * q_BHNE.shape[-1] ** -0.5
        out_BHNE = logits_BHNN.softmax(dim=-1) @ v_BHNE
        return attn.proj(out_BHNE.transpose(1, 2).flatten(2))


def _explicit(config: TrainConfig) -> nn.Module:
    network = _ours(config)
    network.blocks = nn.ModuleList(ExplicitBlock(cast(Block, block)) for block in network.blocks)
    return network


def _ours(config: TrainConfig) -> VisionTransformer:
    """Made with the run's seed, as `build_state` makes it: every contender starts from these weights."""
    torch.manual_seed(config.run.seed)
    return build_model(config.model)


def _timm(config: TrainConfig) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer as Timm

    spec = resolve(config.model)
    network: nn.Module = Timm(
        img_size=spec.image_size, patch_size=spec.patch_size, embed_dim=spec.embed_dim, depth=spec.depth,
        num_heads=spec.num_heads, mlp_ratio=spec.mlp_ratio, num_classes=spec.num_classes,
        drop_path_rate=spec.drop_path,
    )  # fmt: skip
    network.load_state_dict(_ours(config).state_dict())
    load_weights(_ours(config), network.state_dict())  # and back: the names and sizes are one and the same
    return network


def _torchvision(config: TrainConfig) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer as Torchvision

    spec = resolve(config.model)
    network: nn.Module = Torchvision(
        image_size=spec.image_size, patch_size=spec.patch_size, num_layers=spec.depth,
        num_heads=spec.num_heads, hidden_dim=spec.embed_dim, mlp_dim=int(spec.embed_dim * spec.mlp_ratio),
        num_classes=spec.num_classes,
    )  # fmt: skip
    ours = _ours(config).state_dict()
    network.load_state_dict({torchvision_name(name): value for name, value in ours.items()})
    return network


_MAKERS: dict[str, Callable[[TrainConfig], nn.Module]] = {
    BASIC: _ours,
    AGAIN: _ours,
    LAPE: _ours,
    EXPLICIT: _explicit,
    TIMM: _timm,
    TORCHVISION: _torchvision,
}


@dataclass(frozen=True)
class Arm:
    """A contender: whose network, and whether it is compiled."""

    kind: str
    compile: Compile = "off"

    @property
    def name(self) -> str:
        return f"{self.kind}, {'eager' if self.compile == 'off' else 'compiled'}"

    def config(self, base: TrainConfig) -> TrainConfig:
        join = "lape" if self.kind == LAPE else "basic"
        return replace_fields(base, {"model.join": join, "run.compile": self.compile})

    def network(self, base: TrainConfig) -> nn.Module:
        """The network, not compiled, on the CPU.

        Raises:
            ImportError: its package is not installed.
        """
        return _MAKERS[self.kind](self.config(base))

    def parameter_name(self, name: str) -> str:
        """What this network calls the parameter that ours calls `name`."""
        return torchvision_name(name) if self.kind == TORCHVISION else name


def arm_state(arm: Arm, base: TrainConfig, device: torch.device) -> TrainState:
    """The loop's state with the arm's network in it: everything but the network is the same for all arms."""
    config = arm.config(base)
    if arm.kind in (BASIC, AGAIN, LAPE):
        return synthetic_state(config, device)
    network = arm.network(base).to(device)
    state = synthetic_state(replace_fields(config, {"run.compile": "off"}), device)
    model, note = compiled(network, config.run, device)
    exempt = {arm.parameter_name(name) for name in state.network.position_parameters()}
    return dataclasses.replace(
        state,
        config=config,
        network=cast(VisionTransformer, network),  # the loop asks it for parameters only
        model=model,
        ema=Ema(network, config.optim.ema_decay) if config.optim.ema_decay else None,
        optimizer=build_optimizer(network, config.optim, exempt=exempt),
        notes=(note,) if note else (),
    )
