"""Write images as a .beton (FFCV) file, or a set of them, with a manifest; or verify one.

python jobs/write_beton.py imagenet/train data/train.beton --max-size 500
python jobs/write_beton.py 'shards/train-{0000..1023}.tar' data/train.beton --shards 16 --ray
python jobs/write_beton.py cifar10 data/train.beton --split train --subset rest:5000
python jobs/write_beton.py old_ffcv_file.beton data/train.beton
python jobs/write_beton.py verify data/train.beton

SOURCE on S3 is a .beton; BETON may be an s3:// address, where it appears when it is whole.
When the command is interrupted, the same command continues where it stopped.
"""

from lape_ray.cli import run_job
from lape_ray.data.options import parse_write_options


def main() -> None:
    options = parse_write_options(__doc__)
    source, path, over_ray = (options.pop(name) for name in ("source", "beton", "ray"))
    from lape_ray.data.beton.convert import convert, verify  # after parsing, so that --help is instant

    if source == "verify":
        print(verify(path, workers=options["workers"]))
        return
    if over_ray:
        from lape_ray.cluster.connection import ray_mapper

        options["mapper"] = ray_mapper
    print(convert(source, path, **options))


if __name__ == "__main__":
    run_job(main)
