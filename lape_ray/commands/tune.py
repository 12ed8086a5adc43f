"""Find the best position embedding, join and hyper-parameters.

Any --section.field option fixes that field, also one that the space goes over. The same command continues a search
that was interrupted, and shows the results of one that is finished.

tune joins vit_lite_7_4_lape --seeds 3 --data.train c10_train.beton --data.val c10_val.beton
tune free deit_tiny_lape --space 'optim.lr=loguniform(1e-4,3e-3)' --trials 16 --schedule asha
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from lape_ray.cli import ConfigParser, printing_cannot_fail
from lape_ray.search.options import search_parser


def build_parser(prog: str | None = None) -> ConfigParser:
    """Make the parser of this command."""
    return search_parser(__doc__, prog)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Search as the command line says."""
    options, overrides = build_parser(prog).parse_job(argv)
    from lape_ray.search.command import run_command  # after parsing, so that --help is instant

    with contextlib.nullcontext() if options["list"] else printing_cannot_fail():
        print(run_command(**options, overrides=overrides))
