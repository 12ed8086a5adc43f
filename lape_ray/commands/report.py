"""Show position as each layer's attention sees it.

Each CHECKPOINT is [LABEL=]PATH[@RECIPE[,FIELD=VALUE...]]: a checkpoint folder of ours, which knows its network, or a
.pth or .safetensors file of the official LaPE code, DeiT or timm, whose network is described by @RECIPE, by fields of
the model for this one, as in rpe.pth@deit_tiny_basic,position=none,bias=relative2d, and by --model.* options for all.
PATH may be an s3:// or hf-hub:OWNER/NAME address. Each RUN is [LABEL=]ID of an MLflow run, which the report is then
logged to. Several stand side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lape_ray.cli import ConfigParser


def build_parser(prog: str | None = None) -> ConfigParser:
    """Make the parser of this command."""
    usage = "%(prog)s CHECKPOINT|RUN ... [options] [--section.field VALUE ...]"
    parser = ConfigParser(usage=usage, description=__doc__, prog=prog)
    add = parser.add_argument
    add("specs", nargs="+", metavar="CHECKPOINT|RUN", help="see above")
    add("--out", default="position_report", help="folder or s3:// address (default: %(default)s)")
    add("--token", metavar="ROW,COLUMN", help="patch whose maps are drawn (default: the centre)")
    add("--images", type=Path, help="folder of images to measure the use of position (default: data.val)")
    add("--count", type=int, default=64, help="images of that measurement (default: %(default)s)")
    add(
        "--robustness",
        action="store_true",
        help="also accuracy at other sizes, parts, shifts and aspect ratios",
    )
    add("--robustness-images", type=int, metavar="N", help="on N images, spread over data.val (default: all)")
    add("--ema", action="store_true", help="the moving average that the checkpoint holds")
    parser.add_trust()
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write the report that the command line asks for."""
    options, overrides = build_parser(prog).parse_job(argv)
    from lape_ray.report.build import build_position_report  # after parsing, so that --help is instant

    progress = partial(print, file=sys.stderr)
    page, notes = build_position_report(**options, overrides=overrides, progress=progress)
    print(*notes, f"report: {page}", sep="\n")
