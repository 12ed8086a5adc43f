"""Evaluate a checkpoint's exact top-1 and top-5: evaluate.py CHECKPOINT --data.val FILE.beton [options].

CHECKPOINT is a checkpoint folder of ours, which knows its network, or a .pth or .safetensors file of the
official LaPE code, DeiT or timm, whose network is described by --recipe or by --model.* options; or the
s3:// address of one.
"""

from lape_ray.cli import ConfigParser, run_job


def main() -> None:
    parser = ConfigParser(
        usage="%(prog)s CHECKPOINT [--recipe NAME] [--section.field VALUE ...]", description=__doc__
    )
    add = parser.add_argument
    add("checkpoint", help="folder, .pth or .safetensors")
    add("--recipe", help="recipe whose network and data settings are used")
    add("--ema", action="store_true", help="evaluate the moving average that our checkpoints hold")
    options, overrides = parser.parse_job()
    from lape_ray.inference.evaluate import (
        config_for,
        evaluate_checkpoint,
    )  # after parsing: --help is instant
    from lape_ray.storage import local

    checkpoint = str(local(options["checkpoint"]))
    config = config_for(checkpoint, options["recipe"], overrides)
    result = evaluate_checkpoint(checkpoint, config, ema=options["ema"])
    print("{images:.0f} images  top-1 {acc1:.3f}  top-5 {acc5:.3f}  loss {loss:.4f}".format(**result))


if __name__ == "__main__":
    run_job(main)
