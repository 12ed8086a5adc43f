"""Servers for the tests of S3: JuiceFS's gateway, which speaks it for real, a proxy that can hold it up, and a liar."""

from __future__ import annotations

import contextlib
import html
import http.client
import http.server
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3

from lape_ray.cluster.local import executable, free_ports

KEY, SECRET = "testuser", "testpassword"


def access(port: int, home: Path) -> dict[str, str]:
    """Variables by which a process finds the S3 of that port, and no profile; its copies lie in `home`."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(home),
        "LAPE_RAY_CACHE": str(home / "cache"),
    }


class Gateway:
    """An S3 server over a folder; it keeps its port when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.meta = f"sqlite3://{folder}/meta.db"
        self.log = folder / "gateway.log"
        self.port = free_ports(1)[0]
        self.process: subprocess.Popen[bytes] | None = None
        command = [executable("juicefs"), "format", "--storage", "file", "--bucket", f"{folder}/objects"]
        subprocess.run([*command, self.meta, "lape-test"], check=True, capture_output=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            # Ray Train's uploads go through Arrow, whose trailing checksums this server refuses.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def start(self) -> None:
        command = [executable("juicefs"), "gateway", "--no-banner", "--multi-buckets", "--keep-etag"]
        command += ["--object-meta", self.meta, f"127.0.0.1:{self.port}"]
        environment = {**os.environ, "MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/minio/health/live", timeout=2).read()
                return
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def gateway(folder: Path) -> Iterator[Gateway]:
    server = Gateway(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Proxy:
    """Passes bytes on to a server's port; counts those that come back, and holds them up after `limit`.

    `rate`: bytes that pass in a second, all connections together; None: as fast as they come.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.received = 0
        self.limit: int | None = None
        self.rate: float | None = None
        self._free_at, self._lock = 0.0, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, count: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if count:
                    while self.limit is not None and self.received > self.limit:
                        time.sleep(0.01)
                    self.received += len(data)
                    self._hold_up(len(data))
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _hold_up(self, size: int) -> None:
        if self.rate is not None:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + size / self.rate
                until = self._free_at
            time.sleep(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def conditional(port: int) -> Iterator[int]:
    """A port before the gateway's that answers conditional puts as Amazon's S3 does; JuiceFS ignores conditions."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                if self.command == "PUT" and not self.allowed():
                    self.reply(
                        412, [], b"<Error><Code>PreconditionFailed</Code><Message>no</Message></Error>"
                    )
                    return
                status, headers, content = self.passed_on(body)
            self.reply(status, headers, content)

        def allowed(self) -> bool:
            fresh, same = self.headers.get("If-None-Match"), self.headers.get("If-Match")
            if fresh is None and same is None:
                return True
            bucket, _, key = self.path.lstrip("/").partition("/")
            try:
                tag = direct.head_object(Bucket=bucket, Key=urllib.parse.unquote(key))["ETag"]
            except direct.exceptions.ClientError:
                tag = None
            return tag is None if fresh is not None else tag == same

        def passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer.status, answer.getheaders(), content

        def reply(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

        def log_message(self, *_: object) -> None: ...

    direct = boto3.session.Session(KEY, SECRET, region_name="us-east-1").client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}"
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def refusing(
    status: int, code: str, *, headers: dict[str, str] | None = None, extra: str = ""
) -> Iterator[str]:
    """The address of a server that answers every request with one of S3's errors (or with 200 and nothing)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<Error><Code>{code}</Code><Message>no</Message>{extra}</Error>".encode() if code else b""
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def holding(objects: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server whose every bucket has these keys, which real ones may refuse; its address, and the keys it gave."""
    given: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            key = urllib.parse.unquote(path).lstrip("/").partition("/")[2]
            asked = urllib.parse.parse_qs(query)
            if "list-type" in asked:
                prefix = asked.get("prefix", [""])[0]
                as_url = asked.get("encoding-type") == ["url"]
                self.answer(200, listed(prefix, as_url).encode(), {})
                return
            given.append(key)
            if key not in objects:
                self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
                return
            first, last = 0, len(objects[key]) - 1
            if span := self.headers.get("Range"):
                first, last = map(int, span.removeprefix("bytes=").split("-"))
            self.answer(206 if span else 200, objects[key][first : last + 1], {"ETag": '"e"'})

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    def listed(prefix: str, as_url: bool) -> str:
        rows = [
            f"<Contents><Key>{urllib.parse.quote(key, safe='') if as_url else html.escape(key)}</Key>"
            f"<Size>{len(content)}</Size><ETag>&quot;e&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, content in objects.items()
            if key.startswith(prefix)
        ]
        encoding = "<EncodingType>url</EncodingType>" if as_url else ""
        return (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
            f"{encoding}<KeyCount>{len(rows)}</KeyCount><IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>"
        )

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", given
    finally:
        server.shutdown()
        server.server_close()
