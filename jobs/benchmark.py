"""How fast this package is on this machine, beside its peers: benchmark.py loader [options].

python jobs/benchmark.py loader --images imagenet/train --json loader.json
python jobs/benchmark.py loader --device cuda --threads 16
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from lape_ray.cli import run_job

STARTED = time.perf_counter()


def main() -> None:
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
    for command in (loader,):
        command.add_argument("--json", type=Path, help="file for the whole record")
    options = parser.parse_args()
    options.run(options)


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


def show(text: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_job(main)
