"""S3 against a real server: what is stored, staged, resumed and refused."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import botocore.auth
import numpy as np
import pytest
from helpers.commands import run_here
from helpers.s3_server import Gateway, Proxy, gateway, holding, refusing

from lape_ray import storage
from lape_ray.config import DataConfig
from lape_ray.data.beton import check_beton, write_beton
from lape_ray.data.loader import build_loader
from lape_ray.data.remote import local_split
from lape_ray.data.sources import digits, open_source
from lape_ray.data.split import read_split_info
from lape_ray.storage import copies, objects, s3, transfer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def bucket(server: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of the test's own, a cache, and nothing else of AWS in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))  # without the profiles of the user
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("LAPE_RAY_CACHE", str(tmp_path / "cache"))
    name = f"b{os.urandom(6).hex()}"
    s3.client().create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as raw pixels: 5.6 MB, which are two parts."""
    path = tmp_path_factory.mktemp("beton") / "digits.beton"
    write_beton(digits(), path, workers=1)
    return path


def put_beton(beton: Path, bucket: str) -> str:
    storage.upload_folder(beton.parent, f"{bucket}/data", last=".json")
    return f"{bucket}/data/digits.beton"


def large_file(folder: Path, size: int = 40 << 20) -> Path:
    path = folder / "large.bin"
    path.write_bytes(np.random.default_rng(0).bytes(size))
    return path


