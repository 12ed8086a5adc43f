"""Write images as a .beton (FFCV) file, or a set of them, with a manifest; or verify one.

write-data imagenet/train data/train.beton --max-size 500
write-data 'shards/train-{0000..1023}.tar' data/train.beton --shards 16 --ray
write-data cifar10 data/train.beton --split train --subset rest:5000
write-data old_ffcv_file.beton data/train.beton
write-data verify data/train.beton

SOURCE on S3 is a .beton; BETON may be an s3:// address, where it appears when it is whole.
When the command is interrupted, the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lape_ray.data.options import write_parser


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    return write_parser(__doc__, prog)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write or verify the file that the command line names."""
    options = vars(build_parser(prog).parse_args(argv))
    source, path, over_ray = (options.pop(name) for name in ("source", "beton", "ray"))
    from lape_ray.data.beton.convert import convert, verify  # after parsing, so that --help is instant

    if source == "verify":
        print(verify(path, workers=options["workers"]))
        return
    if over_ray:
        from lape_ray.cluster.connection import ray_mapper

        options["mapper"] = ray_mapper
    print(convert(source, path, **options))
