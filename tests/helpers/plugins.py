"""Plugins for tests: a file with one of everything, and a process that has run none."""

from __future__ import annotations

import sys
from pathlib import Path

from lape_ray.values.plugin import TrustedPlugin

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "my_positions.py"
EVERYTHING = '''\
from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lape_ray.model.position import LayerPosition
from lape_ray.model.position.absolute import AbsoluteKind
from lape_ray.model.position.content import ContentBias
from lape_ray.model.position.join import Join
from lape_ray.model.position.relative import Bias
from lape_ray.model.position.rotary import Rotary


def ramp(layout, tables, std):
    rows = np.linspace(0, 1, layout.num_tokens * layout.embed_dim, dtype=np.float32)
    return torch.from_numpy(rows).view(1, layout.num_tokens, -1).repeat(tables, 1, 1)


def normal(layout, tables, std):
    return torch.randn(tables, layout.num_tokens, layout.embed_dim)


class Pointwise(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.proj = nn.Linear(layout.embed_dim, layout.embed_dim)

    def forward(self, x_BND):
        return self.proj(x_BND)


class Late(Join):
    """Nothing in the first layer; in the last, the table scaled."""

    def __init__(self, layout, kind, *, eps):
        super().__init__(layout, kind, eps=eps)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, w_TND):
        return [LayerPosition()] * (self.depth - 1) + [LayerPosition(residual_1ND=self.gain * w_TND)]


class Constant(Bias):
    def __init__(self, layout, *, std=0.0):
        super().__init__(layout, std=std)
        self.patches = layout.num_patches
        self.row_LHP = nn.Parameter(torch.randn(layout.depth, layout.num_heads, layout.num_patches))

    def forward(self, layers):
        return self.row_LHP[layers].unsqueeze(-2).expand(-1, -1, self.patches, -1)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, bias_1HPP):
        return self.gain * bias_1HPP


def scales(layout):
    return nn.ModuleList(Scale() for _ in range(layout.depth))


class Logits(nn.Module):
    def __init__(self, layout):
        super().__init__()
        window = layout.num_prefix + layout.num_patches
        self.keys_EN = nn.Parameter(torch.randn(layout.head_dim, window))

    def forward(self, q_NE):
        return q_NE @ self.keys_EN


class Contextual(ContentBias):
    field, layer = "contextual", Logits


class Slow(Rotary):
    def __init__(self, layout):
        super().__init__(layout)
        self.frequency_L2HF = nn.Parameter(
            torch.rand(layout.depth, 2, layout.num_heads, layout.head_dim // 2)
        )

    def frequencies(self):
        return self.frequency_L2HF


ABSOLUTES = {
    "ramp": AbsoluteKind(trained=False, zero_prefix=False, make=ramp),
    "normal": AbsoluteKind(trained=True, zero_prefix=False, make=normal),
}
CONDITIONALS = {"pointwise": Pointwise}
JOINS: dict[str, type[Join]] = {"late": Late}
BIASES = {"constant": Constant}
BIAS_JOINS = {"scaled": scales}
CONTENT_BIASES = {"keyed": Contextual}
ROTARIES = {"slow": Slow}
'''


def forget() -> None:
    """Take back what plugins have added in this process, as if they had never been run."""
    module = sys.modules.get("lape_ray.model.plugin")  # torch is not imported for this
    if module is None:
        return
    for plugin in module._loaded.values():
        for table, names in plugin.tables.items():
            for added in (table, "STAGED_JOINS", "PREFIX_JOINS") if table == "JOINS" else (table,):
                for name in names:
                    getattr(module.position, added).pop(name, None)
    module._loaded.clear()


def written(folder: Path, text: str, name: str = "mine.py") -> TrustedPlugin:
    """Write a plugin's file, and read it as the command line does."""
    (folder / name).write_text(text)
    return TrustedPlugin.read(str(folder / name))
