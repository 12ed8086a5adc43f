"""Named search spaces: each is a list of cells (settings that belong together) and axes that cross them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from lape_ray.config import Join, ModelConfig, TrainConfig, flatten, names_of, replace_fields, write_value
from lape_ray.model import position as embeddings
from lape_ray.model import resolve
from lape_ray.model.plugin import load
from lape_ray.recipes import RECIPES, TABLE1
from lape_ray.search.space import Axis, Cell, Choice, Range, Space, differing

_TABLE2 = ("vit_lite_7_4", "cvt_7_4", "cct_7_3x1")
NETWORK_AXES = ("model.position", "model.join", "model.bias", "model.bias_join", "model.rotary")


def _joins_of(model: ModelConfig) -> Mapping[str, type[Any]]:
    """Return the joins that a network has, by name."""
    spec = resolve(model)
    if spec.depths is not None:
        found = embeddings.STAGED_JOINS
    else:
        found = embeddings.PREFIX_JOINS if spec.num_prefix else embeddings.JOINS
    return {name: found[name] for name in names_of(model, "join") if name in found}


def _whole_joins(model: ModelConfig) -> Mapping[str, type[Any]]:
    """Return those of them that lack no part of LaPE."""
    return {name: join for name, join in _joins_of(model).items() if not join.partial}


def _cells(rows: Iterable[Sequence[str]], fields: Sequence[str] = NETWORK_AXES) -> Space:
    return Space(cells=tuple(dict(zip(fields, row, strict=True)) for row in rows))


def positions(base: TrainConfig) -> Space:
    """List every valid combination of position, join, bias, bias_join and rotary: 600 cells; fix some to have fewer.

    A network of several stages has fewer joins, and so 320 cells; one without class token has the join mpvg too, and so
    720; those of a plugin are added. Joins that lack a part of LaPE are left out; the space `paper_table8` has them.
    """
    model, joins = base.model, _whole_joins(base.model)
    return _cells(
        (position, join, bias, bias_join, rotary)
        for position in names_of(model, "position")
        for join in embeddings.valid_joins(position, joins)
        for bias in names_of(model, "bias")
        for bias_join in names_of(model, "bias_join")
        if bias_join in embeddings.valid_bias_joins(bias)
        for rotary in names_of(model, "rotary")
    )


def paper_table1(base: TrainConfig) -> Space:
    """Make the 26 rows of the LaPE paper's table 1, each with all that its own recipe sets, but for the length.

    All train as long as the base: T2T-ViT's 10 epochs of cool-down are left out. The paper's figures stand in the
    recipes. Distilled networks need --optim.teacher, which others leave aside.
    """
    if base.recipe not in TABLE1:
        raise ValueError(
            f"the space paper_table1 goes over recipes and is of one of them, such as deit_tiny_lape; this one's "
            f"recipe is {base.recipe or 'none'}"
        )
    rows = [flatten(RECIPES[name]()) for name in TABLE1]
    fields = [each for each in differing(rows) if each != "optim.cooldown_epochs"]
    return Space(cells=tuple({each: row[each] for each in fields} for row in rows))


def paper_table7(base: TrainConfig) -> Space:
    """Make the 14 rows of the LaPE paper's table 7 (ICCV 2023): three embeddings by join, and relative bias."""
    joins = {
        "learnable": ("basic", "share", "unshare", "lape_shared", "lape"),
        "sincos1d": ("basic", "share", "lape_shared", "lape"),
        "sincos2d": ("basic", "share", "lape_shared", "lape"),
    }
    rows = [(position, join, "none", "basic", "none") for position in joins for join in joins[position]]
    return _cells([*rows, ("none", "basic", "relative2d", "basic", "none")])


def paper_table8(base: TrainConfig) -> Space:
    """Make the 9 rows of the LaPE paper's table 8: the default, and LaPE with more and more of its LayerNorm.

    Paper, DeiT-Ti with a learnable table (`deit_tiny_lape`): basic 71.54, lape_identity 70.67, lape_scalar 71.22,
    lape_gamma 71.13, lape_affine 70.85, lape_norm 72.56, lape_scalar_norm 72.49, lape_gamma_norm 71.80, lape 73.11.
    """
    partial = [(name,) for name in get_args(Join) if embeddings.JOINS[name].partial]
    return _cells([("basic",), *partial, ("lape",)], ["model.join"])


def paper_table2(base: TrainConfig) -> Space:
    """Make the rows of the LaPE paper's table 2 for the recipe's data: ViT-Lite, CVT and CCT, under basic and lape.

    With --seeds 5 and a CIFAR recipe, whose first seed is 121, these are the paper's trainings.
    """
    if base.model.variant not in _TABLE2:
        raise ValueError(
            f"the space paper_table2 is of the recipes vit_lite_7_4_*, cvt_7_4_* and cct_7_3x1_*, which differ in "
            f"nothing but model.variant and model.join; this one's variant is {base.model.variant}"
        )
    return _cells(itertools.product(_TABLE2, ("basic", "lape")), ("model.variant", "model.join"))


def lape_beside(base: TrainConfig) -> Space:
    """Cross the joins basic and lape of the recipe's own table with every rotary embedding and every bias beside it.

    The first two cells have the table alone; a bias has the join basic. Whether LaPE still helps beside newer
    embeddings is read from these pairs.
    """
    beside = [
        *(("none", rotary) for rotary in embeddings.ROTARIES),
        *((bias, "none") for bias in (*embeddings.BIASES, *embeddings.CONTENT_BIASES) if bias != "none"),
    ]
    rows = [(join, bias, "basic", rotary) for bias, rotary in beside for join in ("basic", "lape")]
    return _cells(rows, ["model.join", "model.bias", "model.bias_join", "model.rotary"])


