"""Train one recipe, on this machine or on a Ray cluster.

The same command continues a run that was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from lape_ray.cli import ConfigParser, parse, printing_cannot_fail, recipe_parser


def build_parser(prog: str | None = None) -> ConfigParser:
    """Make the parser of this command."""
    return recipe_parser(__doc__, prog)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train what the command line says."""
    began = time.time()
    config = parse(argv, description=__doc__, prog=prog)
    from lape_ray.cluster.launch import fit  # after parsing, so that --help needs no torch and no ray

    with printing_cannot_fail():
        print(fit(config, began=began).summary())
