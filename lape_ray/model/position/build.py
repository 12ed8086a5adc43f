"""Build a network's position embeddings from their names, and from these what every layer receives.

Shapes: T tables (1, or one a layer), N tokens = prefix tokens + patches, D width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lape_ray.model.position.absolute import ABSOLUTES
from lape_ray.model.position.join import JOINS, Join
from lape_ray.model.position.layout import LayerPosition, Layout
from lape_ray.model.position.relative import BIAS_JOINS, BIASES, LogitBias
from lape_ray.model.position.rotary import ROTARIES, Rotary


def valid_joins(position: str) -> tuple[str, ...]:
    """List the joins that can carry an absolute embedding."""
    kind = ABSOLUTES[position]
    if kind is None:
        return ("basic",)
    return tuple(name for name, join in JOINS.items() if kind.trained or not join.per_layer)


def valid_bias_joins(bias: str) -> tuple[str, ...]:
    """List the joins that can carry a logit bias."""
    return ("basic",) if BIASES[bias] is None else tuple(BIAS_JOINS)


def check_joins(position: str, join: str, bias: str, bias_join: str) -> None:
    """Refuse a combination that means nothing: a join of no embedding, or one fixed table for every layer.

    Raises:
        ValueError: the join is none of the valid ones, which it names.
    """
    if join not in valid_joins(position):
        why = (
            "has nothing to join"
            if ABSOLUTES[position] is None
            else "is fixed, so that a table for each layer equals share"
        )
        raise ValueError(
            f"position={position} {why}: join={join} is not valid; "
            f"valid joins of {position} are {', '.join(valid_joins(position))}"
        )
    if bias_join not in valid_bias_joins(bias):
        raise ValueError(
            f"bias={bias} has nothing to join: bias_join={bias_join} is not valid; "
            f"valid bias joins of {bias} are {', '.join(valid_bias_joins(bias))}"
        )


class PositionEmbeddings(NamedTuple):
    """All position embeddings of blocks that see one grid, each where it is used."""

    pos_embed: nn.Parameter | nn.Buffer | None
    """(T, N, D) table of the absolute embedding: trained, or fixed and not part of a checkpoint."""
    join: Join | None
    """Carries the table into the blocks."""
    bias: LogitBias | None
    rotary: Rotary | None

    def layers(self, depth: int) -> list[LayerPosition]:
        """Compute what each of `depth` layers receives; the same for every image."""
        layers = [LayerPosition()] * depth
        if self.join is not None:
            layers = self.join(self.pos_embed)
        if self.bias is not None:
            layers = [p._replace(logits_1HNN=b) for p, b in zip(layers, self.bias(), strict=True)]
        if self.rotary is not None:
            layers = [p._replace(rotation=r) for p, r in zip(layers, self.rotary(), strict=True)]
        return layers


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
) -> PositionEmbeddings:
    """Look the names up and make freshly initialised modules; draws from torch's global generator.

    Args:
        eps: of the joins' layer norms.
        std: of a trained table's truncated normal initialisation.

    Raises:
        ValueError: the joins do not fit, or an embedding does not fit the layout.
    """
    check_joins(position, join, bias, bias_join)
    pos_embed: nn.Parameter | nn.Buffer | None = None
    carrier = logit_bias = None
    if (kind := ABSOLUTES[position]) is not None:
        carrier = JOINS[join](layout, kind, eps=eps)
        table_TND = kind.make(layout, layout.depth if carrier.per_layer else 1, std)
        pos_embed = nn.Parameter(table_TND) if kind.trained else nn.Buffer(table_TND, persistent=False)
    if (table := BIASES[bias]) is not None:
        norms = BIAS_JOINS[bias_join](layout)
        logit_bias = LogitBias(table(layout), norms, num_prefix=layout.num_prefix)
    turn = ROTARIES[rotary]
    return PositionEmbeddings(pos_embed, carrier, logit_bias, None if turn is None else turn(layout))