def joins(base: TrainConfig) -> Space:
    """List every join of the recipe's own position embedding, but none that lacks a part of LaPE."""
    found = embeddings.valid_joins(base.model.position, _whole_joins(base.model))
    return _cells([(join,) for join in found], ["model.join"])


def recipe(base: TrainConfig) -> Space:
    """Learning rate, weight decay, stochastic depth, augmentation strengths and warm-up, around the recipe's own."""
    optim = base.optim
    return Space(axes={
        "optim.lr": Range(float(f"{optim.lr / 5:.2g}"), float(f"{optim.lr * 5:.2g}"), log=True),
        "optim.weight_decay": Range(0.005, 0.3, log=True),
        "optim.warmup_epochs": Range(0.0, max(1.0, optim.epochs / 10)),
        "optim.label_smoothing": Range(0.0, 0.2),
        "model.drop_path": Range(0.0, 0.3),
        "data.rand_augment": Choice((None, "rand-m5-mstd0.5-inc1", "rand-m9-mstd0.5-inc1")),
        "data.erase_prob": Range(0.0, 0.4),
        "data.mixup": Range(0.0, 0.8),
        "data.cutmix": Range(0.0, 1.0),
    })  # fmt: skip


def free(base: TrainConfig) -> Space:
    """Nothing but the axes that --space gives."""
    return Space()


_NAMED = (positions, lape_beside, paper_table1, paper_table2, paper_table7, paper_table8, joins, recipe, free)
SPACES: dict[str, Callable[[TrainConfig], Space]] = {function.__name__: function for function in _NAMED}


def build_space(name: str, base: TrainConfig, axes: Mapping[str, Axis], fixed: Sequence[str] = ()) -> Space:
    """Build the named space of `base` and the given axes; a field in `fixed` keeps the value that `base` has.

    Raises:
        ValueError: the space is unknown, empty or contradictory; says how to mend it.
    """
    if name not in SPACES:
        raise ValueError(f"space {name!r} is not known; known spaces are {', '.join(SPACES)}")
    load(base.model.plugin)
    named = SPACES[name](base)
    current, own = flatten(base), set().union(*named.cells)
    for each in axes:
        if each in fixed:
            raise ValueError(
                f"{each} is both fixed by --{each} and searched by --space {each}; leave out one"
            )
        if each in own:
            raise ValueError(
                f"the space {name} goes over {each} itself; leave out --space {each}, or use the space `free`"
            )
    kept_by = {each: current[each] for each in fixed if each in own}
    cells = tuple(cell for cell in named.cells if kept_by.items() <= {**current, **cell}.items())
    if not cells:
        given = " ".join(f"--{each} {value}" for each, value in kept_by.items())
        raise ValueError(f"no cell of the space {name} has {given}; leave out one of these options")
    kept = {each: axis for each, axis in named.axes.items() if each not in fixed} | dict(axes)
    if len(cells) == 1 and not kept:
        raise ValueError(
            f"the space {name} holds a single cell, so there is nothing to search: fix fewer fields, "
            "or add an axis such as --space optim.lr=choice(5e-4,1e-3)"
        )
    space = Space(cells=cells, axes=kept)
    for point in space.examples():
        check_point(base, point)
    return space


def check_point(base: TrainConfig, point: Cell) -> TrainConfig:
    """Make the config of a point; a ValueError names the point and the fix where its settings contradict each other."""
    try:
        config = replace_fields(base, point)
        model = config.model
        embeddings.check_joins(model.position, model.join, model.bias, model.bias_join, _joins_of(model))
    except ValueError as error:
        settings = ", ".join(f"{each}={value}" for each, value in point.items())
        raise ValueError(
            f"the space holds a contradiction at {settings}: {error} "
            "(the space `positions` leaves such cells out)"
        ) from None
    return config


def label(point: Cell, fields: Sequence[str]) -> str:
    """Make a short name: the values of `fields`, with ports that are not used and plain joins left out."""
    parts = []
    for each in fields:
        value, port = point.get(each), each in NETWORK_AXES
        unused = port and (value == "none" or (each == "model.bias_join" and value == "basic"))
        if unused or (each == "model.join" and point.get("model.position") == "none"):
            continue
        text = f"{value:.3g}" if isinstance(value, float) else write_value(value)
        parts.append(text if each in NETWORK_AXES[:3] else f"{each.partition('.')[2]}={text}")
    return " ".join(parts) or "no position"


def labels(points: Sequence[Cell]) -> list[str]:
    """Name each point by the fields in which they differ."""
    fields = differing(points) or list(points[0])
    fields = [each for each in fields if not _told_by_variant(points, each)]
    return [label(point, fields) for point in points]


def _told_by_variant(points: Sequence[Cell], field: str) -> bool:
    """Tell whether a field is part of what several networks are trained with, each its own, and names none of them."""
    if field in (*NETWORK_AXES, "model.variant"):
        return False
    variants = {point.get("model.variant") for point in points}
    told = {(point.get("model.variant"), write_value(point.get(field))) for point in points}
    return 1 < len(variants) == len(told) < len(points)
