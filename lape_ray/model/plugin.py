"""A user's own position embeddings and joins: their file is run, if it is trusted, and what it makes is checked.

Shapes: N tokens = prefix tokens + patches, V the same of a window (the grid, but in Swin), D width, H heads, E = D / H.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lape_ray.config import ModelConfig
from lape_ray.model.block import Block
from lape_ray.model.network import Network, Stage
from lape_ray.model.position import (
    ABSOLUTES,
    BIAS_JOINS,
    BIASES,
    CONDITIONALS,
    CONTENT_BIASES,
    JOINS,
    PREFIX_JOINS,
    ROTARIES,
    STAGED_JOINS,
    LayerPosition,
)
from lape_ray.model.position.absolute import AbsoluteKind
from lape_ray.model.position.content import ContentBias
from lape_ray.model.position.join import Join
from lape_ray.model.position.relative import Bias
from lape_ray.model.position.rotary import Rotary
from lape_ray.values.plugin import Plugin, TrustedPlugin, refusal

DOCS = "docs/positions.md says what it must be"
_TABLES: dict[str, dict[str, Any]] = {
    "ABSOLUTES": ABSOLUTES, "CONDITIONALS": CONDITIONALS, "JOINS": JOINS, "BIASES": BIASES,
    "BIAS_JOINS": BIAS_JOINS, "CONTENT_BIASES": CONTENT_BIASES, "ROTARIES": ROTARIES,
}  # fmt: skip
_KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "CONDITIONALS": (nn.Module, ("forward",)),
    "JOINS": (Join, ("forward",)),
    "BIASES": (Bias, ("forward",)),
    "CONTENT_BIASES": (ContentBias, ("field", "layer")),
    "ROTARIES": (Rotary, ("frequencies",)),
}
"""The class that those of a dict extend, and what it leaves open."""
_loaded: dict[str, Plugin] = {}
"""The plugins that this process has run, by sha256."""


def load(plugin: Plugin | None) -> None:
    """Run a plugin and enter what it adds, once in a process.

    Raises:
        ValueError: it is not trusted, fails, adds something of another kind, or a name that another one has added.
    """
    if plugin is None or plugin.sha256 in _loaded:
        return
    if not isinstance(plugin, TrustedPlugin):
        raise ValueError(refusal(plugin))
    for table, names in plugin.tables.items():
        for name, line in names.items():
            if name in _TABLES[table]:
                raise ValueError(
                    f"{plugin.name}, line {line}: {name} is that of another text already, which this process has run "
                    f"({', '.join(map(str, _loaded.values()))}); give it another name, or start one command for each"
                )
    module = _run(plugin)
    for table in plugin.tables:
        _check_entries(plugin, table, getattr(module, table))
    for table in plugin.tables:
        _TABLES[table].update(getattr(module, table))
    for name in plugin.names("join"):
        STAGED_JOINS.update({name: JOINS[name]} if JOINS[name].staged else {})
        PREFIX_JOINS.update({} if JOINS[name].pooled else {name: JOINS[name]})
    _loaded[plugin.sha256] = plugin


def _run(plugin: Plugin) -> types.ModuleType:
    """Run the text as a module of its own, which tracebacks and torch.compile find."""
    module = types.ModuleType(f"lape_ray_plugin_{plugin.sha256[:16]}")
    if plugin.version:  # of an installed package, whose other modules it may import
        module.__package__ = plugin.name.rpartition(".")[0]
    linecache.cache[plugin.name] = (len(plugin.text), None, plugin.text.splitlines(True), plugin.name)
    sys.modules[module.__name__] = module
    try:
        with told(plugin):
            exec(compile(plugin.text, plugin.name, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _check_entries(plugin: Plugin, table: str, entries: Any) -> None:
    """Refuse what is not of the kind that a dict holds."""
    names = plugin.tables[table]
    if not isinstance(entries, dict) or entries.keys() != names.keys():
        raise ValueError(f"{plugin.name}: {table} is not the dict that is written there; leave it as it is")
    for name, line in names.items():
        entry, place = entries[name], f"{plugin.name}, line {line}: {table}[{name!r}]"
        if table not in _KINDS:
            right, kind = (
                (isinstance(entry, AbsoluteKind), "an AbsoluteKind")
                if table == "ABSOLUTES"
                else (callable(entry), "a function")
            )
            if not right:
                raise ValueError(f"{place} is {entry!r} and not {kind}; {DOCS}")
            continue
        base, open_parts = _KINDS[table]
        if not (isinstance(entry, type) and issubclass(entry, base)):
            raise ValueError(f"{place} is {entry!r} and no class that extends {base.__name__}; {DOCS}")
        for part in open_parts:
            if getattr(entry, part, None) is getattr(base, part, None):
                raise ValueError(f"{place}: the class {entry.__name__} lacks {part!r}; {DOCS}")


@contextlib.contextmanager
def told(plugin: Plugin, passing: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Turn an error of the plugin's code into a ValueError with its line, and one that it causes elsewhere, too.

    Args:
        passing: errors that pass as they are where none of the plugin's lines is part of them.
    """
    try:
        yield
    except Exception as error:
        lines = [
            line
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename == plugin.name
        ]
        if not lines and isinstance(error, passing):
            raise
        place = f"{plugin.name}, line {lines[-1]}" if lines else plugin.name
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{error}; {DOCS}") from error


