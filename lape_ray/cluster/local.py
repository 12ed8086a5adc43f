"""A Ray cluster of this machine alone: on free ports, beside any other, and gone when its block ends.

It is the `ray` command run as a child process. `ray stop` would stop every Ray on the host, so what was
started is stopped by its process ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

ANSWER_S = 3.0  # within which a server accepts a connection
STARTS = 3  # tries to start, where another process takes a port first


class _PortTakenError(RuntimeError):
    """Another process has taken a port."""


@dataclass(frozen=True)
class LocalCluster:
    """The addresses of a running cluster."""

    address: str
    """The control service's, for RAY_ADDRESS."""
    dashboard: str
    """The dashboard's and the job server's: http://host:port."""
    environment: dict[str, str] = field(repr=False)
    """The variables that a process needs to connect: address, access token, and no proxy in between."""
    pid: int
    """The process that all others of the cluster descend from."""


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on at this moment, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def check_answers(address: str) -> None:
    """Raise an OSError where nobody listens at the host and port of `address`; a ValueError where it names none."""
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    port = parts.port or {"http": 80, "https": 443, "ray": 10001}.get(parts.scheme, 6379)
    socket.create_connection((parts.hostname or "", port), timeout=ANSWER_S).close()


def own_token() -> dict[str, str]:
    """Return variables that give a Ray a token which nobody else knows; Ray keeps it in no file.

    A person who reaches a Ray without a token can run code as its owner, also over the loopback device.
    """
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_urlsafe(32)}


def _past_proxies() -> dict[str, str]:
    """Return variables by which requests to this machine go to no proxy, which would see the token."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    return dict.fromkeys(("no_proxy", "NO_PROXY"), f"{known},127.0.0.1" if known else "127.0.0.1")


def executable(name: str) -> str:
    """Return the path of a command of the environment that runs this code."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


@contextlib.contextmanager
def local_cluster(*, num_cpus: int, start_timeout_s: float = 90) -> Iterator[LocalCluster]:
    """Start a head node with `num_cpus` CPUs and stop it, with all that it started, at the end."""
    with contextlib.ExitStack() as stack:
        for attempt in range(STARTS):
            try:
                yield stack.enter_context(_started(num_cpus, start_timeout_s))
                return
            except _PortTakenError:  # between the moment it was found free and now
                if attempt + 1 == STARTS:
                    raise


@contextlib.contextmanager
def _started(num_cpus: int, start_timeout_s: float) -> Iterator[LocalCluster]:
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    folder = tempfile.mkdtemp(prefix="lape-", dir="/tmp")  # short: a socket's path has at most 107 bytes
    log = Path(folder) / "start.log"
    command = [
        executable("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]  # fmt: skip
    access = own_token() | _past_proxies()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | access
    # A submitted `python ...` is looked up on this path: it must be the Python that runs this code.
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        address = f"127.0.0.1:{gcs}"
        cluster = LocalCluster(
            address, f"http://127.0.0.1:{dashboard}", {"RAY_ADDRESS": address, **access}, process.pid
        )
        _wait_until_ready(cluster, process, log, start_timeout_s)
        yield cluster
    finally:
        stop_tree(process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(
    cluster: LocalCluster, process: subprocess.Popen[bytes], log: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if process.poll() is not None:
            said = log.read_text()
            kind = _PortTakenError if "already in use" in said else RuntimeError
            raise kind(f"ray start ended with code {process.returncode}:\n{said[-2000:]}")
        # The job server forwards to an agent on the node; a listing is answered only when both are up.
        token = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/", headers=token)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with (
            contextlib.suppress(urllib.error.URLError, OSError, ValueError),
            direct.open(request, timeout=5) as answer,
        ):
            json.load(answer)
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"Ray was not ready after {timeout_s:g} s:\n{log.read_text()[-2000:]}")
        time.sleep(0.3)


def stop_tree(pid: int, grace_s: float = 5) -> None:
    """End a process and all its descendants: SIGTERM, then SIGKILL for what is left after `grace_s`."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_s)
