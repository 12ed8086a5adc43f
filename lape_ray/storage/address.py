"""What an address is: a folder or file of this machine, or `s3://bucket/key`."""

from __future__ import annotations

import os
from pathlib import Path

from lape_ray.redaction import refuse_secret


def home() -> Path:
    """The folder of everything this package keeps by default: $LAPE_RAY_HOME, else ~/lape_ray.

    A job that `ray job submit` runs has no folder of its own to come back to, so the current directory is no
    place to keep anything.
    """
    return Path(os.environ.get("LAPE_RAY_HOME") or Path.home() / "lape_ray").expanduser().absolute()


def is_remote(address: str | Path) -> bool:
    return "://" in str(address) and not str(address).startswith("file://")


def absolute(address: str) -> str:
    """An address that means the same in every process: remote ones as they are, local ones absolute."""
    if is_remote(address):
        return address.rstrip("/")
    return str(Path(address.removeprefix("file://")).expanduser().absolute())


def join(address: str, *parts: str) -> str:
    """`address/part/...`."""
    return "/".join([address.rstrip("/"), *parts])


def bucket_and_key(address: str) -> tuple[str, str]:
    """`s3://bucket/some/key` -> ("bucket", "some/key"); the key of a whole bucket is empty.

    Raises:
        ValueError: it is no such address; says which kinds there are.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    refuse_secret("address", address)
    if scheme != "s3":
        raise ValueError(f"{address!r}: addresses of kind {scheme}:// are not known; give a folder or s3://")
    if not bucket:
        raise ValueError(f"{address!r} names no bucket; write s3://BUCKET/PREFIX")
    if "?" in address:
        raise ValueError(
            f"{address!r} has options behind '?'; set AWS_ENDPOINT_URL and AWS_REGION in the environment instead"
        )
    return bucket, key.strip("/")
