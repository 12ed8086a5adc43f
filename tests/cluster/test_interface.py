"""Workers of several nodes listen where the other nodes reach them. tests/deploy/test_slurm.py has two nodes."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest

from lape_ray.cluster.interface import VARIABLE, meet_at

CARDS = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.7", "fe80::1"], "ib0": ["10.1.0.7"]}


@pytest.mark.parametrize(
    ("address", "before", "after"),
    [
        ("10.0.0.7", None, "eth0"),
        ("10.1.0.7", None, "ib0"),
        ("10.0.0.7", "ib0", "ib0"),
        ("10.9.9.9", None, None),  # behind a translation of addresses: gloo decides
    ],
)
def test_the_interface_of_an_address(
    monkeypatch: pytest.MonkeyPatch, address: str, before: str | None, after: str | None
) -> None:
    cards = {name: [SimpleNamespace(address=one) for one in found] for name, found in CARDS.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    monkeypatch.setenv(VARIABLE, before or "")
    if before is None:
        monkeypatch.delenv(VARIABLE)
    meet_at(address)
    assert os.environ.pop(VARIABLE, None) == after
