"""Who may reach a Ray that a job starts for itself; test_secrets_ray.py tries it from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lape_ray.cluster import connection
from lape_ray.cluster.local import LocalCluster, own_token

CASES = [
    ({"RAY_ADDRESS": "local"}, False),
    ({"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "token"}, False),
    ({"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}, True),
    ({"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, True),
    ({"RAY_ADDRESS": "local", "RAY_AUTH_TOKEN": "x"}, True),
    ({"RAY_ADDRESS": "local", "RAY_AUTH_TOKEN_PATH": "token"}, True),
    ({"RAY_ADDRESS": "127.0.0.1:6379"}, True),
    ({"RAY_ADDRESS": "ray://127.0.0.1:10001"}, True),
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
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not connection._has_authentication(), (
        "Ray wrote this file itself, for all to read, where no mode was set"
    )
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert connection._has_authentication()


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_the_processes_of_a_local_ray_know_its_address(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_address", lambda: None)  # another Ray of this host is not asked
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