def in_process(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_verb_is_hidden_by_the_module_of_its_name() -> None:
    """A module of a package takes the place of what the package imported under the same name before."""
    assert not [name for name in storage.__all__ if isinstance(getattr(storage, name), ModuleType)]


# --- texts, files and folders ---------------------------------------------------------------------------------


def test_texts_and_folders(bucket: str) -> None:
    address = storage.join(bucket, "runs", "a", "run.json")
    assert not storage.exists(address)
    storage.write_text(address, "één")
    assert storage.read_text(address) == "één"
    assert storage.exists(address)
    assert storage.exists(f"{bucket}/runs/a")
    assert not storage.exists(f"{bucket}/runs/a/run")  # the beginning of a name is no name
    storage.write_text(f"{bucket}/runs/ab/run.json", "")
    storage.delete_folder(f"{bucket}/runs/a")
    assert [one.address for one in storage.listing(f"{bucket}/runs")] == [f"{bucket}/runs/ab/run.json"]
    storage.check_writable(f"{bucket}/runs")
    assert len(storage.listing(bucket)) == 1  # the probe is gone


def test_a_large_file_goes_there_and_back(bucket: str, tmp_path: Path) -> None:
    file = large_file(tmp_path)
    storage.upload(file, f"{bucket}/in/large.bin")
    assert storage.local(f"{bucket}/in/large.bin").read_bytes() == file.read_bytes()
    folder = storage.local(f"{bucket}/in")
    assert [path.name for path in folder.iterdir()] == ["large.bin"]
    with pytest.raises(FileNotFoundError, match=r"/in/larg does not exist"):
        storage.local(f"{bucket}/in/larg")


def test_what_is_written_appears_when_it_is_whole(bucket: str) -> None:
    with pytest.raises(RuntimeError), storage.written_folder(f"{bucket}/out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not storage.exists(f"{bucket}/out")
    with storage.written_folder(f"{bucket}/out") as folder, storage.written_path(f"{bucket}/one.txt") as path:
        (folder / "sub").mkdir()
        (folder / "sub" / "whole").write_text("x")
        path.write_text("y")
    assert storage.read_text(f"{bucket}/out/sub/whole") + storage.read_text(f"{bucket}/one.txt") == "xy"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/x", "addresses of kind gs:// are not known; give a folder or s3://"),
        ("s3://", "names no bucket; write s3://BUCKET/PREFIX"),
        (
            "s3://bucket/x?endpoint_override=a",
            "set AWS_ENDPOINT_URL and AWS_REGION in the environment instead",
        ),
    ],
)
def test_an_address_of_another_kind_is_refused(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        storage.exists(address)


# --- staging --------------------------------------------------------------------------------------------------

STAGE = "import sys; from lape_ray.data.remote import local_split; print(local_split(sys.argv[1]))"


def test_data_on_s3_is_read_as_data_on_the_disk(bucket: str, beton: Path) -> None:
    data = DataConfig(train=put_beton(beton, bucket))
    assert read_split_info(data, "train").sha256 == check_beton(beton).sha256
    assert not storage.cache().exists(), "the description needs no copy"
    batches = []
    for path in (data.train, str(beton)):
        loader = build_loader(DataConfig(train=path), "train", image_size=32, batch_size=64, threads=1)
        images, labels, _ = next(loader.epoch(0))
        batches.append((images, labels))
    assert batches[0][0].equal(batches[1][0])
    assert batches[0][1].equal(batches[1][1])


def test_of_two_processes_one_fetches(bucket: str, beton: Path) -> None:
    address = put_beton(beton, bucket)
    code = STAGE.replace("sys.argv[1]", repr(address))
    # Both have imported everything before either begins.
    start = storage.cache().parent / "start"
    code = code.replace(
        "; print",
        f"\nimport pathlib, time\nwhile not pathlib.Path({str(start)!r}).exists(): time.sleep(0.001)\nprint",
    )
    racers = [in_process(code) for _ in range(2)]
    time.sleep(3)
    start.touch()
    outputs = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert check_beton(outputs[0][0].strip(), deep=True, workers=1).num_samples == 1797
    assert sum("fetching 2 objects" in errors for _, errors in outputs) == 1
    later = in_process(code).communicate(timeout=60)
    assert later == (outputs[0][0], ""), "a later run uses the copy"


def test_a_killed_download_goes_on_where_it_was(
    bucket: str, server: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 64 << 20
    file = large_file(tmp_path, size)
    address = f"{bucket}/large.bin"
    storage.upload(file, address)
    proxy = Proxy(server.port)
    through = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
    code = f"""
from lape_ray.storage import transfer
transfer.PART_BYTES, transfer.THREADS, transfer.download.__kwdefaults__["threads"] = 4 << 20, 2, 2
from lape_ray import storage
print(storage.local({address!r}))
"""
    proxy.limit = 30 << 20
    first = in_process(code, **through)
    journal = None
    for _ in range(1000):
        time.sleep(0.02)
        journal = next(storage.cache().glob("*/.large.bin.parts"), None)
        if journal is not None and len(journal.read_text().splitlines()) > 5:
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert journal is not None
    kept = len(journal.read_text().splitlines()) - 1
    assert kept >= 5
    assert not (journal.parent / "large.bin").exists()
    proxy.limit, proxy.received = None, 0
    output, errors = in_process(code, **through).communicate(timeout=60)
    assert Path(output.strip()).read_bytes() == file.read_bytes(), errors
    assert proxy.received < size - kept * (4 << 20) + (1 << 20), "parts that were there came again"
    assert sorted(path.name for path in journal.parent.iterdir()) == [".complete", ".lock", "large.bin"]
    proxy.close()


def test_a_part_that_the_disk_lost_is_fetched_again(bucket: str, tmp_path: Path) -> None:
    """After a power cut the journal may know of parts whose bytes never reached the disk."""
    file = large_file(tmp_path)
    storage.upload(file, f"{bucket}/large.bin")
    (source,) = storage.listing(bucket)
    target = tmp_path / "copy.bin"
    with transfer._Journal(tmp_path / ".copy.bin.parts", source) as journal:
        journal.begin()
        journal.add(0)
    (tmp_path / ".copy.bin.part").write_bytes(b"")
    transfer.download(source, target, sha256=None)
    assert target.read_bytes() == file.read_bytes()


def test_a_damaged_object_is_refused(bucket: str, beton: Path) -> None:
    address = put_beton(beton, bucket)
    damaged = bytearray(beton.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    objects.put(address, bytes(damaged))
    for _ in range(2):
        with pytest.raises(
            transfer.DownloadError, match=r"digits\.beton is damaged: its sha256 is .*; upload it again"
        ):
            local_split(address)
    assert not list(storage.cache().rglob("digits.beton"))
    objects.put(address, bytes(damaged[:-1]))
    with pytest.raises(ValueError, match=r"but its manifest says [\d,]+; upload it again"):
        read_split_info(DataConfig(train=address), "train")
    storage.upload(beton, address)
    assert check_beton(local_split(address), deep=True, workers=1)


def test_an_object_that_is_replaced_is_not_mixed(bucket: str, tmp_path: Path) -> None:
    objects.put(f"{bucket}/a", b"old")
    (old,) = storage.listing(bucket)
    objects.put(f"{bucket}/a", b"new")
    with pytest.raises(OSError, match="was replaced by another object while it was read; start again"):
        transfer.download(old, tmp_path / "a", sha256=None)


def test_a_set_of_shards(bucket: str, tmp_path: Path) -> None:
    write_beton(digits(), tmp_path / "set" / "d.beton", shards=3, workers=1)
    storage.upload_folder(tmp_path / "set", f"{bucket}/data", last=".json")
    address = f"{bucket}/data/d.beton"
    assert read_split_info(DataConfig(val=address), "val").num_samples == 1797
    assert check_beton(local_split(address)).num_samples == 1797
    objects.delete(f"{bucket}/data/d-00001-of-00003.beton")
    with pytest.raises(FileNotFoundError, match=r"d-00001-of-00003\.beton is missing \(1 of 3 shards are\)"):
        read_split_info(DataConfig(val=address), "val")


def test_the_copy_of_a_process_that_was_killed_is_deleted(bucket: str) -> None:
    """By the next one that opens something; what is open, or was to stay, stays."""
    for name in ("torn", "open", "data"):
        objects.put(f"{bucket}/{name}/a", name.encode())
    process = in_process(
        "import os; from lape_ray import storage\n"
        f"with storage.opened('{bucket}/torn'):\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert process.wait() == -signal.SIGKILL, process.communicate()
    data = storage.local(f"{bucket}/data")

    def texts() -> set[str]:
        return {path.read_text() for path in storage.cache().glob("*/*/a")}

    assert texts() == {"torn", "data"}
    with storage.opened(f"{bucket}/open") as first, storage.opened(f"{bucket}/open") as second:
        assert first == second
        assert texts() == {"open", "data"}
    assert texts() == {"data"}
    assert [path.name for path in storage.cache().iterdir()] == [data.parent.name]


def test_processes_that_wait_for_each_other_open_the_same_copy(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As workers do: one fetches and keeps it open until the other, which waited for it, has it open too."""
    objects.put(f"{bucket}/both/a", b"both")
    waits, both = threading.Event(), threading.Barrier(2, timeout=20)

    def told(text: str) -> None:
        if "waiting for it" in text:
            waits.set()

    def slow(*arguments: Any, **options: Any) -> None:
        assert waits.wait(20)
        download(*arguments, **options)

    download = copies.download
    monkeypatch.setattr(copies, "_tell", told)
    monkeypatch.setattr(copies, "download", slow)

    def read() -> str:
        with storage.opened(f"{bucket}/both") as folder:
            both.wait()
            return (folder / "a").read_text()

    with ThreadPoolExecutor(2) as threads:
        assert [each.result() for each in [threads.submit(read) for _ in range(2)]] == ["both"] * 2


def test_what_one_process_opens_another_one_does_not_delete(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many open and close the same objects at any moments: each finds all of them, whole, as long as it has them."""
    names, content = [f"{number}/file" for number in range(3)], bytes(range(256)) * 64
    for name in names:
        objects.put(f"{bucket}/many/{name}", content)

    def slow(one: objects.Object, target: Path, **options: Any) -> None:
        with target.open("wb") as file:
            for start in range(0, len(content), 4096):
                file.write(content[start : start + 4096])
                file.flush()
                time.sleep(0.0005)

    monkeypatch.setattr(copies, "download", slow)
    monkeypatch.setattr(copies, "_tell", lambda text: None)
    monkeypatch.setattr(copies, "POLL_S", 0.001)

    def read(seed: int) -> None:
        draws = random.Random(seed)
        for _ in range(25):
            with storage.opened(f"{bucket}/many") as folder:
                time.sleep(draws.choice((0, 0.001, 0.01)))
                for name in names:
                    assert (folder / name).read_bytes() == content
            time.sleep(draws.choice((0, 0.002, 0.02)))

    with ThreadPoolExecutor(8) as threads:
        for each in [threads.submit(read, seed) for seed in range(8)]:
            each.result()
    assert not list(storage.cache().iterdir())


def test_a_copy_that_is_to_stay_is_not_deleted_by_those_that_open_it(bucket: str) -> None:
    """Whether it was there before they came, came while they had it open, or was left by one that was killed."""
    for name in ("before", "between", "left", "other"):
        objects.put(f"{bucket}/{name}/a", name.encode())
    stay = [storage.local(f"{bucket}/before")]
    with storage.opened(f"{bucket}/before"), storage.opened(f"{bucket}/between"):
        stay.append(storage.local(f"{bucket}/between"))
    killed = in_process(
        "import os; from lape_ray import storage\n"
        f"with storage.opened('{bucket}/left'):\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert killed.wait() == -signal.SIGKILL, killed.communicate()
    stay.append(storage.local(f"{bucket}/left"))
    with storage.opened(f"{bucket}/other"):
        pass
    assert [(path / "a").read_text() for path in stay] == ["before", "between", "left"]
    assert len(list(storage.cache().iterdir())) == 3


def test_a_full_disk_is_said_before_anything_is_fetched(
    bucket: str, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = put_beton(beton, bucket)
    monkeypatch.setattr(copies, "SPARE_BYTES", 1 << 60)
    with pytest.raises(
        OSError, match=r"GB free, but .* GB are needed: delete copies .* or set LAPE_RAY_CACHE"
    ):
        local_split(address)
    assert not list(storage.cache().rglob("*.part"))


# --- buckets that others write to -------------------------------------------------------------------------------

HOSTILE_KEYS = {
    "ckpt/../../../../x": "has the part '..'",
    "ckpt/./x": "has the part '.'",
    "ckpt//x": "has the part ''",
    "ckpt//etc/x": "has the part ''",
    "ckpt/a\\..\\x": "has a backslash or control character",
    "ckpt/a\0b": "has a backslash or control character",
    "ckpt/a\nb": "has a backslash or control character",
    f"ckpt/{241 * 'n'}": "has a part of more than 240 bytes",
    "ckpt/.complete": "has the part '.complete', which is one of the cache's own files",
    "ckpt/.complete.7": "one of the cache's own files",
    "ckpt/sub/.lock": "one of the cache's own files",
    "ckpt/.passing": "one of the cache's own files",
    "ckpt/.meta.json.part": "one of the cache's own files",
    "ckpt/.meta.json.parts": "one of the cache's own files",
    "ckpt/meta.json/x": "is an object, and there are objects below it",
}


@pytest.mark.parametrize("key", HOSTILE_KEYS, ids=ascii)
def test_a_key_that_is_no_name_of_a_file_is_refused_before_anything_is_fetched(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    before = set(tmp_path.parent.rglob("*"))
    with holding({"ckpt/meta.json": b"{}", key: b"evil"}) as (url, given):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(ValueError, match=re.escape(HOSTILE_KEYS[key])) as raised:
            storage.local("s3://b/ckpt")
    message = str(raised.value)
    assert repr(key.removesuffix("/x"))[1:-1] in message
    assert message.endswith("; rename or delete that object")
    assert "\n" not in message
    assert not given
    assert set(tmp_path.parent.rglob("*")) == before


def test_names_that_are_only_odd_are_copied(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = [
        "ckpt/..a",
        "ckpt/.hidden",
        "ckpt/a b/ü%2F…",
        "ckpt/x.part",
        f"ckpt/{240 * 'n'}",
        "ckpt/...",
        "ckpt/.locks",
    ]
    with holding({key: key.encode() for key in odd}) as (url, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        folder = storage.local("s3://b/ckpt")
    found = {path.relative_to(folder.parent).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert {name: path.read_bytes().decode() for name, path in found.items()} == {key: key for key in odd}


def test_shards_below_another_folder_are_not_taken_for_the_sets(bucket: str, beton: Path) -> None:
    """Of an address's own folder only: another file of the name would be fetched in its place."""
    address = put_beton(beton, bucket)
    objects.put(f"{bucket}/data/digits-old/digits.beton", b"another")
    objects.put(f"{bucket}/data/digits-old/digits-00000-of-00002.beton", b"another")
    assert check_beton(local_split(address)).num_samples == 1797


# --- servers that go, and servers that refuse -----------------------------------------------------------------


def test_a_server_that_restarts_amid_an_upload(bucket: str, tmp_path: Path) -> None:
    """The upload waits for it, and what was uploaded before is not lost."""
    with gateway(tmp_path) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        s3.client().create_bucket(Bucket="here")
        file, failures = large_file(tmp_path, 96 << 20), []
        stored = threading.Event()
        real = s3.client().upload_part

        def upload_part(**arguments: object) -> object:
            answer = real(**arguments)
            stored.set()
            return answer

        patch.setattr(s3.client(), "upload_part", upload_part)

        def upload() -> None:
            try:
                storage.upload(file, "s3://here/large.bin", threads=1)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=upload)
        thread.start()
        assert stored.wait(60)
        server.kill()
        time.sleep(1)
        server.start()
        thread.join(120)
        assert not failures
        assert storage.local("s3://here/large.bin").read_bytes() == file.read_bytes()


def test_a_server_that_stays_away_is_an_error_that_says_where(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("lape_ray.storage.files.CHECK_TIMEOUT_S", 0.3)
    with pytest.raises(
        ValueError, match=r"failed for 0.3 s: .*check that the server at http://127.0.0.1:9 is up"
    ):
        storage.check_writable(bucket)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
            "does not fit the access key; check AWS_SECRET_ACCESS_KEY",
        ),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "the access key is not known there; check AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials for S3 on "),
        ({"AWS_PROFILE": "nowhere"}, "no credentials for S3 on "),
    ],
    ids=["secret", "key", "none", "profile"],
)
def test_bad_credentials(
    bucket: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(PermissionError, match=re.escape(message)) as raised:
        storage.read_text(f"{bucket}/x")
    assert "testpassword" not in str(raised.value)
    with pytest.raises(ValueError, match=r"is not writable: .*choose another with --run\.storage"):
        storage.check_writable(bucket)


def test_a_missing_bucket_and_a_missing_object(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no bucket 'no-such-bucket' at http.*; create it"):
        storage.read_text("s3://no-such-bucket/x")
    with pytest.raises(FileNotFoundError, match="/x does not exist at http"):
        storage.read_text(f"{bucket}/x")
    with pytest.raises(
        FileNotFoundError, match=r"x\.beton is missing; write it with python jobs/write_beton\.py"
    ):
        read_split_info(DataConfig(train=f"{bucket}/x.beton"), "train")


def test_a_wrong_clock(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server itself refuses the signature, whose time is an hour away from its own."""
    import datetime

    real = botocore.auth.get_current_datetime
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda *a, **k: real(*a, **k) + datetime.timedelta(hours=1)
    )
    with pytest.raises(OSError, match=r"the clock of .* is wrong: it says 20.*, the server 20.*set-ntp"):
        storage.read_text(f"{bucket}/x")


REFUSALS = [
    (403, "AccessDenied", {}, "", "reading is refused (AccessDenied): these credentials do not allow it; grant s3:"),
    (301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-3"}, "", "set AWS_REGION=eu-west-3"),
    (400, "AuthorizationHeaderMalformed", {}, "<Region>eu-west-3</Region>", "set AWS_REGION=eu-west-3"),
    (400, "ExpiredToken", {}, "", "the temporary credentials have expired; get new ones"),
    (400, "Strange", {}, "", "reading is refused by http://127.0.0.1:"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code", "headers", "extra", "message"), REFUSALS, ids=[r[1] for r in REFUSALS]
)
def test_refusals_that_only_other_servers_make(
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    headers: dict[str, str],
    extra: str,
    message: str,
) -> None:
    with refusing(status, code, headers=headers, extra=extra) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(OSError, match=re.escape(message)):
            storage.read_text("s3://bucket/x")


def test_the_bucket_of_a_run_must_be_in_the_region_that_is_set(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3 would follow it there, but Ray Train's uploads would fail after the first epoch."""
    with refusing(200, "", headers={"x-amz-bucket-region": "eu-west-3"}) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(
            ValueError, match="is in region eu-west-3, not in us-east-1; set AWS_REGION=eu-west-3"
        ):
            storage.check_writable("s3://bucket/runs")


def test_an_overloaded_server_is_asked_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing(503, "SlowDown") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(ConnectionError, match=r"reading failed for 0\.4 s: .*SlowDown"):
            s3.call_with_retry(
                lambda: s3.client().get_object(Bucket="b", Key="k"), "s3://b/k", "reading", timeout_s=0.4
            )


# --- jobs -----------------------------------------------------------------------------------------------------


def test_a_job_writes_and_verifies_data_on_s3(bucket: str) -> None:
    address = f"{bucket}/data/d.beton"
    options = ["--split=val", "--subset=per-class:4", "--workers=1"]
    done = run_here("jobs/write_beton.py", "digits", address, *options)
    assert done.returncode == 0, done.stderr
    assert f"manifest {address}.json" in done.stdout
    done = run_here("jobs/write_beton.py", "verify", address, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(storage.read_text(f"{address}.json"))["num_samples"] == 40
    assert not list(storage.cache().glob("written/*")), "what was uploaded is not kept twice"
    assert len(open_source(address)) == 40, "it is a source, too"
    refused = run_here("jobs/write_beton.py", "digits", "s3://no-such-bucket/d.beton", "--workers", "1")
    assert refused.returncode == 2
    assert "there is no bucket 'no-such-bucket'" in refused.stderr
    assert "Traceback" not in refused.stderr
