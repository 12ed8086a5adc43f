"""Build a network's position embeddings from their names, and from these what every layer receives.

Shapes: T tables (1, or one a layer), N tokens = prefix tokens + patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.position.absolute import ABSOLUTES, AbsoluteKind
from lape_ray.model.position.conditional import CONDITIONALS
from lape_ray.model.position.content import CONTENT_BIASES, ContentBias
from lape_ray.model.position.join import JOINS, Join
from lape_ray.model.position.layout import LayerPosition, Layout
from lape_ray.model.position.relative import BIAS_JOINS, BIASES, LogitBias
from lape_ray.model.position.rotary import ROTARIES, Rotary

STAGED_JOINS = {name: join for name, join in JOINS.items() if join.staged}
PREFIX_JOINS = {name: join for name, join in JOINS.items() if not join.pooled}
"""Those of a network whose head reads a class token."""


def valid_joins(position: str, joins: Mapping[str, type[Join]] = JOINS) -> tuple[str, ...]:
    """List those of `joins` that can carry an embedding."""
    kind = ABSOLUTES.get(position)
    if kind is None:
        return ("basic",)
    return tuple(name for name, join in joins.items() if kind.trained or not join.per_layer)


def valid_bias_joins(bias: str) -> tuple[str, ...]:
    """List the joins that can carry a logit bias."""
    kind = BIASES.get(bias)
    return ("basic",) if kind is None or kind.unnormed else tuple(BIAS_JOINS)


def check_joins(
    position: str, join: str, bias: str, bias_join: str, joins: Mapping[str, type[Join]] = JOINS
) -> None:
    """Refuse a combination that means nothing: a join of no embedding, or one fixed table for every layer.

    Args:
        joins: those that the network has.

    Raises:
        ValueError: the join is none of the valid ones, which it names.
    """
    if join not in valid_joins(position, joins):
        if position in CONDITIONALS:
            why = "is made of the tokens, between two blocks"
        elif ABSOLUTES[position] is None:
            why = "has nothing to join"
        elif join not in joins and JOINS[join].pooled:
            why = "can be joined so in a network of one stage whose head reads the mean of the patches (model.pool=gap)"
        elif join not in joins:
            why = "cannot be joined so in a network of several stages, whose grid and width change"
        else:
            why = "is fixed, so that a table for each layer equals share"
        raise ValueError(
            f"position={position} {why}: join={join} is not valid; "
            f"valid joins of {position} are {', '.join(valid_joins(position, joins))}"
        )
    if bias_join not in valid_bias_joins(bias):
        if bias in CONTENT_BIASES:
            why = "depends on the image, which no LayerNorm of a fixed bias can follow"
        else:
            kind = BIASES[bias]
            why = "has nothing to join" if kind is None else kind.unnormed
        raise ValueError(
            f"bias={bias} {why}: bias_join={bias_join} is not valid; "
            f"valid bias joins of {bias} are {', '.join(valid_bias_joins(bias))}"
        )


class PositionEmbeddings(NamedTuple):
    """All position embeddings of blocks that see one grid, each where it is used."""

    pos_embed: Tensor | None
    """(T, N, D) table of the absolute embedding: trained, or fixed and not part of a checkpoint."""
    join: Join | None
    """Carries the table into the blocks."""
    bias: LogitBias | ContentBias | None
    rotary: Rotary | None
    bare_prefix: int = 0
    """Prefix tokens that the table has no rows for, so that nothing of it is added to them."""
    conditional: nn.Module | None = None
    """Makes of the tokens after the first block what is added to them."""

    def layers(self, depth: int) -> Iterator[LayerPosition]:
        """Compute what each of `depth` layers receives; the same for every image."""
        layers: Iterable[LayerPosition] = [LayerPosition()] * depth
        if self.join is not None and self.pos_embed is not None:
            layers = [_behind(self.bare_prefix, layer) for layer in self.join(self.pos_embed)]
        if self.bias is not None:
            layers = self.bias.placed(layers)
        if self.rotary is not None:
            layers = _turned(layers, self.rotary())
        for number, layer in enumerate(layers):
            yield layer._replace(conditional=self.conditional) if number == 1 else layer


def _turned(
    layers: Iterable[LayerPosition], rotations: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[LayerPosition]:
    for layer, rotation in zip(layers, rotations, strict=True):
        yield layer._replace(rotation=rotation)


def _behind(bare_prefix: int, layer: LayerPosition) -> LayerPosition:
    """Put rows of zeros before what is added to tokens; the join's norms have not seen them."""
    if not bare_prefix:
        return layer
    # Padded without its first axis, the gradient has the layout of the table, in which data parallelism sends it.
    residual_1ND, attention_1ND = (
        None if rows_1PD is None else F.pad(rows_1PD[0], (0, 0, bare_prefix, 0)).unsqueeze(0)
        for rows_1PD in (layer.residual_1ND, layer.attention_1ND)
    )
    return layer._replace(residual_1ND=residual_1ND, attention_1ND=attention_1ND)


