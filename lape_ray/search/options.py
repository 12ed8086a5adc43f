"""The command line of jobs/tune_position.py. Standard library only, so that its --help is instant."""

from __future__ import annotations

from lape_ray.cli import ConfigParser

SPACES = (
    "positions, lape_beside, paper_table1, paper_table2, paper_table7, paper_table8, joins, recipe, or free (nothing "
    "but --space)"
)


def search_parser(description: str | None, prog: str | None = None) -> ConfigParser:
    """Make the parser of a search's options, and of the overrides of the config."""
    parser = ConfigParser(
        prog=prog,
        usage="%(prog)s SPACE RECIPE [--space FIELD=KIND(...)] [options] [--section.field VALUE ...]",
        description=description,
    )
    add = parser.add_argument
    # fmt: off
    add("space", metavar="SPACE", help=SPACES)
    add("recipe", metavar="RECIPE", help="the config that every trial starts from")
    add("--space", dest="axes", action="append", default=[], metavar="FIELD=KIND(...)",
        help="an axis: choice(a,b,...), uniform(low,high), loguniform(low,high) or randint(low,high)")
    add("--sample", choices=("grid", "random", "tpe"),
        help="how points are chosen (default: grid, or random)")
    add("--schedule", default="full", choices=("full", "asha", "hyperband", "pbt"),
        help="which trials train to the end: all, or the better (default: full)")
    add("--trials", type=int, metavar="N", help="points to try (default: the whole grid, or 16)")
    add("--seeds", type=int, default=1, metavar="N",
        help="seeds of every point, from training.seed on (default: 1)")
    add("--metric", default="val/acc1", help="what is compared (default: val/acc1)")
    add("--grace", type=int, default=1, metavar="EPOCHS",
        help="that every trial gets; between generations of pbt (default: 1)")
    add("--eta", type=int, default=3, metavar="N", help="one in N goes on, or is replaced (default: 3)")
    add("--concurrent", type=int, metavar="N",
        help="trials at once (default: as many as the cluster has room for)")
    add("--gpus-per-worker", type=float, metavar="SHARE", help="such as 0.25 for small networks (default: 1)")
    add("--list", action="store_true", help="print the points of the space and exit")
    # fmt: on
    return parser
