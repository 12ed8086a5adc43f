"""Time how one large object is read from S3: this package's download beside boto3's own, in Python and in boto3[crt].

    python benchmarks/s3_read.py s3://bucket/a-large-object --json s3_read.json

All write to the disk. CPU time counts too: a node's cores are the training's.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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

from lape_ray.storage.address import bucket_and_key
from lape_ray.storage.objects import Object, listing
from lape_ray.storage.s3 import client
from lape_ray.storage.transfer import PART_BYTES, THREADS, download

COLUMNS = (
    Column("reader", "name"),
    Column("MB/s", "images_per_second", ".0f"),
    Column("CPU ms of a MB", "cpu_ms", ".2f"),
    Column("MB/s over ours", "over"),
)
MB = 1_000_000


class Job(NamedTuple):
    """Say what one process reads, and how."""

    reader: str
    source: Object
    folder: str


def prepare(job: Job) -> Candidate:
    """Make a candidate that reads the object whole; its rounds count megabytes in place of images."""
    target, read = Path(job.folder, job.reader), READERS[job.reader.removesuffix(" again")]

    def work(_: int) -> int:
        target.unlink(missing_ok=True)
        read(job.source, target)
        return job.source.size // MB

    work(0)
    with target.open("rb") as file:
        return Candidate(work, {"sha256": hashlib.file_digest(file, "sha256").hexdigest()})


def ours(source: Object, target: Path) -> None:
    """Read as `storage` does, which hashes the whole."""
    download(source, target, sha256=None)


def classic(source: Object, target: Path) -> None:
    """Read with boto3's threads."""
    from s3transfer.manager import TransferConfig, TransferManager

    bucket, key = bucket_and_key(source.address)
    config = TransferConfig(max_request_concurrency=THREADS, multipart_chunksize=PART_BYTES)
    with TransferManager(client(), config) as manager:
        manager.download(bucket, key, str(target)).result()


def crt(source: Object, target: Path) -> None:
    """Read with AWS's runtime in C, as boto3[crt] does, but without TLS where the server has none."""
    bucket, key = bucket_and_key(source.address)
    with _crt_manager() as manager:
        manager.download(bucket, key, str(target)).result()


def _crt_manager() -> Any:
    try:
        from s3transfer import crt
    except ImportError:
        raise CannotRunError("awscrt is not installed") from None
    from botocore.session import Session

    session, meta = Session(), client().meta
    wrapped = crt.BotocoreCRTCredentialsWrapper(session.get_credentials())
    made = crt.create_s3_crt_client(
        meta.region_name,
        wrapped.to_crt_credentials_provider(),
        part_size=PART_BYTES,
        use_ssl=meta.endpoint_url.startswith("https"),
    )
    where = {"region_name": meta.region_name, "endpoint_url": meta.endpoint_url}
    return crt.CRTTransferManager(made, crt.BotocoreCRTRequestSerializer(session, where))


READERS: dict[str, Callable[[Object, Path], None]] = {"lape_ray": ours, "boto3": classic, "boto3[crt]": crt}


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
        names = (*READERS, "lape_ray again")
        candidates = {name: (prepare, Job(name, source, folder)) for name in names}
        rows = interleaved(candidates, 1 if options.smoke else options.rounds, note)
    if len({row["sha256"] for row in rows if "missing" not in row}) != 1:
        raise RuntimeError("the readers did not read the same bytes")
    add_ratios(rows, dict.fromkeys(names[1:], "lape_ray"), "images_per_second")
    record.add("s3_read", rows)
    print(table("reading an object from S3", COLUMNS, rows))


if __name__ == "__main__":
    run(main)
