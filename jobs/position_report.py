"""Show position as each layer's attention sees it: position_report.py CHECKPOINT|RUN ... --out FOLDER.

Each CHECKPOINT is [LABEL=]PATH[@RECIPE[,FIELD=VALUE...]]: a checkpoint folder of ours, which knows its network, or a
.pth or .safetensors file of the official LaPE code, DeiT or timm, whose network is told by @RECIPE, by fields of the
model for this one, as in rpe.pth@deit_tiny_basic,position=none,bias=relative2d, and by --model.* options for all.
Each RUN is [LABEL=]ID of an MLflow run, which the report is then logged to. Several stand side by side.
"""

import sys
from pathlib import Path

from lape_ray.cli import ConfigParser, run_job


def main() -> None:
    parser = ConfigParser(
        usage="%(prog)s CHECKPOINT|RUN ... [options] [--section.field VALUE ...]", description=__doc__
    )
    add = parser.add_argument
    add("subjects", nargs="+", metavar="CHECKPOINT|RUN", help="see above")
    add(
        "--out",
        default="position_report",
        help="folder or s3:// address for figures and page (default: %(default)s)",
    )
    add("--token", metavar="ROW,COLUMN", help="patch whose maps are drawn (default: the centre)")
    add(
        "--images",
        type=Path,
        help="folder of images that measure how strongly position is used (default: data.val)",
    )
    add("--count", type=int, default=64, help="images of that measurement (default: %(default)s)")
    add(
        "--robustness",
        action="store_true",
        help="also measure accuracy at other sizes and under shifts, on data.val",
    )
    add("--robustness-images", type=int, metavar="N", help="on N images, spread over data.val (default: all)")
    add("--ema", action="store_true", help="the moving average that our checkpoints hold")
    values = vars(parser.parse_args())
    options = {
        name: values.pop(name)
        for name in ("subjects", "out", "token", "images", "count", "robustness", "robustness_images", "ema")
    }
    from lape_ray.report.build import build_position_report

    page, notes = build_position_report(
        overrides=values, progress=lambda text: print(text, file=sys.stderr), **options
    )
    for note in notes:
        print(note)
    print(f"report: {page}")


if __name__ == "__main__":
    run_job(main)
