"""The command line of jobs/write_beton.py. Standard library only, so that its --help is instant."""

from __future__ import annotations

import argparse


def write_parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of `source`, `beton`, `ray`, and the options of `convert`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("source", help="folder of class folders, tar or parquet shards (file, folder, glob), .beton, 'digits'; "
                       "or 'verify'")
    add("beton", help="file or s3:// address to write, or to verify")
    add("--split", help="train, val, ...: the folders or shards of that split; val finds validation")
    add("--subset",
        help="per-class:N, holdout:N (drawn at random, stratified), rest:N (what holdout:N leaves); A,B: B of A")
    add("--class-names", metavar="FILE",
        help="readable names: lines such as 'n01440764 tench', or a name for each label; the same for all splits")
    add("--classes-of", metavar="BETON",
        help="take classes and their order from that .beton: for a validation set that lacks some")
    add("--max-size", type=int, help="longest side in pixels; larger images are resized (500 suits ImageNet)")
    add("--quality", type=int, default=90, help="of the JPEGs that are encoded (default: 90)")
    add("--mode", default="auto",
        help="auto keeps JPEGs, and small images raw; jpg encodes all; raw; proportion")
    add("--raw-share", type=float, default=0.5, help="share of raw images in mode proportion (default: 0.5)")
    add("--markers", type=int, default=4, help="MCUs between restart markers; 0: none (default: 4)")
    add("--shards", type=int, default=1, help="files of the set (default: 1)")
    add("--workers", type=int, help="processes (default: one for each CPU)")
    add("--ray", action="store_true",
        help="encode on all CPUs of the Ray cluster; every node reads the source")
    add("--on-error", default="stop", help="stop at an image that cannot be read, or skip it (default: stop)")
    add("--fresh", action="store_true", help="do not continue what an interrupted command left")
    # fmt: on
    return parser
