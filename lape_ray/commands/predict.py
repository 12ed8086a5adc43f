"""Classify a folder of images.

CHECKPOINT is PATH[@RECIPE], as for export; RUN is an MLflow run's id; paths may be s3:// addresses. The
classes' names are the checkpoint's, or those in the manifest of data.val. An image that cannot be read is named, in the
CSV's last column too, and the exit code is then 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from lape_ray.cli import ConfigParser, at_least_one


def build_parser(prog: str | None = None) -> ConfigParser:
    """Make the parser of this command."""
    usage = "%(prog)s CHECKPOINT|RUN FOLDER [options] [--section.field VALUE ...]"
    parser = ConfigParser(usage=usage, description=__doc__, prog=prog)
    add = parser.add_argument
    add("spec", metavar="CHECKPOINT|RUN", help="see above")
    add("folder", help="images are looked for in all folders below it")
    add("--csv", metavar="FILE",
        help="write path, classes, probabilities and error, row by row (default: lines on the screen)")  # fmt: skip
    add("--top", type=at_least_one, default=5, help="classes of an image (default: %(default)s)")
    add("--batch", type=at_least_one, default=32, help="images at a time (default: %(default)s)")
    add("--ema", action="store_true", help="the moving average that the checkpoint holds")
    parser.add_trust()
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Classify the folder that the command line names; returns 1 where an image could not be read."""
    options, overrides = build_parser(prog).parse_job(argv)
    from lape_ray.inference.classify import classify_folder  # after parsing, so that --help is instant

    result = classify_folder(**options, overrides=overrides)
    print(result.summary())
    return 1 if result.skipped else 0
