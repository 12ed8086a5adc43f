"""Transfer large files to and from S3 in parallel parts, each of which is retried separately."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lape_ray.storage.address import bucket_and_key, join
from lape_ray.storage.objects import Object, put
from lape_ray.storage.s3 import call_with_retry, client, content_md5

PART_BYTES = 16 << 20
MOST_PARTS = 10_000  # of one upload
THREADS = 16
SHA256 = "sha256"  # in the metadata of what we upload


class _StoppedError(Exception):
    """Another part has failed."""


# --- down -----------------------------------------------------------------------------------------------------


class DownloadError(ValueError):
    """The object does not have the expected checksum, also when it is fetched again."""


def download(source: Object, target: Path, *, sha256: str | None, threads: int = THREADS) -> None:
    """Fetch an object to `target`, which has that name only when it is whole and its checksum is right.

    What an interrupted call left next to `target` is used. The parts are hashed in order while later ones still come.

    Args:
        sha256: of the whole object; None: what its metadata says, if it was uploaded by `upload`, else only sizes
            and the server's word count.

    Raises:
        DownloadError: the object has another checksum.
        OSError: see `s3.call_with_retry`; or the disk is full.
    """
    expected = sha256 or _metadata_sha256(source)
    partial = target.with_name(f".{target.name}.part")
    with _Journal(target.with_name(f".{target.name}.parts"), source) as journal:
        resumed = bool(journal.done) and partial.exists()
        if not resumed:
            journal.begin()
        got = _fetch(source, partial, journal, threads)
        if expected is not None and got != expected and resumed:
            # The disk, and not the object, may be what forgot some bytes: once more, from the beginning.
            journal.begin()
            got = _fetch(source, partial, journal, threads)
        if expected is not None and got != expected:
            partial.unlink()
            journal.forget()
            raise DownloadError(
                f"{source.address} is damaged: its sha256 is {got[:16]}…, and should be {expected[:16]}…; "
                "upload it again"
            )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        journal.forget()


def _metadata_sha256(source: Object) -> str | None:
    bucket, key = bucket_and_key(source.address)
    head = call_with_retry(lambda: client().head_object(Bucket=bucket, Key=key), source.address, "reading")
    told = head.get("Metadata", {}).get(SHA256)
    return None if told is None else str(told)


class _Journal:
    """The journal of the parts that are on the disk: a line that names the object, then a line for each part."""

    def __init__(self, path: Path, source: Object) -> None:
        self.path = path
        self.head = {"etag": source.etag, "size": source.size, "part_bytes": PART_BYTES}
        self.done: set[int] = set()
        with contextlib.suppress(OSError, ValueError, RecursionError):
            first, *lines = path.read_text().splitlines()
            if json.loads(first) == self.head:
                self.done = {int(line) for line in lines}
        self._descriptor = -1

    def __enter__(self) -> _Journal:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def begin(self) -> None:
        """Begin the journal of an object of which no part is on the disk."""
        self.done.clear()
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps(self.head).encode() + b"\n")

    def add(self, part: int) -> None:
        os.write(self._descriptor, b"%d\n" % part)  # one call, so that a line is written whole or not at all
        self.done.add(part)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def _fetch(source: Object, partial: Path, journal: _Journal, threads: int) -> str:
    """Bring in all parts that are missing; returns the sha256 of the whole."""
    parts = -(-source.size // PART_BYTES)
    stop, digest = threading.Event(), hashlib.sha256()
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)

    def part(number: int) -> None:
        if stop.is_set():
            raise _StoppedError
        try:
            call_with_retry(
                lambda: _fetch_part(source, descriptor, number), source.address, f"reading part {number}"
            )
            journal.add(number)
        except BaseException:
            stop.set()
            raise

    pool = ThreadPoolExecutor(threads, thread_name_prefix="s3")
    pending: dict[int, Future[None]] = {}
    try:
        if source.size:
            os.posix_fallocate(descriptor, 0, source.size)  # a full disk is found now, and not in an hour
        pending = {number: pool.submit(part, number) for number in range(parts) if number not in journal.done}
        for number in range(parts):
            if number in pending:
                pending[number].result()
            digest.update(os.pread(descriptor, PART_BYTES, number * PART_BYTES))
    except _StoppedError:
        raise _first_failure(pending.values()) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        os.close(descriptor)
    return digest.hexdigest()


def _first_failure(futures: Iterable[Future[None]]) -> BaseException:
    """Find the error for which the others were stopped."""
    errors = (one.exception() for one in futures if one.done() and not one.cancelled())
    return next(error for error in errors if error is not None and not isinstance(error, _StoppedError))


def _fetch_part(source: Object, descriptor: int, number: int) -> None:
    place = number * PART_BYTES
    for chunk in _chunks(source, place, min(place + PART_BYTES, source.size)):
        place += os.pwrite(descriptor, chunk, place)


def _chunks(source: Object, start: int, end: int) -> Iterator[bytes]:
    """Yield the object's bytes from `start` to `end`; ConnectionError where another number of them comes."""
    bucket, key = bucket_and_key(source.address)
    # If-Match: were the object replaced meanwhile, its parts would be mixed with those of the old one.
    same = {"IfMatch": source.etag} if source.etag else {}
    answer = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **same)
    if answer["ContentLength"] != end - start:
        raise ConnectionError(f"{answer['ContentLength']} bytes came instead of {end - start}")
    come = 0
    with contextlib.closing(answer["Body"]) as body:
        for chunk in body.iter_chunks(1 << 20):
            come += len(chunk)
            yield chunk
    if come != end - start:
        raise ConnectionError(f"{come} bytes came instead of {end - start}")


