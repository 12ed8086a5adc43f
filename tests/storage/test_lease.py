"""Who owns a folder: taken, refused, taken over and lost, on a disk and on S3 with and without conditional puts."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.s3_server import Gateway, conditional, gateway

from lape_ray import storage
from lape_ray.storage import LeaseHeldError, LeaseLostError, check_lease, lease, leased, s3

HOLD = """
import sys, time
from lape_ray.storage import lease, leased
lease.BEAT_S = 0.3
with leased(sys.argv[1], "a test"):
    print("taken", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(params=["disk", "s3", "s3 with conditions"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of each kind of storage: JuiceFS's gateway ignores conditions, and a proxy before it knows them."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.5)
    if request.param == "disk":
        yield str(tmp_path / "run")
        return
    server = request.getfixturevalue("server")
    environment = server.environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{os.urandom(6).hex()}"
    s3.client().create_bucket(Bucket=bucket)
    if request.param == "s3":
        yield f"s3://{bucket}/run"
        return
    with conditional(server.port) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield f"s3://{bucket}/run"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of a minute."""
    monkeypatch.setattr(lease, "BEAT_S", 0.3)
    monkeypatch.setattr(lease, "STALE_S", 3.0)


def another(folder: str) -> subprocess.Popen[str]:
    """Another process of this machine that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def of_another_machine(folder: str, **changes: object) -> None:
    """Make the lease in `folder` one of a machine whose processes cannot be seen from here."""
    address = storage.join(folder, "lease.json")
    values = json.loads(storage.read_text(address))
    storage.write_text(address, json.dumps({**values, "boot": "another", "host": "elsewhere", **changes}))


def test_one_after_the_other(folder: str) -> None:
    with leased(folder, "first") as one:
        one.check()
        check_lease(folder, one.token)
    with leased(folder, "second") as two:
        assert two.token != one.token
        with pytest.raises(LeaseLostError, match=r"belongs to process \d+ on .* now \(second\)"):
            check_lease(folder, one.token)


def test_an_owner_that_lives_is_in_the_way_and_a_dead_one_is_not(folder: str) -> None:
    owner = another(folder)
    try:
        began = time.monotonic()
        with (
            pytest.raises(
                LeaseHeldError, match=rf"process {owner.pid} on .* \(a test\), which is at work there"
            ),
            leased(folder, "late"),
        ):
            pass
        assert time.monotonic() - began < 3 * lease.BEAT_S
        assert "overwrite" not in LeaseHeldError.__doc__
    finally:
        owner.kill()
        owner.wait()
    began = time.monotonic()
    with leased(folder, "next"):
        assert time.monotonic() - began < 10


def test_an_owner_elsewhere_is_dead_when_its_heart_stands_still(
    folder: str, soon: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with leased(folder, "gone"):
        pass
    of_another_machine(folder, released=False)
    began = time.monotonic()
    with leased(folder, "next"):
        assert time.monotonic() - began > lease.STALE_S
    assert "watching for 3 s whether that lives" in capsys.readouterr().out
    of_another_machine(folder, released=False, beat_at=time.time() - lease.ANCIENT_S - 60)
    began = time.monotonic()
    with leased(folder, "next"):
        assert time.monotonic() - began < lease.STALE_S


def test_an_owner_that_was_taken_for_dead_notices(folder: str, soon: None) -> None:
    told: list[str] = []
    with leased(folder, "sleeper") as sleeper:
        sleeper.call_when_lost(lambda: told.append("lost"))
        of_another_machine(folder, owner="somebody", what="run x")
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            time.sleep(0.05)
        assert told == ["lost"]
        with pytest.raises(LeaseLostError, match="elsewhere"):
            sleeper.check()
    values = json.loads(storage.read_text(storage.join(folder, "lease.json")))
    assert (values["owner"], values["released"]) == ("somebody", False)  # nothing of the other's was touched


def test_a_folder_that_was_deleted_is_regained(folder: str, soon: None) -> None:
    with leased(folder, "here") as held:
        storage.delete_folder(folder)
        held.check()
        deadline = time.monotonic() + 20
        while not storage.exists(storage.join(folder, "lease.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        check_lease(folder, held.token)


def test_a_stopped_owner_loses_and_a_damaged_lease_is_watched(folder: str, soon: None) -> None:
    owner = another(folder)
    try:
        owner.send_signal(signal.SIGSTOP)
        of_another_machine(folder)
        with leased(folder, "next"):
            pass
        storage.write_text(storage.join(folder, "lease.json"), "")
        began = time.monotonic()
        with leased(folder, "again"):
            assert time.monotonic() - began > lease.STALE_S
    finally:
        owner.kill()
        owner.wait()


def _race(folder: str, start: float, answers: multiprocessing.Queue[str]) -> None:
    lease.BEAT_S = 0.3
    time.sleep(max(0.0, start - time.time()))
    try:
        with leased(folder, str(os.getpid())):
            answers.put("taken")
            time.sleep(4)
    except LeaseHeldError:
        answers.put("refused")


def test_of_several_at_once_one_gets_it(folder: str) -> None:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = context.Queue()
    start = time.time() + 0.5
    racers = [context.Process(target=_race, args=(folder, start, answers)) for _ in range(4)]
    for racer in racers:
        racer.start()
    found = sorted(answers.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join(30)
    assert found == ["refused", "refused", "refused", "taken"]
