"""How fast this package is on this machine, beside its peers: benchmark.py COMMAND [options].

python jobs/benchmark.py loader --images imagenet/train --json loader.json
python jobs/benchmark.py loader --device cuda --threads 16
python jobs/benchmark.py compare --json compare.json
python jobs/benchmark.py gpu --json results --minutes 25
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from lape_ray.cli import ConfigParser, run_job

STARTED = time.perf_counter()
STEPPING = {
    "step": "our training step: images/s, share of the device's peaks, memory, operators",
    "compare": "our training step beside timm's, torchvision's and an explicit softmax",
    "ray": "the same loop under Ray Train and torchrun",
    "checkpoint": "saving and restoring",
}


def main() -> int | None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files and processes go too
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    loader = commands.add_parser("loader", help="the input pipeline, from the decoder to fed training steps")
    add = loader.add_argument
    add("--images", help="folder of class folders, parquet file, folder or glob (default: images drawn here)")
    add("--split", help="train, val, ...: folder or shards of that name in --images")
    add("--size", type=int, default=224, help="side of the crops in pixels (default: 224)")
    add("--rounds", type=int, default=3, help="interleaved rounds of every measurement (default: 3)")
    add("--threads", type=int, help="of every loader (default: one for each CPU, at most 16)")
    add("--device", default="cpu", help="cpu or cuda; with cuda, training steps are fed too (default: cpu)")
    add("--quick", action="store_true", help="everything at tiny sizes, to see that it runs")
    loader.set_defaults(run=run_loader)
    for name, what in STEPPING.items():
        command = commands.add_parser(name, help=what)
        command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
        command.add_argument("--rounds", type=int, help="interleaved rounds")
        command.add_argument(
            "--threads", type=int, help="of a CPU's arithmetic, in each process (default: 1)"
        )
        command.add_argument(
            "--models", help="such as deit_tiny:8,vit_lite:64, with batch sizes where those count"
        )
        command.add_argument(
            "--quick", action="store_true", help="everything at tiny sizes, to see that it runs"
        )
        if name in ("step", "compare"):
            command.add_argument("--compile", help="mode of torch.compile, or off (default: default)")
            command.add_argument("--steps", type=int, help="of a window")
            command.add_argument("--minutes", type=float, help="after which nothing new is begun")
        command.set_defaults(run=run_stepping)
    seeds = commands.add_parser(
        "seeds", help="whole trainings with several seeds: accuracy, spread, differences"
    )
    add = seeds.add_argument
    add(
        "source",
        help="images with a split train: a folder of class folders, or of parquet or tar shards",
    )
    add("--test", default="test", metavar="SPLIT", help="its split that is evaluated (default: test)")
    add("--recipes", help="names with commas between (default: vit_lite_7_4_basic,vit_lite_7_4_lape)")
    add("--seeds", type=int, help="of each recipe, from 121 on (default: 5)")
    add("--epochs", type=int, help="of the schedule, shortened in proportion (default: the recipe's)")
    add("--holdout", type=int, metavar="N", help="training images to evaluate, in place of the test set")
    add("--per-class", type=int, metavar="N", help="training images of each class (default: all)")
    add("--at-once", type=int, metavar="N", help="trainings that share the device (default: 1)")
    add("--threads", type=int, help="of a CPU's arithmetic, in each process (default: 1)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    seeds.set_defaults(run=run_seeds)
    suite = commands.add_parser("gpu", help="compare, step, checkpoint and loader on a GPU, in one go")
    suite.add_argument("--only", default="", help="some of them, in this order, such as step,compare")
    suite.add_argument("--minutes", type=float, default=25, help="for all of it (default: 25)")
    suite.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    suite.add_argument("--quick", action="store_true", help="everything at tiny sizes, to see that it runs")
    suite.add_argument(
        "--json", type=Path, required=True, metavar="DIR", help="folder for all records and tables"
    )
    suite.set_defaults(run=run_suite)
    for name in ("loader", "seeds", *STEPPING):
        commands.choices[name].add_argument("--json", type=Path, help="file for the whole record")
    options, rest = parser.parse_known_args()
    if rest and options.command != "seeds":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.fields = rest
    return options.run(options)


def run_loader(options: argparse.Namespace) -> None:
    from lape_ray.bench.settings import Settings  # after parsing: --help is instant

    given = {"images": options.images, "split": options.split, "side": options.size}
    given |= {"rounds": options.rounds, "device": options.device, "training": options.device != "cpu"}
    given |= {"threads": options.threads} if options.threads is not None else {}
    settings = Settings(**given)  # refused before torch is imported, which takes seconds
    from lape_ray.bench.loader import run
    from lape_ray.bench.loader_report import report
    from lape_ray.bench.record import save

    record = run(settings.quick() if options.quick else settings, show)
    print(report(record))
    if options.json:
        save(record, options.json)


def run_seeds(options: argparse.Namespace) -> None:
    parser = ConfigParser(usage="%(prog)s seeds SOURCE [options] [--section.field VALUE ...]")
    options.overrides = vars(parser.parse_args(options.fields))
    run_stepping(options)


def run_stepping(options: argparse.Namespace) -> None:
    from lape_ray.bench.commands import run  # after parsing: --help is instant

    print(run(options.command, vars(options), show))


def run_suite(options: argparse.Namespace) -> int:
    from lape_ray.bench.suite import run_all

    return run_all(options.json, options.only, options.minutes, options.device, quick=options.quick)


def show(text: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_job(main)
