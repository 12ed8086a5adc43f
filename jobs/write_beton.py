"""Write images as a .beton (FFCV) file, or a set of them, with a manifest; or verify one.

python jobs/write_beton.py imagenet/train data/train.beton --max-size 500
python jobs/write_beton.py 'shards/train-{0000..1023}.tar' data/train.beton --shards 16 --ray
python jobs/write_beton.py cifar10 data/train.beton --split train --subset rest:5000
python jobs/write_beton.py old_ffcv_file.beton data/train.beton
python jobs/write_beton.py verify data/train.beton

SOURCE on S3 is a .beton; BETON may be an s3:// address, where it appears when it is whole.
Interrupted, it goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

from lape_ray.cli import run_job


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="folder of class folders, tar or parquet shards (file, folder, glob), .beton, 'digits'; "
                       "or 'verify'")  # fmt: skip
    add("beton", help="file or s3:// address to write, or to verify")
    add("--split", help="train, val, ...: folder or shards of that name in the source")
    add(
        "--subset",
        help="per-class:N, holdout:N (drawn at random, stratified), rest:N (what holdout:N leaves); A,B: B of A",
    )
    add(
        "--class-names",
        metavar="FILE",
        help="readable names: lines such as 'n01440764 tench', or a name for each label; the same for all splits",
    )
    add("--max-size", type=int, help="longest side in pixels; larger images are resized (500 suits ImageNet)")
    add("--quality", type=int, default=90, help="of the JPEGs that are encoded (default: 90)")
    add(
        "--mode",
        default="auto",
        help="auto keeps JPEGs, and small images raw; jpg encodes all; raw; proportion",
    )
    add("--raw-share", type=float, default=0.5, help="share of raw images in mode proportion (default: 0.5)")
    add("--markers", type=int, default=4, help="MCUs between restart markers; 0: none (default: 4)")
    add("--shards", type=int, default=1, help="files of the set (default: 1)")
    add("--workers", type=int, help="processes (default: one for each CPU)")
    add(
        "--ray",
        action="store_true",
        help="encode on all CPUs of the Ray cluster; every node reads the source",
    )
    add("--on-error", default="stop", help="stop at an image that cannot be read, or skip it (default: stop)")
    add("--fresh", action="store_true", help="do not go on with what an interrupted command left")
    options = vars(parser.parse_args())
    given, path, split, subset = (options.pop(name) for name in ("source", "beton", "split", "subset"))
    over_ray, names = options.pop("ray"), options.pop("class_names")

    # After parsing: --help is instant.
    from lape_ray.data.beton import check_beton, manifest_path, set_files, write_beton
    from lape_ray.data.remote import local_split, written_beton
    from lape_ray.data.sources import named, open_source, select

    if given == "verify":
        file = local_split(path)
        manifest = check_beton(file, deep=True, workers=options["workers"])
        first, *more = [manifest_path(one).name for one in set_files(file)]
    else:
        source = select(open_source(given, split), subset)
        if names is not None:
            source = named(source, names)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(written_beton(path))
            progress = stack.enter_context(progress_bar())
            if over_ray:
                from lape_ray.cluster.connection import ray_mapper

                options["mapper"] = stack.enter_context(ray_mapper())
            manifest = write_beton(source, file, progress=progress, **options)
            first, *more = [manifest_path(one).name for one in set_files(file)]
    print(manifest.summary(path))
    first = f"{path.rpartition('/')[0] or '.'}/{first}"
    others = f" and {len(more)} more" if more else ""
    print(f"  {'agrees with' if given == 'verify' else 'manifest'} {first}{others}")


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the time that is left; a line now and then where the output is no terminal."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bars:
            left = done if done > 32 else 0  # more than one part: what an earlier command left
            if left:
                print(f"going on after {done:,} of {total:,} images", file=sys.stderr)
            wait = 0.2 if sys.stderr.isatty() else 30
            bars.append(
                tqdm(total=total, initial=left, unit=" images", mininterval=wait, delay=wait, smoothing=0.05)
            )
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


if __name__ == "__main__":
    run_job(main)
