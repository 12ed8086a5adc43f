"""Run a user's own file of position embeddings and joins, if it is trusted, and check what it makes.

Shapes: N tokens = prefix tokens + patches, V the same of a window (the grid, but in Swin), D width, H heads, E = D / H.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from lape_ray.config import ModelConfig
from lape_ray.model import position
from lape_ray.model.block import Block
from lape_ray.model.network import Network, Stage
from lape_ray.model.position import JOINS, PREFIX_JOINS, STAGED_JOINS, LayerPosition
from lape_ray.model.position.absolute import AbsoluteKind
from lape_ray.model.position.content import ContentBias
from lape_ray.model.position.join import Join
from lape_ray.model.position.relative import Bias
from lape_ray.model.position.rotary import Rotary
from lape_ray.values.plugin import TABLES, Plugin, TrustedPlugin, refusal

DOCS = "docs/positions.md says what it must be"
_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ABSOLUTES": (AbsoluteKind, ()),
    "CONDITIONALS": (nn.Module, ("forward",)),
    "JOINS": (Join, ("forward",)),
    "BIASES": (Bias, ("forward",)),
    "BIAS_JOINS": (Callable, ()),
    "CONTENT_BIASES": (ContentBias, ("field", "layer")),
    "ROTARIES": (Rotary, ("frequencies",)),
}
"""What the dicts hold: objects of a kind; or classes that extend it, with what it leaves open."""
_loaded: dict[str, Plugin] = {}
"""The plugins that this process has run, by identity."""


def load(plugin: Plugin | None) -> None:
    """Run a plugin and enter what it adds, once in a process.

    Raises:
        ValueError: it is not trusted, fails, adds something of another kind, or a name that another one has added.
    """
    if plugin is None or plugin.identity in _loaded:
        return
    if not isinstance(plugin, TrustedPlugin):
        raise ValueError(refusal(plugin))
    for of, tables in TABLES.items():
        known = {name for table in tables for name in getattr(position, table)}
        for name, line in plugin.names(of).items():
            if name in known:  # in any dict of the field: a network looks into all of them
                raise ValueError(
                    f"{plugin.name}, line {line}: {name} is that of another text already, which this process has run "
                    f"({', '.join(map(str, _loaded.values()))}); give it another name, or start one command for each"
                )
    module = _run(plugin)
    for table in plugin.tables:
        _check_entries(plugin, table, getattr(module, table))
    for table in plugin.tables:
        getattr(position, table).update(getattr(module, table))
    own = {name: JOINS[name] for name in plugin.names("join")}
    STAGED_JOINS.update({name: join for name, join in own.items() if join.staged})
    PREFIX_JOINS.update({name: join for name, join in own.items() if not join.pooled})
    _loaded[plugin.identity] = plugin


def _run(plugin: Plugin) -> types.ModuleType:
    """Run the text as a module of its own, which tracebacks and torch.compile find."""
    module = types.ModuleType(f"lape_ray_plugin_{plugin.sha256[:16]}")
    if plugin.version:  # of an installed package, whose other modules it may import
        module.__package__ = plugin.name.rpartition(".")[0]
    linecache.cache[plugin.name] = (len(plugin.text), None, plugin.text.splitlines(True), plugin.name)
    sys.modules[module.__name__] = module
    with told(plugin):
        exec(compile(plugin.text, plugin.name, "exec", dont_inherit=True), module.__dict__)
    return module


def _check_entries(plugin: Plugin, table: str, entries: Any) -> None:
    """Refuse what is not of the kind that a dict holds."""
    names, (kind, parts) = plugin.tables[table], _KINDS[table]
    if not isinstance(entries, dict) or entries.keys() != names.keys():
        raise ValueError(f"{plugin.name}: {table} is not the dict that is written there; leave it as it is")
    for name, line in names.items():
        entry, place = entries[name], f"{plugin.name}, line {line}: {table}[{name!r}]"
        extends = isinstance(entry, type) and issubclass(entry, kind) if parts else isinstance(entry, kind)
        if not extends:
            what = f"a class that extends {kind.__name__}" if parts else f"of the kind {kind.__name__}"
            raise ValueError(f"{place} is {entry!r} and not {what}; {DOCS}")
        for part in parts:
            if getattr(entry, part, None) is getattr(kind, part, None):
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
        calls = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in calls if frame.f_code.co_filename == plugin.name]
        if not lines and isinstance(error, passing):
            raise
        place = f"{plugin.name}, line {lines[-1]}" if lines else plugin.name
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{error}; {DOCS}") from error


def dry_device(config: ModelConfig) -> str:
    """Return the device to build a network on that is only checked: a plugin may read values, which "meta" lacks."""
    return "meta" if config.plugin is None else "cpu"


def build_checked(plugin: Plugin, build: Callable[[], Network]) -> Network:
    """Build a network whose names may be the plugin's, and compare what its blocks receive with their sizes."""
    load(plugin)
    with told(plugin, ValueError):
        network = build()
    with told(plugin), torch.no_grad(), _evaluating(network):
        blocks = [(stage, block) for stage in network.stages() for block in stage.blocks]
        for number, (layer, block) in enumerate(zip_longest(network.layer_positions(), blocks)):
            if layer is None or block is None:
                many = "fewer" if layer is None else "more"
                raise ValueError(f"it gives {many} LayerPositions than there are layers ({len(blocks)})")
            for what, found, expected in _shapes(network, layer, *block):
                if tuple(found) != expected:  # broadcasting could hide it
                    raise ValueError(f"layer {number}: {what} is {tuple(found)}, not {expected}")
    return network


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Let a network evaluate: a BatchNorm, say, must not take the zeros of a check for images."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _shapes(
    network: Network, layer: LayerPosition, stage: Stage, block: nn.Module
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield what a block receives, its shape, and the one that it must have."""
    assert isinstance(block, Block)
    heads, head_dim, width = block.attn.num_heads, block.attn.head_dim, len(block.norm1.weight)
    tokens, seen = (network.num_prefix + rows * columns for rows, columns in (stage.grid, stage.window))
    x_1ND, q_1HVE = torch.zeros(1, tokens, width), torch.zeros(1, heads, seen, head_dim)
    logits_1HVV = (1, heads, seen, seen)
    for name in ("residual_1ND", "attention_1ND"):
        if (part := getattr(layer, name)) is not None:
            yield name, part.shape, (1, tokens, width)
    if layer.logits_1HNN is not None:
        yield "logits_1HNN", layer.logits_1HNN.shape, logits_1HVV
    for part in layer.rotation or ():
        yield (
            "rotation",
            part.shape,
            (part.shape[0] if len(part) in (1, heads) else heads, seen, head_dim // 2),
        )
    if layer.conditional is not None:
        yield "what conditional makes", layer.conditional(x_1ND).shape, (1, tokens, width)
    if layer.contextual is not None:
        yield "what contextual makes", layer.contextual(q_1HVE).shape, logits_1HVV
    if layer.channels is not None:
        made = (x_1ND[:, :1] @ layer.channels.rows().T).unflatten(-1, (heads, -1)).transpose(1, 2)
        q, k = layer.channels.extend(q_1HVE, q_1HVE, made.expand(-1, -1, seen, -1))
        yield "keys with channels", k.shape, (1, heads, seen, q.shape[-1])
    join = getattr(network, "join", None)
    if join is not None and (w_1ND := join.behind(network.pos_embed)) is not None:
        yield "what behind() makes", w_1ND.shape, (1, tokens, width)
