"""Position embeddings: every kind, every join, and their names, which no other code of a network knows.

    layout    the sizes an embedding is made for (`Layout`), and its part that a block receives (`LayerPosition`)
    absolute  tables that are added to tokens: none, learnable, sincos1d, sincos2d
    conditional  what is made of the tokens and added to them: peg
    join      how a table enters the blocks: basic, share, unshare, lape, lape_shared, mpvg, and lape without a part
    relative  biases of logits: none, relative2d, alibi2d, log_cpb, lookhere; as they are (basic) or normalised (lape)
    content   biases of logits that depend on the image: pape, irpe_k
    rotary    rotations of queries and keys: none, axial, mixed, spiral
    build     from names to modules: `build_position`, and which joins are valid
    resize    tables of another resolution

A new embedding or join is a class (or a function that makes a table), an entry in the dict below it, and its name in
the Literal of `lape_ray.config`.
"""

from lape_ray.model.position.absolute import ABSOLUTES, check_fixed_table
from lape_ray.model.position.build import (
    PREFIX_JOINS,
    STAGED_JOINS,
    PositionEmbeddings,
    build_position,
    build_staged_position,
    check_joins,
    valid_bias_joins,
    valid_joins,
)
from lape_ray.model.position.conditional import CONDITIONALS
from lape_ray.model.position.content import CONTENT_BIASES
from lape_ray.model.position.join import JOINS
from lape_ray.model.position.layout import Grid, LayerPosition, Layout
from lape_ray.model.position.relative import BIAS_JOINS, BIASES
from lape_ray.model.position.resize import bias_resizers, resize_absolute, resizers
from lape_ray.model.position.rotary import ROTARIES

__all__ = [
    "ABSOLUTES",
    "BIASES",
    "BIAS_JOINS",
    "CONDITIONALS",
    "CONTENT_BIASES",
    "JOINS",
    "PREFIX_JOINS",
    "ROTARIES",
    "STAGED_JOINS",
    "Grid",
    "LayerPosition",
    "Layout",
    "PositionEmbeddings",
    "bias_resizers",
    "build_position",
    "build_staged_position",
    "check_fixed_table",
    "check_joins",
    "resize_absolute",
    "resizers",
    "valid_bias_joins",
    "valid_joins",
]