def read_range(source: Object, start: int, end: int) -> bytes:
    """Read the object's bytes from `start` to `end`, if it is still the one that was listed.

    Raises:
        OSError: see `s3.call_with_retry`.
    """
    doing = f"reading bytes {start} to {end}"
    return call_with_retry(lambda: b"".join(_chunks(source, start, end)), source.address, doing)


# --- up -------------------------------------------------------------------------------------------------------


def upload(file: Path, address: str, *, threads: int = THREADS) -> None:
    """Copy a file to S3, where it appears whole, with its sha256 in the metadata.

    Raises:
        OSError: see `s3.call_with_retry`.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        metadata = {SHA256: hashlib.file_digest(opened, "sha256").hexdigest()}
    if size <= PART_BYTES:
        put(address, file.read_bytes(), Metadata=metadata)
        return
    bucket, key = bucket_and_key(address)
    where = {"Bucket": bucket, "Key": key}
    begun = call_with_retry(
        lambda: client().create_multipart_upload(Metadata=metadata, **where), address, "beginning an upload"
    )
    where["UploadId"] = begun["UploadId"]
    try:
        parts = _send_parts(file, size, address, where, threads)
        _complete(address, where, parts, size)
    except BaseException:
        with contextlib.suppress(Exception):  # the bucket's lifecycle rule removes what is left
            client().abort_multipart_upload(**where)
        raise


def _send_parts(
    file: Path, size: int, address: str, where: dict[str, Any], threads: int
) -> list[dict[str, Any]]:
    length = max(PART_BYTES, -(-size // MOST_PARTS))
    stop = threading.Event()

    def send(number: int) -> dict[str, Any]:
        if stop.is_set():
            raise _StoppedError
        try:
            with file.open("rb") as opened:
                opened.seek((number - 1) * length)
                content = opened.read(length)
            digest = content_md5(content)
            answer = call_with_retry(
                lambda: client().upload_part(PartNumber=number, Body=content, ContentMD5=digest, **where),
                address,
                f"writing part {number}",
            )
            return {"PartNumber": number, "ETag": answer["ETag"]}
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="s3") as pool:
        futures = [pool.submit(send, number + 1) for number in range(-(-size // length))]
        try:
            return [future.result() for future in futures]
        except _StoppedError:
            raise _first_failure(futures) from None  # type: ignore[arg-type]
        finally:
            stop.set()


def _complete(address: str, where: dict[str, Any], parts: list[dict[str, Any]], size: int) -> None:
    """Put the parts together; the answer to an earlier try may have been lost on the way."""
    bucket, key = where["Bucket"], where["Key"]
    try:
        call_with_retry(
            lambda: client().complete_multipart_upload(MultipartUpload={"Parts": parts}, **where),
            address,
            "ending the upload",
        )
    except OSError as error:
        if "NoSuchUpload" not in str(error):
            raise
    head = call_with_retry(lambda: client().head_object(Bucket=bucket, Key=key), address, "reading")
    if head["ContentLength"] != size:
        raise OSError(
            f"{address} has {head['ContentLength']:,} bytes after the upload of {size:,}; upload it again"
        )


def upload_folder(folder: Path, address: str, *, last: str = "") -> None:
    """Copy all files below `folder` to the address; those whose names end with `last` come last, as a mark."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda path: bool(last) and path.name.endswith(last)):
        upload(file, join(address, *file.relative_to(folder).parts))
