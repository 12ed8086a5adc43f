"""Join network namespaces of this machine, each with a network card of limited bandwidth, and enter them.

Needs Linux, root and the commands `ip` and `tc`. Everything lies in namespaces whose names begin with `PREFIX`, the
bridge too, so that nothing is left where they are deleted, and no rule of the machine's firewall is met.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from common import CannotRunError

PREFIX = "lape-scale-"
DEVICE = "eth0"  # the network card's name in each namespace
PORT = 29500
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
T = TypeVar("T")


def why_not() -> str | None:
    """Say why this machine cannot make such networks; None where it can."""
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not found: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with limited_network(1, bytes_per_s=1e6):
            return None
    except CannotRunError as error:
        return str(error)


@contextlib.contextmanager
def limited_network(members: int, *, bytes_per_s: float) -> Iterator[list[str]]:
    """Make a bridge with `members` namespaces, which send at most `bytes_per_s` each; yields their names.

    It waits while another process of this machine has such a network.

    Raises:
        CannotRunError: the system refuses; with the command and its words.
    """
    names, bridge = [f"{PREFIX}{number}" for number in range(members)], f"{PREFIX}bridge"
    with Path(tempfile.gettempdir(), f"{PREFIX}lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _delete_all()  # what a killed run left
        try:
            _join(names, bridge, bytes_per_s)
            yield names
        finally:
            _delete_all()


def _join(names: list[str], bridge: str, bytes_per_s: float) -> None:
    _run(f"ip netns add {bridge}")
    _run(f"ip -n {bridge} link add bridge0 type bridge")
    _run(f"ip -n {bridge} link set bridge0 up")
    for number, name in enumerate(names):
        _run(f"ip netns add {name}")
        _run(f"ip -n {bridge} link add port{number} type veth peer name {DEVICE} netns {name}")
        _run(f"ip -n {bridge} link set port{number} master bridge0 up")
        _run(f"ip -n {name} addr add {address(number)}/24 dev {DEVICE}")
        _run(f"ip -n {name} link set {DEVICE} up")
        _run(f"ip -n {name} link set lo up")
        limit = f"tbf rate {8 * bytes_per_s:.0f}bit burst 64kb latency 400ms"
        _run(f"tc -n {name} qdisc add dev {DEVICE} root {limit}")


def address(member: int) -> str:
    return f"10.77.0.{member + 1}"


def _run(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise CannotRunError(f"{command}: {done.stderr.strip()}")
    return done.stdout


def _delete_all() -> None:
    for line in _run("ip netns list").splitlines():
        if line.startswith(PREFIX):
            _run(f"ip netns delete {line.split()[0]}")


def enter(name: str) -> None:
    """Bring the calling thread into a namespace: sockets and threads that it makes from now on belong there."""
    library = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as file:
        if library.setns(file.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"network namespace {name}: {os.strerror(ctypes.get_errno())}")


def _within(name: str, make: Callable[[], T]) -> T:
    """Call `make` in a namespace; a socket that it makes stays there."""

    def work() -> T:
        enter(name)
        return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def measured_link(names: list[str], *, payload_bytes: int) -> float:
    """Return the bytes/s of one TCP stream from the first namespace to the second."""
    server = _within(names[1], lambda: socket.create_server((address(1), PORT)))
    client = _within(names[0], lambda: socket.create_connection((address(1), PORT)))
    with server, client, server.accept()[0] as peer, ThreadPoolExecutor(1) as thread:
        began = time.perf_counter()
        sending = thread.submit(client.sendall, bytes(payload_bytes))
        left = payload_bytes
        while left:
            left -= len(peer.recv(min(left, 2**18)))
        sending.result()
        return payload_bytes / (time.perf_counter() - began)
