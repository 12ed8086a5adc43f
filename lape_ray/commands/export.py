"""Export a checkpoint to other formats.

CHECKPOINT is PATH[@RECIPE]: a checkpoint folder of ours, which knows its network, or a .pth or .safetensors file of
the official LaPE code, DeiT or timm, whose network is described by @RECIPE and --model.* options, or by timm's
config.json next to it. It, FOLDER and FILE may be s3:// addresses, and CHECKPOINT hf-hub:OWNER/NAME. RUN is an MLflow
run's id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lape_ray.cli import ConfigParser


def build_parser(prog: str | None = None) -> ConfigParser:
    """Make the parser of this command."""
    usage = "%(prog)s CHECKPOINT|RUN [options] [--section.field VALUE ...]"
    parser = ConfigParser(usage=usage, description=__doc__, prog=prog)
    add = parser.add_argument
    add("spec", metavar="CHECKPOINT|RUN", help="see above")
    add("--timm", metavar="FOLDER", help="write safetensors and config.json in timm's names")
    add("--official", metavar="FILE", help="write .pth or .safetensors in the names of its published code")
    add("--backbone", metavar="FOLDER", help="write a feature extractor that needs no lape_ray")
    add("--onnx", metavar="FILE", help="write ONNX and compare onnxruntime with PyTorch on real images")
    add(
        "--hub",
        metavar="OWNER/NAME",
        help="push the same as --timm with a model card to the Hugging Face hub (HF_TOKEN)",
    )
    add("--hub-public", action="store_true", help="with --hub: for everybody to see (default: private)")
    add("--mlflow", action="store_true", help="log a servable model to the run")
    add("--register", metavar="NAME", help="with --mlflow: make it a new version of this registered model")
    add("--images", type=Path, help="folder of real images for comparison and example (default: data.val)")
    add("--ema", action="store_true", help="the moving average that the checkpoint holds")
    parser.add_trust()
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Export the checkpoint that the command line names."""
    parser = build_parser(prog)
    options, overrides = parser.parse_job(argv)
    if options["register"] and not options["mlflow"]:
        parser.error(f"--register {options['register']} needs --mlflow")
    formats = ("timm", "official", "backbone", "hub", "onnx", "mlflow")
    if not any(options[name] for name in formats):
        parser.error(f"nothing to do: give {', '.join(f'--{name}' for name in formats)}")
    from lape_ray.inference.export import export  # after parsing, so that --help is instant

    for line in export(**options, overrides=overrides):
        print(line)
