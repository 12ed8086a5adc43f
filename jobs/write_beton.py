"""Write images as a .beton (FFCV) file with a manifest, or verify one.

python jobs/write_beton.py imagenet/train data/train.beton --max-size 500
python jobs/write_beton.py cifar10 data/train.beton --split train --subset rest:5000
python jobs/write_beton.py digits data/val.beton --split val
python jobs/write_beton.py verify data/train.beton
"""

from __future__ import annotations

import argparse
import sys

from lape_ray.cli import run_job


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="folder of class folders, parquet file, folder or glob, 'digits'; or 'verify'")
    add("beton", help="file to write, or to verify")
    add("--split", help="train, val, ...: folder or shards of that name in the source")
    add(
        "--subset",
        help="per-class:N, holdout:N (drawn at random, stratified) or rest:N (what holdout:N leaves)",
    )
    add("--max-size", type=int, help="longest side in pixels; larger images are resized (500 suits ImageNet)")
    add("--quality", type=int, default=90, help="of the JPEGs that are encoded (default: 90)")
    add(
        "--mode",
        default="auto",
        help="auto keeps JPEG bytes, and small images raw; jpg encodes all; raw; proportion",
    )
    add("--raw-share", type=float, default=0.5, help="share of raw images in mode proportion (default: 0.5)")
    add("--workers", type=int, help="processes (default: one for each CPU)")
    add("--on-error", default="stop", help="stop at an image that cannot be read, or skip it (default: stop)")
    options = vars(parser.parse_args())
    given, path, split, subset = (options.pop(name) for name in ("source", "beton", "split", "subset"))

    from lape_ray.data.beton import (
        check_beton,
        manifest_path,
        write_beton,
    )  # after parsing: --help is instant
    from lape_ray.data.sources import open_source, select

    if given == "verify":
        manifest = check_beton(path, deep=True, workers=options["workers"])
    else:
        source = select(open_source(given, split), subset)
        manifest = write_beton(source, path, progress=show if sys.stderr.isatty() else None, **options)
    print(manifest.summary(path))
    print(f"  {'agrees with' if given == 'verify' else 'manifest'} {manifest_path(path)}")


def show(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} images", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_job(main)
