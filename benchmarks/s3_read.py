"""Time how one large object is read from S3: this package's download beside boto3's own, in Python and in boto3[crt].

    python benchmarks/s3_read.py s3://bucket/a-large-object --json s3_read.json

All write to the disk. CPU time counts too: a node's cores are the training's.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple

from common import (
    Candidate,
    CannotRunError,
    Column,
    Record,
    add_ratios,
    interleaved,
    note,
    parser,
    run,
    table,
)

from lape_ray.storage.objects import Object, listing

COLUMNS = (
    Column("reader", "name"),
    Column("MB/s", "images_per_second", ".0f"),
    Column("CPU ms of a MB", "cpu_ms", ".2f"),
    Column("over ours", "over"),
)
MB = 1_000_000


class Job(NamedTuple):
    """What one process reads, and how."""

    reader: str
    source: Object
    folder: str


def prepare(job: Job) -> Candidate:
    """Make a candidate that reads the object whole; its rounds count megabytes in place of images."""
    from boto3.s3.transfer import TransferConfig
    from botocore.compat import HAS_CRT

    from lape_ray.storage.address import bucket_and_key
    from lape_ray.storage.s3 import client
    from lape_ray.storage.transfer import PART_BYTES, THREADS, download

    target = Path(job.folder, job.reader)
    bucket, key = bucket_and_key(job.source.address)
    if job.reader == "boto3[crt]" and not HAS_CRT:
        raise CannotRunError("awscrt is not installed")

    def work(_: int) -> int:
        target.unlink(missing_ok=True)
        if job.reader.startswith("lape_ray"):
            download(job.source, target, sha256=None)
        else:
            kind = "crt" if job.reader == "boto3[crt]" else "classic"
            config = TransferConfig(
                preferred_transfer_client=kind, max_concurrency=THREADS, multipart_chunksize=PART_BYTES
            )
            client().download_file(bucket, key, str(target), Config=config)
        return job.source.size // MB

    work(0)
    with target.open("rb") as file:
        return Candidate(work, {"sha256": hashlib.file_digest(file, "sha256").hexdigest()})


def main() -> None:
    options_parser = parser(__doc__, rounds=5)
    options_parser.add_argument(
        "address", help="a large object that boto3 finds with the environment's AWS_*"
    )
    options = options_parser.parse_args()
    (source,) = [one for one in listing(options.address) if one.address == options.address]
    record = Record("s3_read", {**vars(options), "bytes": source.size}, path=options.json)
    print(record.heading(), flush=True)
    with tempfile.TemporaryDirectory(prefix="lape-s3-") as folder:
        names = ("lape_ray", "boto3", "boto3[crt]", "lape_ray again")
        candidates = {name: (prepare, Job(name, source, folder)) for name in names}
        rows = interleaved(candidates, 1 if options.smoke else options.rounds, note)
    if len({row["sha256"] for row in rows if "missing" not in row}) != 1:
        raise RuntimeError("the readers did not read the same bytes")
    add_ratios(rows, dict.fromkeys(names[1:], "lape_ray"), "images_per_second")
    record.add("s3_read", rows)
    print(table("reading an object from S3", COLUMNS, rows))


if __name__ == "__main__":
    run(main)
