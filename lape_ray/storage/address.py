"""Addresses: a folder or file of this machine, `s3://bucket/key`, or a checkpoint `hf-hub:OWNER/NAME`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lape_ray.storage.hub import is_hub
from lape_ray.values.redaction import refuse_secret

LONGEST_NAME = 240  # bytes of one part of a path: most file systems take 255, and .NAME.parts is longer
# What `copies` and `transfer` write next to copies.
OURS = re.compile(r"\.lock|\.passing|\.complete(\..*)?|\.arriving|\..*\.parts?", re.DOTALL)


def home() -> Path:
    """Return the folder of everything this package keeps by default: $LAPE_RAY_HOME, else ~/lape_ray.

    A job that `ray job submit` runs has no folder to come back to, so the current directory is no
    place to keep anything.

    Raises:
        ValueError: this process's user has no home, or none by the name that the variable gives.
    """
    given = os.environ.get("LAPE_RAY_HOME")
    try:
        return Path(given or Path.home() / "lape_ray").expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(
            f"{given or '~'}: {error}; set LAPE_RAY_HOME to a folder that can be written"
        ) from None


def is_remote(address: str | Path) -> bool:
    return is_hub(address) or ("://" in str(address) and not str(address).startswith("file://"))


def absolute(address: str) -> str:
    """Return an address that means the same in every process: remote ones as they are, local ones absolute."""
    if is_remote(address):
        return address.rstrip("/")
    return str(Path(address.removeprefix("file://")).expanduser().absolute())


def absolute_store(uri: str, *, of: Path | None = None) -> str:
    """Return the address of a tracking store that means the same in every process: files of this machine absolute.

    Args:
        of: the folder that the file of an SQLite address lies in, where this package chose it.

    Raises:
        ValueError: it is a database in memory, which no other process sees, or no address of SQLite; or the file's
            folder has a character that stands for something else in one.
    """
    if uri.startswith("sqlite"):
        match = re.fullmatch(r"(sqlite(?:\+\w+)?:///)([^?]*)(\?.*)?", uri)
        if match is None or match[2] in ("", ":memory:"):
            raise ValueError(f"{uri!r} names no file that other processes can open; write sqlite:///FILE.db")
        if match[2].startswith("file:"):
            return uri
        path = Path(match[2]).expanduser()
        folder = of or (Path() if path.is_absolute() else Path.cwd())
        if wrong := next((letter for letter in "?%" if letter in str(folder)), None):
            raise ValueError(
                f"{folder} has a {wrong!r}, which the address of an SQLite file cannot hold; set LAPE_RAY_HOME to a "
                "folder without one, or --tracking.uri or MLFLOW_TRACKING_URI to another store"
            )
        return match[1] + str(path.absolute()) + (match[3] or "")
    if "://" in uri or re.fullmatch(r"databricks(-uc)?|uc(:.*)?", uri):
        return uri
    file = uri.removeprefix("file:")
    return uri.removesuffix(file) + str(Path(file).expanduser().absolute())


def join(address: str, *parts: str) -> str:
    """Join parts to an address: `address/part/...`."""
    return "/".join([address.rstrip("/"), *parts])


def bucket_and_key(address: str) -> tuple[str, str]:
    """Split `s3://bucket/some/key` into ("bucket", "some/key"); the key of a whole bucket is empty.

    Raises:
        ValueError: it is no such address; says which kinds are known.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    refuse_secret("address", address)
    if is_hub(address):
        raise ValueError(f"{address!r}: the hub is read for checkpoints alone; give a folder or s3://")
    if scheme != "s3":
        raise ValueError(f"{address!r}: addresses of kind {scheme}:// are not known; give a folder or s3://")
    if not bucket:
        raise ValueError(f"{address!r} names no bucket; write s3://BUCKET/PREFIX")
    if "?" in address:
        raise ValueError(
            f"{address!r} has options behind '?'; set AWS_ENDPOINT_URL and AWS_REGION in the environment instead"
        )
    return bucket, key.strip("/")


def safe_relative(name: str, what: str, fix: str) -> str:
    """Return `name`, which was read from data, where it may become a path below a folder.

    Raises:
        ValueError: as a path it could lead elsewhere, cannot be written, or is the name of a file that this package
            keeps there itself; says `what` has that name, why it is refused, and `fix`.
    """
    for part in name.split("/"):
        if reason := _unsafe(part):
            raise ValueError(f"{what} is refused, for as a file's name {name[:80]!r} {reason}; {fix}")
    return name


def _unsafe(part: str) -> str:
    """Say why a part of a path is refused; empty: it is not."""
    if part in ("", ".", ".."):
        return f"has the part {part!r}"
    if any(character < " " or character in "\\\x7f" for character in part):
        return "has a backslash or control character"
    try:
        if len(os.fsencode(part)) > LONGEST_NAME:
            return f"has a part of more than {LONGEST_NAME} bytes"
    except UnicodeEncodeError:
        return "has a character that no file's name can have"
    return f"has the part {part!r}, which is one of the cache's own files" if OURS.fullmatch(part) else ""