def build_position(
    layout: Layout,
    *,
    position: str,
    join: str,
    bias: str,
    bias_join: str,
    rotary: str,
    eps: float,
    std: float,
    on_patches: bool = False,
) -> PositionEmbeddings:
    """Look the names up and make freshly initialised modules; draws from torch's global generator.

    Args:
        eps: of the joins' layer norms.
        std: of a trained table's truncated normal initialisation.
        on_patches: whether prefix tokens have no row in the table.

    Raises:
        ValueError: the joins do not fit, or an embedding does not fit the layout.
    """
    check_joins(position, join, bias, bias_join, PREFIX_JOINS if layout.num_prefix else JOINS)
    pos_embed = carrier = None
    rows = layout._replace(num_prefix=0) if on_patches else layout
    if (kind := ABSOLUTES.get(position)) is not None:
        carrier = JOINS[join](rows, kind, eps=eps)
        pos_embed = _table(kind, rows, layout.depth if carrier.per_layer else 1, std)
    logit_bias = _logit_bias(layout, bias, bias_join, std=0.0)
    bare_prefix = layout.num_prefix - rows.num_prefix
    rotation, conditional = _rotation(layout, rotary), _conditional(layout, position)
    return PositionEmbeddings(pos_embed, carrier, logit_bias, rotation, bare_prefix, conditional)


def build_staged_position(
    layouts: Sequence[Layout],
    windows: Sequence[Layout],
    *,
    position: str,
    join: str,
    bias: str,
    bias_join: str,
    rotary: str,
    eps: float,
    std: float,
) -> list[PositionEmbeddings]:
    """Do the same for a network of several stages: each has a join, a bias and a rotation.

    The first has the table, or what is made of the tokens after its first block.

    Args:
        layouts: of each stage's tokens, that the table and the joins see.
        windows: of the tokens that see each other in each stage's attention, for bias and rotation.
        std: of the trained tables' truncated normal initialisation, biases' too.
    """
    check_joins(position, join, bias, bias_join, STAGED_JOINS)
    kind = ABSOLUTES.get(position)
    table = None if kind is None else _table(kind, layouts[0], 1, std)
    return [
        PositionEmbeddings(
            table if index == 0 else None,
            None if kind is None else JOINS[join](layout, kind, eps=eps),
            _logit_bias(window, bias, bias_join, std=std),
            _rotation(window, rotary),
            conditional=_conditional(layout, position) if index == 0 else None,
        )
        for index, (layout, window) in enumerate(zip(layouts, windows, strict=True))
    ]


def _table(kind: AbsoluteKind, layout: Layout, tables: int, std: float) -> nn.Parameter | nn.Buffer:
    table_TND = kind.make(layout, tables, std)
    return nn.Parameter(table_TND) if kind.trained else nn.Buffer(table_TND, persistent=False)


def _logit_bias(layout: Layout, bias: str, bias_join: str, *, std: float) -> LogitBias | ContentBias | None:
    if bias in CONTENT_BIASES:
        return CONTENT_BIASES[bias](layout)
    if (table := BIASES[bias]) is None:
        return None
    return LogitBias(table(layout, std=std), BIAS_JOINS[bias_join](layout), num_prefix=layout.num_prefix)


def _conditional(layout: Layout, position: str) -> nn.Module | None:
    return CONDITIONALS[position](layout) if position in CONDITIONALS else None


def _rotation(layout: Layout, rotary: str) -> Rotary | None:
    turn = ROTARIES[rotary]
    return None if turn is None else turn(layout)
