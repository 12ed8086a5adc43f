"""Evaluate a checkpoint's exact top-1 and top-5.

CHECKPOINT is a checkpoint folder of ours, which knows its network, or a file of the official LaPE code, DeiT or timm
(docs/training.md has the table), whose network is described by --recipe or by --model.* options, or by timm's
config.json next to it; or the s3:// or hf-hub:OWNER/NAME address of one. --data.eval_crop 1.0 evaluates as the official
LaPE code does, instead of DeiT's 0.875.
--knn 20 classifies the images of --data.val by their 20 nearest neighbours in --data.train, as DINO does, and uses no
head.
"""

from __future__ import annotations

from collections.abc import Sequence

from lape_ray.cli import ConfigParser, counts


def build_parser(prog: str | None = None) -> ConfigParser:
    """Make the parser of this command."""
    parser = ConfigParser(
        usage="%(prog)s CHECKPOINT [--recipe NAME] [--section.field VALUE ...]",
        description=__doc__,
        prog=prog,
    )
    add = parser.add_argument
    add("checkpoint", help="folder, .pth, .safetensors or hf-hub:OWNER/NAME")
    add("--recipe", help="recipe whose network and data settings are used")
    add("--ema", action="store_true", help="evaluate the moving average that the checkpoint holds")
    add("--knn", type=counts, metavar="K,...", help="numbers of nearest neighbours that vote, such as 10,20")
    parser.add_trust()
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Evaluate the checkpoint that the command line names."""
    options, overrides = build_parser(prog).parse_job(argv)
    from lape_ray.inference.evaluate import evaluation  # after parsing, so that --help is instant
    from lape_ray.inference.knn import knn_evaluation

    neighbours = options.pop("knn")
    if neighbours is None:
        print(evaluation(**options, overrides=overrides))
    else:
        print(knn_evaluation(**options, overrides=overrides, neighbours=neighbours))
