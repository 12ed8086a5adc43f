"""A Ray of one machine, on ports that others may take."""

from __future__ import annotations

import socket

import pytest

from lape_ray.cluster import local

pytestmark = [pytest.mark.timeout(300), pytest.mark.cluster, pytest.mark.slow]


def test_a_port_that_is_taken_meanwhile_is_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    free, given = local.free_ports, list[int]()
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def ports(count: int) -> list[int]:
            found = free(count)
            if not given:
                found[0] = port
            given.append(found[0])
            return found

        monkeypatch.setattr(local, "free_ports", ports)
        with local.local_cluster(num_cpus=1) as cluster:
            assert cluster.address == f"127.0.0.1:{given[-1]}"
    assert given[0] == port
    assert len(given) > 1
