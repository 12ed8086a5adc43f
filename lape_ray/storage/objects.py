"""The objects of a bucket: listing, small texts and deletion."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lape_ray.storage.address import bucket_and_key
from lape_ray.storage.s3 import RETRY_TIMEOUT_S, call_with_retry, client, content_md5

_OTHERS_WERE_FASTER = frozenset(
    {"PreconditionFailed", "ConditionalRequestConflict", "412", "409", "NoSuchKey"}
)
DELETED_AT_ONCE = 1000  # the most keys of one request


@dataclass(frozen=True)
class Object:
    """One object of a bucket.

    Attributes:
        address: s3://bucket/key
        size: in bytes
        etag: changes with the content
        modified: when it was written, in seconds since 1970 by the server's clock
    """

    address: str
    size: int
    etag: str
    modified: float = 0.0

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.address.rpartition("/")[2]


def listing(prefix: str, *, timeout_s: float = RETRY_TIMEOUT_S) -> list[Object]:
    """List all objects whose address begins with `prefix`, in the order of their keys.

    The empty objects by which some servers and tools mark folders are left out.
    """
    return [one for one in _everything(prefix, timeout_s) if not one.address.endswith("/")]


def _everything(prefix: str, timeout_s: float = RETRY_TIMEOUT_S) -> list[Object]:
    bucket, _ = bucket_and_key(prefix)
    key = prefix.removeprefix(f"s3://{bucket}").removeprefix(
        "/"
    )  # with the slash at its end, if there is one
    found: list[Object] = []
    arguments = {"Bucket": bucket, "Prefix": key}
    while True:
        page = call_with_retry(
            lambda: client().list_objects_v2(**arguments), prefix, "listing", timeout_s=timeout_s
        )
        found += [
            Object(
                f"s3://{bucket}/{one['Key']}",
                int(one["Size"]),
                str(one.get("ETag", "")).strip('"'),
                one["LastModified"].timestamp(),
            )
            for one in page.get("Contents", ())
        ]
        if not page.get("IsTruncated"):
            return found
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def exists(address: str, *, timeout_s: float = RETRY_TIMEOUT_S) -> bool:
    """Tell whether an object of this address exists, or objects below it."""
    bucket, key = bucket_and_key(address)
    for prefix in (key, f"{key}/"):
        request = functools.partial(client().list_objects_v2, Bucket=bucket, MaxKeys=2, Prefix=prefix)
        page = call_with_retry(request, address, "listing", timeout_s=timeout_s)
        keys = [one["Key"] for one in page.get("Contents", ()) if not one["Key"].endswith("/")]
        if any(found == key or found.startswith(f"{key}/") for found in keys):
            return True
    return False


def get_text(address: str) -> str:
    """Read the text of an object; FileNotFoundError where it does not exist."""
    text, _ = get_tagged(address)
    return text


def get_tagged(address: str, *, timeout_s: float = RETRY_TIMEOUT_S) -> tuple[str, str]:
    """Read the text of an object and its ETag; FileNotFoundError where it does not exist."""
    bucket, key = bucket_and_key(address)

    def get() -> tuple[bytes, str]:
        answer = client().get_object(Bucket=bucket, Key=key)
        return answer["Body"].read(), str(answer["ETag"])

    content, tag = call_with_retry(get, address, "reading", timeout_s=timeout_s)
    return content.decode(errors="replace"), tag


def modified(address: str) -> float:
    """Return when an object was written, in seconds since 1970 by the server's clock."""
    bucket, key = bucket_and_key(address)
    head = call_with_retry(lambda: client().head_object(Bucket=bucket, Key=key), address, "reading")
    return float(head["LastModified"].timestamp())


def put_if(
    address: str, content: bytes, *, tag: str | None, timeout_s: float = RETRY_TIMEOUT_S
) -> str | None:
    """Make an object that does not exist (`tag` None), or replace the one with this ETag; returns the new ETag.

    None means that another writer was faster. Not every server knows the conditions (If-None-Match, If-Match): one
    that does not writes always.
    """
    from botocore import exceptions

    bucket, key = bucket_and_key(address)
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}

    def call() -> str | None:
        try:
            answer = client().put_object(
                Bucket=bucket, Key=key, Body=content, ContentMD5=content_md5(content), **condition
            )
        except exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") in _OTHERS_WERE_FASTER:
                return None
            raise
        return str(answer["ETag"])

    return call_with_retry(call, address, "writing", timeout_s=timeout_s)


def put(address: str, content: bytes, *, timeout_s: float = RETRY_TIMEOUT_S, **options: Any) -> None:
    """Make an object whole; the server compares its MD5."""
    bucket, key = bucket_and_key(address)
    call_with_retry(
        lambda: client().put_object(
            Bucket=bucket, Key=key, Body=content, ContentMD5=content_md5(content), **options
        ),
        address,
        "writing",
        timeout_s=timeout_s,
    )


def delete(address: str, *, timeout_s: float = RETRY_TIMEOUT_S) -> None:
    """Delete one object; nothing happens where it does not exist."""
    bucket, key = bucket_and_key(address)
    call_with_retry(
        lambda: client().delete_object(Bucket=bucket, Key=key), address, "deleting", timeout_s=timeout_s
    )


def delete_below(address: str) -> None:
    """Delete all objects below an address."""
    bucket, _ = bucket_and_key(address)
    found = _everything(f"{address.rstrip('/')}/")
    keys = [one.address.removeprefix(f"s3://{bucket}/") for one in reversed(found)]  # folders' marks last
    for start in range(0, len(keys), DELETED_AT_ONCE):
        wanted = {"Objects": [{"Key": key} for key in keys[start : start + DELETED_AT_ONCE]], "Quiet": True}
        request = functools.partial(client().delete_objects, Bucket=bucket, Delete=wanted)
        answer = call_with_retry(request, address, "deleting")
        if failed := answer.get("Errors"):
            raise OSError(
                f"{address}: {len(failed)} objects could not be deleted, the first is {failed[0].get('Key')}: "
                f"{failed[0].get('Message')} ({failed[0].get('Code')})"
            )


def check_region(address: str, *, timeout_s: float = RETRY_TIMEOUT_S) -> None:
    """Check that the bucket is where the environment says; an OSError names its region.

    boto3 finds the right region by itself, but Ray Train's upload of checkpoints, through another library, does not.
    """
    bucket, _ = bucket_and_key(address)
    try:
        answer = call_with_retry(
            lambda: client().head_bucket(Bucket=bucket),
            address,
            "looking for the bucket",
            timeout_s=timeout_s,
        )
    except PermissionError:  # reading and writing may be allowed nevertheless
        return
    region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    ours = client().meta.region_name
    if region and region != ours:
        raise OSError(
            f"{address}: bucket {bucket!r} is in region {region}, not in {ours}; set AWS_REGION={region}"
        )
