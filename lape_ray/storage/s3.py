"""The connection to S3: credentials, retries, and errors that say what to do.

boto3 finds endpoint, region and credentials as every tool of AWS does: AWS_ENDPOINT_URL, AWS_REGION or
AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine.

boto3 is imported where a connection is made, so that a machine without S3 needs no boto3.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from lape_ray.values.redaction import first_line, refuse_secret

if TYPE_CHECKING:
    from botocore import exceptions

T = TypeVar("T")
RETRY_TIMEOUT_S = 120.0
"""The time for which requests are retried while the server is away."""
CHECK_TIMEOUT_S = 5.0
"""The same for checks before a run, which should end soon."""
CONNECTIONS = 32
LONGEST_WAIT_S = 15.0
log = logging.getLogger(__name__)

_TRANSIENT_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded", "InternalError",
     "ServiceUnavailable", "BadDigest", "IncompleteBody", "OperationAborted"}
)  # fmt: skip


def client() -> Any:
    """Return a client of the S3 that the environment names.

    It is one for each process and environment, and safe for threads.
    """
    names = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    return _client(os.getpid(), names)


@functools.lru_cache(maxsize=4)
def _client(_process: int, _environment: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore import exceptions
    from botocore.config import Config

    endpoint_url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    refuse_secret("AWS_ENDPOINT_URL", endpoint_url)
    config = Config(
        # One policy of retries, below: botocore's own would multiply with it and does not cover answers' bodies.
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=CONNECTIONS,
        # Parts carry Content-MD5, which every server checks; trailing checksums are refused by many.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # A private server has no host name for each bucket.
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    # boto3 knows only the second name.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        s3 = boto3.session.Session().client("s3", config=config, region_name=region)
        s3.meta.events.register("before-sign.s3.DeleteObjects", _add_md5)
        return s3
    except (exceptions.BotoCoreError, ValueError) as error:
        raise translate_error(error, "S3", "opening a connection") from error


def content_md5(content: bytes) -> str:
    """Compute the value of the header Content-MD5: for integrity, not for security."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def _add_md5(request: Any, **_: Any) -> None:
    """Add the checksum to the one request whose body must have it; the newer ones are not known to every server."""
    request.headers["Content-MD5"] = content_md5(request.body)


def call_with_retry(
    call: Callable[[], T], address: str, doing: str, *, timeout_s: float = RETRY_TIMEOUT_S
) -> T:
    """Return what `call` returns; call it again, with growing pauses, while the server is away or overloaded.

    Args:
        doing: what it does, as the error says it, such as "reading"

    Raises:
        FileNotFoundError: the bucket or object does not exist.
        PermissionError: no, wrong or expired credentials, or they do not allow it.
        ConnectionError: the server did not answer properly for `timeout_s` seconds.
        OSError: region or clock are wrong, or the server refuses for another reason, which is said.
    """
    from botocore import exceptions

    deadline, pause = time.monotonic() + timeout_s, 0.25
    while True:
        try:
            return call()
        except (exceptions.BotoCoreError, exceptions.ClientError, ConnectionError) as error:
            if not _is_transient(error):
                raise translate_error(error, address, doing) from error
            if time.monotonic() + pause > deadline:
                raise ConnectionError(
                    f"{address}: {doing} failed for {timeout_s:g} s: {_first_line(error)}; check that the server at "
                    f"{endpoint()} is up, and that AWS_ENDPOINT_URL and AWS_REGION name the right one"
                ) from error
            log.warning("%s: %s failed, trying again: %s", address, doing, _first_line(error))
            time.sleep(
                pause * random.uniform(0.5, 1.0)
            )  # so that the processes of a cluster do not retry together
            pause = min(2 * pause, LONGEST_WAIT_S)


def endpoint() -> str:
    """Return the endpoint that requests go to."""
    try:
        return str(client().meta.endpoint_url)
    except OSError:
        return "the configured endpoint"


