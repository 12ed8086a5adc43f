"""Which Ray a command connects to, and who may reach one that it starts; test_secrets_ray.py tries it from outside."""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import services

from lape_ray.cluster import connection
from lape_ray.cluster.local import LocalCluster, free_ports, own_token

CASES = [
    ({}, False),
    ({"RAY_AUTH_MODE": "token"}, False),
    ({"RAY_AUTH_MODE": "disabled"}, True),
    ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, True),
    ({"RAY_AUTH_TOKEN": "x"}, True),
    ({"RAY_AUTH_TOKEN_PATH": "token"}, True),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one, of a user without settings."""
    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    yield tmp_path
    monkeypatch.undo()
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


@pytest.mark.parametrize(("variables", "settled"), CASES, ids=[" ".join(each) for each, _ in CASES])
def test_a_users_own_settings_stay(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], settled: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert connection._has_authentication() is settled


def test_a_token_that_a_user_keeps_in_a_file_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("x" * 40)
    assert not connection._has_authentication(), (
        "Ray wrote this file itself, for all to read, where no mode was set"
    )
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert connection._has_authentication()


@pytest.fixture
def note(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file where `ray start` notes its address, on a machine without any Ray."""
    monkeypatch.setattr(services, "find_gcs_addresses", functools.cache(frozenset))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short: a socket's path has at most 107 bytes
        monkeypatch.setenv("RAY_TMPDIR", folder)
        file = Path(folder, "ray/ray_current_cluster")
        file.parent.mkdir()
        yield file


def closed_address() -> str:
    return f"{services.get_node_ip_address()}:{free_ports(1)[0]}"


@pytest.mark.parametrize("address", ["CLOSED", "", "no address"])
def test_a_file_that_names_a_dead_cluster_is_left_aside(
    note: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    note.write_text(address.replace("CLOSED", closed_address()))
    assert connection.find_cluster() is None
    said = capsys.readouterr().out
    assert f"{note} names does not answer" in said
    assert "starts its own" in said


@pytest.mark.parametrize("given", ["CLOSED", "ray://CLOSED", "no address", "auto"])
def test_an_address_that_the_user_named_must_answer(
    note: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    given = given.replace("CLOSED", closed_address())
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(
        ValueError, match=f"no Ray answers at RAY_ADDRESS={given} .*: start the cluster, correct"
    ):
        connection.find_cluster()


@pytest.mark.parametrize("start", ["", "ray://", "http://ann://"])
def test_no_part_of_an_account_of_an_address_is_shown(
    note: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    for account in ("user:hidden", "hidden", "user:pass/hidden", "user:p@hidden"):
        monkeypatch.setenv("RAY_ADDRESS", f"{start}{account}@127.0.0.1:{free_ports(1)[0]}")
        with pytest.raises(
            ValueError, match=r"^RAY_ADDRESS=\.\.\.@127\.0\.0\.1:\d+ has an account, .*RAY_AUTH_TOKEN"
        ) as refusal:
            connection.find_cluster()
        assert "hidden" not in str(refusal.value)


def test_a_cluster_that_answers_is_taken(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert connection.find_cluster() is None
    with socket.create_server(("0.0.0.0", 0)) as server:
        address = f"{services.get_node_ip_address()}:{server.getsockname()[1]}"
        note.write_text(address)
        assert connection.find_cluster() == address
        for given in (address, "auto"):
            monkeypatch.setenv("RAY_ADDRESS", given)
            assert connection.find_cluster() == address


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_the_processes_of_a_local_ray_know_its_address(note: Path) -> None:
    note.write_text(closed_address())  # for which `ray.init` would wait two minutes
    with connection.connected():
        own = ray.get_runtime_context().gcs_address
        assert ray.get(ray.remote(os.getenv).remote("RAY_ADDRESS")) == own
    assert not {"RAY_ADDRESS", "RAY_GCS_SERVER_PORT"} & os.environ.keys()


def test_a_token_is_new_each_time_and_shown_nowhere(home: Path) -> None:
    tokens = {own_token()["RAY_AUTH_TOKEN"] for _ in range(10)}
    assert len(tokens) == 10
    assert min(map(len, tokens)) >= 40
    one = own_token()
    assert one["RAY_AUTH_TOKEN"] not in repr(LocalCluster("host:1", "http://host:2", one, 1))
    with connection._token_of_its_own():
        assert os.environ["RAY_AUTH_TOKEN"] not in tokens
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"} & os.environ.keys()
