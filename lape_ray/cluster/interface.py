"""The network interface by which the workers of several nodes find each other."""

from __future__ import annotations

import os

import psutil

VARIABLE = "GLOO_SOCKET_IFNAME"


def meet_at(address: str) -> None:
    """Let gloo listen on the interface of this node's `address`, an IP, unless the user named one.

    By itself it takes the one that the host's name stands for, which /etc/hosts often says is 127.0.0.1 or, on Debian,
    127.0.1.1: workers on other nodes cannot reach that.
    """
    if VARIABLE in os.environ:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ[VARIABLE] = name
            return
