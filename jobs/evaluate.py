"""Evaluate a checkpoint's exact top-1 and top-5: evaluate.py CHECKPOINT --data.val FILE.beton [options].

CHECKPOINT is a checkpoint folder of ours, which knows its network, or a .pth or .safetensors file of the
official LaPE code, DeiT or timm, whose network is told by --recipe or by --model.* options; or the
s3:// address of one.
"""

from lape_ray.cli import ConfigParser, run_job


def main() -> None:
    parser = ConfigParser(
        usage="%(prog)s CHECKPOINT [--recipe NAME] [--section.field VALUE ...]", description=__doc__
    )
    parser.add_argument("checkpoint", help="folder, .pth or .safetensors")
    parser.add_argument("--recipe", help="recipe whose network and data settings are used")
    parser.add_argument(
        "--ema", action="store_true", help="evaluate the moving average that our checkpoints hold"
    )
    values = vars(parser.parse_args())
    checkpoint, recipe, ema = (values.pop(name) for name in ("checkpoint", "recipe", "ema"))
    from lape_ray.inference.evaluate import config_for, evaluate_checkpoint
    from lape_ray.storage import local

    checkpoint = str(local(checkpoint))
    result = evaluate_checkpoint(checkpoint, config_for(checkpoint, recipe, values), ema=ema)
    print("{images:.0f} images  top-1 {acc1:.3f}  top-5 {acc5:.3f}  loss {loss:.4f}".format(**result))


if __name__ == "__main__":
    run_job(main)