def _is_transient(error: Exception) -> bool:
    from botocore import exceptions

    if isinstance(error, exceptions.SSLError):
        return False
    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or _code(error) in _TRANSIENT_CODES
    away = (
        exceptions.EndpointConnectionError,
        exceptions.ConnectionClosedError,
        exceptions.ConnectTimeoutError,
        exceptions.ReadTimeoutError,
        exceptions.ResponseStreamingError,
        exceptions.IncompleteReadError,
        ConnectionError,
    )
    return isinstance(error, away)


def _code(error: exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _first_line(error: Exception) -> str:
    return first_line(error)


def translate_error(error: Exception, address: str, doing: str) -> OSError:
    """Translate an error of boto3 to one of Python's, which says how to mend it."""
    from botocore import exceptions

    no_credentials = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.TokenRetrievalError,
        exceptions.UnauthorizedSSOTokenError,
        exceptions.ProfileNotFound,
    )
    if isinstance(error, no_credentials):
        return PermissionError(
            f"{address}: no credentials for S3 on {os.uname().nodename} ({_first_line(error)}); set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in its environment (on a cluster: of every Ray node)"
        )
    if not isinstance(error, exceptions.ClientError):
        return OSError(f"{address}: {doing} failed: {_first_line(error)}")
    code = _code(error)
    if translate := _SPECIAL_CODES.get(code):
        return translate(error, address)
    if code in _REFUSALS:
        return PermissionError(f"{address}: {doing} is refused ({code}): {_REFUSALS[code]}")
    message = error.response.get("Error", {}).get("Message") or "no reason given"
    return OSError(f"{address}: {doing} is refused by {endpoint()}: {message} ({code})")


def _no_bucket(_: exceptions.ClientError, address: str) -> OSError:
    return FileNotFoundError(
        f"{address}: there is no bucket {_bucket(address)!r} at {endpoint()}; create it, or check the name and "
        "AWS_ENDPOINT_URL"
    )


def _no_object(_: exceptions.ClientError, address: str) -> OSError:
    return FileNotFoundError(f"{address} does not exist at {endpoint()}")


def _wrong_region(error: exceptions.ClientError, address: str) -> OSError:
    region = error.response.get("Error", {}).get("Region") or _headers(error).get("x-amz-bucket-region")
    fix = f"set AWS_REGION={region}" if region else "set AWS_REGION to the region that the bucket was made in"
    ours = client().meta.region_name
    return OSError(f"{address}: bucket {_bucket(address)!r} is not in region {ours!r}; {fix}")


def _wrong_clock(error: exceptions.ClientError, address: str) -> OSError:
    return OSError(
        f"{address}: the clock of {os.uname().nodename} is wrong: {_clocks(_headers(error))}; set it (for example with "
        "`timedatectl set-ntp true`), for S3 refuses requests that are 15 minutes off"
    )


def _replaced(_: exceptions.ClientError, address: str) -> OSError:
    return OSError(f"{address} was replaced by another object while it was read; start again")


_NOT_ALLOWED = (
    "these credentials do not allow it; grant s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject, "
    "s3:DeleteObject and s3:AbortMultipartUpload on its objects"
)
_REFUSALS = {
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret does not fit the access key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the temporary credentials have expired; get new ones",
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to these credentials; unset it, or get new ones",
    **dict.fromkeys(("AccessDenied", "403", "Forbidden", "AllAccessDisabled"), _NOT_ALLOWED),
}
_SPECIAL_CODES: dict[str, Callable[[exceptions.ClientError, str], OSError]] = {
    "NoSuchBucket": _no_bucket,
    **dict.fromkeys(("NoSuchKey", "404"), _no_object),
    **dict.fromkeys(
        ("301", "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed",
         "IllegalLocationConstraintException"),
        _wrong_region,
    ),
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestInTheFuture"), _wrong_clock),
    "PreconditionFailed": _replaced,
}  # fmt: skip


def _bucket(address: str) -> str:
    return address.removeprefix("s3://").partition("/")[0]


def _headers(error: exceptions.ClientError) -> dict[str, str]:
    return dict(error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}))


def _clocks(headers: dict[str, str]) -> str:
    here = datetime.now(UTC).replace(microsecond=0)
    if "date" not in headers:
        return f"it says {here.isoformat()}"
    there = parsedate_to_datetime(headers["date"])
    return f"it says {here.isoformat()}, the server {there.isoformat()}"
