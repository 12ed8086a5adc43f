"""Verified blocks for the other nodes of a run, so that S3 sends each of them once, and the way to ask for them.

Every node is asked for the parts of which the number, over the number of nodes, leaves its own: it asks S3. Bytes
travel as Ray's do, unencrypted between nodes that trust each other; who asks must know the run's token.
"""

from __future__ import annotations

import contextlib
import hmac
import http.client
import http.server
import re
import socket
import threading
import time
from collections.abc import Callable

Give = Callable[[str, int, int], bytes | None]
TIMEOUT_S = 30.0
REST_S = 30.0
"""The time for which a node that did not answer is not asked again."""


class Peers:
    """The nodes of a run, of which this is one; until `join`, it is alone."""

    def __init__(self) -> None:
        self._addresses: tuple[str, ...] = ("",)
        self._own = 0
        self._token = ""
        self._resting: dict[int, float] = {}
        self._connections = threading.local()

    def join(self, addresses: tuple[str, ...], own: int, token: str) -> None:
        """Take the place `own` among the nodes of these addresses, host:port."""
        self._addresses, self._own, self._token = addresses, own, token

    def is_own(self, part: int) -> bool:
        """Tell whether this node asks S3 for a part."""
        return part % len(self._addresses) == self._own

    def ask(self, part: int, name: str, first: int, count: int) -> bytes | None:
        """Ask the node that a part belongs to for blocks of the set of that name; None: S3 has to be asked."""
        node = part % len(self._addresses)
        if self._resting.get(node, 0.0) > time.monotonic():
            return None
        connections = self._connections.__dict__
        connection = connections.get(str(node))
        if connection is None:
            connection = http.client.HTTPConnection(self._addresses[node], timeout=TIMEOUT_S)
            connections[str(node)] = connection
        try:
            authorization = {"Authorization": f"Bearer {self._token}"}
            connection.request("GET", f"/{name}/{first}/{count}", headers=authorization)
            answer = connection.getresponse()
            content: bytes = answer.read()
            if answer.status == 200:
                return content
        except (OSError, http.client.HTTPException):
            connection.close()
        self._resting[node] = time.monotonic() + REST_S
        return None

    def distrust(self, part: int) -> None:
        """Ask a node for nothing any more, for what it sent was wrong."""
        self._resting[part % len(self._addresses)] = float("inf")


def serve(host: str, token: Callable[[], str], give: Give) -> http.server.ThreadingHTTPServer:
    """Serve blocks to the other nodes, in threads, at an address of this one; returns the server.

    Args:
        token: returns what who asks must know; empty: nobody may ask yet.
        give: returns blocks: (name of the set, first, count).
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 10 * TIMEOUT_S

        def do_GET(self) -> None:
            given, known = self.headers.get("Authorization", ""), token()
            if not known or not hmac.compare_digest(given.encode(), f"Bearer {known}".encode()):
                return self._answer(403, b"")
            asked = re.fullmatch(r"/([0-9a-f]{16})/(\d{1,12})/(\d{1,6})", self.path)
            content = give(asked[1], int(asked[2]), int(asked[3])) if asked else None
            return self._answer(404, b"") if content is None else self._answer(200, content)

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing of requests."""

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        request_queue_size = 128

    server = Server((host, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True, name="peers").start()
    return server
