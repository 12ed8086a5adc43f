"""Run the whole service on this machine: digits -> .beton -> a private Ray -> a submitted job -> MLflow.

It trains one network; with --tune it compares position embeddings and joins. Everything it keeps lies in --home; the
Ray it starts is gone when it ends. That Ray and the job have this process's environment, secrets included; none of
them is sent. Options that are not listed here are the job's, such as --optim.epochs=5.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lape_ray.cli import printing_cannot_fail
from lape_ray.storage import home


def build_parser(prog: str | None = None, project: Path | None = None) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = project / "runs" if project else home()
    add(
        "--home",
        type=Path,
        default=default,
        help="folder for data, checkpoints and MLflow (default: %(default)s)",
    )
    add("--tune", action="store_true", help="a search over positions and joins, with two seeds")
    add("--workers", type=int, default=2, help="training processes, one CPU each")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None, project: Path | None = None) -> int:
    """Run the demo, of the checkout `project` or of the installed package; returns its exit code."""
    options, overrides = build_parser(prog, project).parse_known_args(argv)
    from lape_ray.cluster.demo import run_demo  # after parsing, so that --help is instant

    with printing_cannot_fail():
        return run_demo(project, **vars(options), overrides=overrides)
