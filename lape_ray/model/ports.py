"""The three ports by which position enters a network, merged into one `LayerPosition` for each layer."""

from __future__ import annotations

from torch import Tensor, nn

from lape_ray.model.bias import BIAS_JOINS, BIASES, LogitBias
from lape_ray.model.block import LayerPosition
from lape_ray.model.join import JOINS, Join
from lape_ray.model.position import POSITIONS, Layout, TokenTable
from lape_ray.model.rotary import ROTARIES, Rotary


def valid_joins(position: str) -> tuple[str, ...]:
    """The joins that a token embedding can be carried by."""
    kind = POSITIONS[position]
    if kind is None:
        return ("basic",)
    return tuple(name for name, join in JOINS.items() if kind.trained or not join.per_layer)


def valid_bias_joins(bias: str) -> tuple[str, ...]:
    """The joins that a logit bias can be carried by."""
    return ("basic",) if BIASES[bias] is None else tuple(BIAS_JOINS)


def check_cell(position: str, join: str, bias: str, bias_join: str) -> None:
    """Refuse a combination that means nothing: a join of no embedding, or one fixed table for every layer."""
    if join not in valid_joins(position):
        why = (
            "has nothing to join"
            if position == "none"
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


def token_port(
    layout: Layout, position: str, join: str, *, eps: float, std: float
) -> tuple[Tensor, TokenTable, Join] | None:
    """The (T, N, D) table, its kind and its join; None for position=none."""
    kind = POSITIONS[position]
    if kind is None:
        return None
    module = JOINS[join](layout, eps=eps, zero_rows=kind.zero_prefix and layout.num_prefix > 0)
    return kind.make(layout, layout.depth if module.per_layer else 1, std), kind, module


def logits_port(layout: Layout, bias: str, bias_join: str) -> LogitBias | None:
    """The bias of every layer's attention logits; None for bias=none."""
    kind = BIASES[bias]
    return None if kind is None else LogitBias(layout, kind(layout), normalise=BIAS_JOINS[bias_join])


def rotation_port(layout: Layout, rotary: str) -> Rotary | None:
    """The rotation of every layer's queries and keys; None for rotary=none."""
    kind = ROTARIES[rotary]
    return None if kind is None else kind(layout)


def merge(
    depth: int, tokens: list[LayerPosition] | None, bias: nn.Module | None, rotary: nn.Module | None
) -> list[LayerPosition]:
    """What every layer receives from all the ports together."""
    layers = tokens if tokens is not None else [LayerPosition()] * depth
    if bias is not None:
        layers = [p._replace(logits_1HNN=b) for p, b in zip(layers, bias(), strict=True)]
    if rotary is not None:
        layers = [p._replace(rotation=r) for p, r in zip(layers, rotary(), strict=True)]
    return layers