def build_checked(plugin: Plugin, build: Callable[[], Network]) -> Network:
    """Build a network whose names may be the plugin's, and compare what its blocks receive with their sizes."""
    load(plugin)
    with told(plugin, ValueError):
        network = build()
    with told(plugin), torch.no_grad():
        _check_network(network)
    return network


def _check_network(network: Network) -> None:
    layers, number = network.layer_positions(), 0
    for stage in network.stages():
        for block in stage.blocks:
            assert isinstance(block, Block)
            if number == len(layers):
                raise ValueError(f"there are {number} LayerPositions for more layers")
            _check_layer(layers[number], f"layer {number}", network, stage, block)
            number += 1
    if number < len(layers):
        raise ValueError(f"there are {len(layers)} LayerPositions for {number} layers")
    join = getattr(network, "join", None)
    if join is not None and network.pos_embed is not None:
        w_1ND, rows = join.behind(network.pos_embed), layers[0]
        expected = (1, network.pos_embed.shape[1], network.pos_embed.shape[2])
        if w_1ND is not None and tuple(w_1ND.shape) != expected:
            raise ValueError(f"behind() gives {tuple(w_1ND.shape)}, not {expected} as {rows._fields[0]} has")


def _check_layer(layer: LayerPosition, place: str, network: Network, stage: Stage, block: Block) -> None:
    """Compare the shapes of what a block receives with what it needs, which broadcasting could hide."""
    prefix, heads = network.num_prefix, block.attn.num_heads
    tokens, seen = (prefix + rows * columns for rows, columns in (stage.grid, stage.window))
    width = block.norm1.normalized_shape[0]
    like = next(network.parameters())
    x_1ND, q_1HVE = like.new_zeros(1, tokens, width), like.new_zeros(1, heads, seen, width // heads)
    logits_1HVV = (1, heads, seen, seen)
    found: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("residual_1ND", layer.residual_1ND, (1, tokens, width)),
        ("attention_1ND", layer.attention_1ND, (1, tokens, width)),
        ("logits_1HNN", layer.logits_1HNN, logits_1HVV),
    ]
    if layer.conditional is not None:
        found.append(("what conditional gives", layer.conditional(x_1ND), (1, tokens, width)))
    if layer.contextual is not None:
        found.append(("what contextual gives", layer.contextual(q_1HVE), logits_1HVV))
    if layer.channels is not None:
        made = layer.channels.rows() @ x_1ND[0, 0]
        q, k = layer.channels.extend(q_1HVE, q_1HVE, made.view(1, heads, 1, -1).expand(-1, -1, seen, -1))
        found.append(("the keys that channels give", k, tuple(q.shape)))
    for part in layer.rotation or ():
        half = (seen, width // heads // 2)
        found.append(
            ("a part of rotation", part, (part.shape[0] if part.shape[0] in (1, heads) else heads, *half))
        )
    for what, tensor, expected in found:
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{place}: {what} is {tuple(tensor.shape)}, not {expected}")


def dry_device(config: ModelConfig) -> str:
    """Return the device on which a network is built to be checked: without memory, but for a plugin's code.

    That may read values of tensors, which "meta" has not.
    """
    return "meta" if config.plugin is None else "cpu"
