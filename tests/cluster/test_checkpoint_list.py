"""Which checkpoints count, and what may be deleted: lists that are missing or torn, and kills at every moment."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.s3_server import gateway

from lape_ray import storage
from lape_ray.cluster.checkpoint_list import (
    COPY,
    LIST,
    RAYS_LIST,
    Listed,
    add,
    best,
    read_list,
    recover,
    retained,
    write_list,
)
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_record import RECORD, earlier_run, write_run
from lape_ray.cluster.worker import _newest_complete
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.recipes import recipe
from lape_ray.storage import lease, leased, s3
from lape_ray.storage.transfer import DownloadError
from lape_ray.training.checkpoint import MARKER, DamagedError, EpochProgress, Metadata, Snapshot, verify

CONFIG = recipe("smoke")


def of(config: TrainConfig, folder: str) -> Run:
    """A run in `folder`, as its driver knows it."""
    return Run(config=config, folder=folder, lease="", tracking_uri="", mlflow_run_id="0" * 32, use_gpu=False)


LATER = 4e9  # seconds since 1970: everything is older


def save(steps: int, acc1: float | None) -> Callable[[Path], None]:
    """Write a small checkpoint that is a real one."""
    metrics = {} if acc1 is None else {"val/acc1": acc1}
    meta = Metadata(
        epochs_done=steps // 5, steps_done=steps, progress=EpochProgress(step=steps % 5), config=CONFIG,
        metrics=metrics, world_size=1, mlflow_run_id="0" * 32,
    )  # fmt: skip
    weights = {"weight": torch.full((4,), float(steps))}
    return Snapshot(model=weights, ema=None, optimizer={"state": {}}, metadata=meta).save


def store(
    run: Path | str, listed: tuple[Listed, ...], steps: int, acc1: float | None = None
) -> tuple[Listed, ...]:
    """Store and list a checkpoint as rank 0 does."""
    name = f"checkpoint-{steps:06}"
    with storage.staging(f"{run}/{name}") as folder:
        save(steps, acc1)(folder)
        storage.publish(folder, f"{run}/{name}", last=MARKER)
    return add(str(run), listed, Listed(name=name, steps_done=steps, score=acc1), keep=2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints: the two best, and the newest."""
    folder = tmp_path / "run"
    listed: tuple[Listed, ...] = ()
    for steps, acc1 in ((5, 30.0), (10, 50.0), (15, 40.0), (18, None)):
        listed = store(folder, listed, steps, acc1)
    assert names(folder) == ["checkpoint-000010", "checkpoint-000015", "checkpoint-000018"]
    return folder


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.is_dir())


def test_the_best_and_the_newest_are_kept() -> None:
    entries = [
        Listed(name=f"checkpoint-{i}", steps_done=i, score=score)
        for i, score in enumerate((3, None, 9, 9, 1, None))
    ]
    assert [one.steps_done for one in retained(entries, keep=2)] == [2, 3, 5]
    assert [one.steps_done for one in retained(entries, keep=1)] == [3, 5]
    found = best(entries)
    assert found is not None
    assert found.steps_done == 3  # the newest of equals
    assert best([Listed(name="checkpoint-1", steps_done=1)]) is None


def test_an_accuracy_on_smaller_images_is_no_score(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it where an older version has listed it."""
    schedule = {"optim.epochs": 4, "data.image_size_schedule": "16:0-2,32:2-4"}
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", replace_fields(CONFIG, schedule))
    listed: tuple[Listed, ...] = ()
    for steps, acc1 in ((5, 90.0), (10, 80.0), (15, 40.0), (20, 30.0)):
        listed = store(run / "sized", listed, steps, acc1)
    assert [one.score for one in listed] == [90.0, 80.0, 30.0]
    assert [one.score for one in recover(str(run / "sized"), print)] == [None, None, 30.0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: "[]",
        lambda text: text[: len(text) // 2],
        lambda text: json.dumps(
            {"format": 1, "checkpoints": [{"name": "../../x", "steps_done": 1, "score": 1}]}
        ),
        lambda text: json.dumps({"format": 1, "checkpoints": [{"name": 7, "steps_done": [], "score": {}}]}),
        lambda text: "\0" * len(text),
        None,
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_a_list_that_cannot_be_read_deletes_nothing(
    run: Path, damage: Callable[[str], str] | None, both: bool
) -> None:
    before, told = read_list(str(run)), list[str]()
    for name in (LIST, COPY) if both else (LIST,):
        if damage is None:
            (run / name).unlink()
        else:
            (run / name).write_text(damage((run / name).read_text()))
    shutil.copytree(run / "checkpoint-000010", run / "checkpoint-000007")  # that a whole list would supersede
    found = recover(str(run), told.append, before=LATER)
    assert {"checkpoint-000010", "checkpoint-000015", "checkpoint-000018"} <= set(names(run))
    assert "checkpoint-000007" in names(run)
    assert set(before or ()) <= set(found)
    assert found[-1].name == "checkpoint-000018"
    assert len(told) == 1
    assert "no list of checkpoints that can be read" in told[0]
    assert read_list(str(run)) == read_list(str(run), COPY) == found


def test_a_list_of_another_run_deletes_nothing(run: Path, tmp_path: Path) -> None:
    """All of its entries are missing here, and what is here is newer or stays by being whole and listed anew."""
    other = tmp_path / "other"
    store(other, (), 3, 10.0)
    for name in (LIST, COPY):
        shutil.copy(other / name, run / name)
    told: list[str] = []
    found = recover(str(run), told.append, before=LATER)
    assert names(run) == ["checkpoint-000010", "checkpoint-000015", "checkpoint-000018"]
    assert [one.name for one in found] == names(run)
    assert "checkpoint-000003 is listed, and has no whole folder" in told[0]


def test_rays_list_of_an_older_version_decides_nothing(run: Path) -> None:
    for text in ("", "{}", json.dumps({"checkpoint_results": []})):
        (run / RAYS_LIST).write_text(text)
        (run / LIST).unlink(missing_ok=True)
        (run / COPY).unlink(missing_ok=True)
        assert len(recover(str(run), print, before=LATER)) == 3
        assert not (run / RAYS_LIST).exists()  # or Ray would go on from it


def test_what_was_interrupted_is_found_or_swept(run: Path) -> None:
    listed = recover(str(run), print)
    shutil.copytree(run / "checkpoint-000018", run / "checkpoint-000019")  # published, and not listed
    meta = json.loads((run / "checkpoint-000019" / MARKER).read_text())
    (run / "checkpoint-000019" / MARKER).write_text(json.dumps({**meta, "steps_done": 19}))
    shutil.copytree(run / "checkpoint-000010", run / "checkpoint-000005")  # superseded, and not yet deleted
    meta = json.loads((run / "checkpoint-000005" / MARKER).read_text())
    (run / "checkpoint-000005" / MARKER).write_text(json.dumps({**meta, "steps_done": 5}))
    for litter in (".checkpoint-000020.partial", "checkpoint-000021"):
        (run / litter).mkdir()
        (run / litter / "model.safetensors").write_bytes(b"half")
    shutil.copytree(run / "checkpoint-000010", run / "checkpoint-000022")
    (run / "checkpoint-000022/model.safetensors").write_bytes(b"torn")
    young = storage.modified(str(run / "checkpoint-000021/model.safetensors")) - 10
    told: list[str] = []
    recover(str(run), told.append, before=young)
    assert {".checkpoint-000020.partial", "checkpoint-000021"} <= set(
        names(run)
    )  # somebody may be at work on them
    recover(str(run), told.append, before=LATER)
    assert names(run) == [
        "checkpoint-000010", "checkpoint-000015", "checkpoint-000018", "checkpoint-000019", "checkpoint-000022",
    ]  # fmt: skip
    found = read_list(str(run))
    assert found is not None
    assert [one.name for one in found] == [*(one.name for one in listed), "checkpoint-000019"]
    assert "checkpoint-000019 is whole, and is listed now" in told[0]
    assert "checkpoint-000022 cannot be used (model.safetensors is missing or has another size)" in told[0]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ENOSPC, "the cache has 0.1 GB free"), True),
        (ConnectionError("S3 does not answer"), True),
        (PermissionError("S3 refuses the key"), True),
        (FileNotFoundError("model.safetensors"), False),
        (DownloadError("its sha256 is another one"), False),
    ],
)
def test_a_place_that_cannot_be_read_now_costs_no_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, passes: bool
) -> None:
    """What may pass ends this try, and the newest checkpoint stays in the list; what is damaged leaves it."""
    listed, opened = read_list(str(run)), storage.opened
    assert listed is not None

    def newest_fails(address: str) -> contextlib.AbstractContextManager[Path]:
        if address.endswith(listed[-1].name):
            raise error
        return opened(address)

    monkeypatch.setattr(storage, "opened", newest_fails)
    taken = _newest_complete(of(CONFIG, str(run)), listed, torch.device("cpu"), lambda text: None)
    if passes:
        with pytest.raises(type(error)), taken:
            pass
    else:
        with taken as (folder, found):
            assert folder == run / listed[-2].name
            assert found == listed[:-1]
    assert read_list(str(run)) == (listed if passes else listed[:-1])


def test_where_every_checkpoint_is_damaged_nothing_begins_again(run: Path) -> None:
    """Training from nothing would be a loss that nobody asked for."""
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    for path in run.rglob(MARKER):
        path.write_text("{}")
    with pytest.raises(
        DamagedError, match=r"no checkpoint of this run is whole .*000010 cannot be used .*restore one"
    ):
        recover(str(run), print, before=LATER)
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before


def test_a_deleted_checkpoint_is_never_taken_for_whole(run: Path) -> None:
    calls: list[str] = []

    def first(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.remove" and str(run) in str(arguments[0]):
            calls.append(Path(str(arguments[0])).name)

    sys.addaudithook(first)
    storage.delete_folder(str(run / "checkpoint-000010"), first=MARKER)
    assert calls[0] == MARKER


# --- kills ----------------------------------------------------------------------------------------------------


def session(run: Path | str) -> None:
    """What the driver and rank 0 of a run do to its folder, from submission to end, with two new checkpoints."""
    run = str(run)
    with leased(run, "run") as held:
        listed = recover(run, lambda _: None, before=storage.modified(f"{run}/lease.json"))
        if not storage.exists(f"{run}/{RECORD}"):
            write_run(of(CONFIG, run), finished=False)
        done = listed[-1].steps_done if listed else 0
        for steps in (done + 2, done + 5):
            held.check()
            listed = store(run, listed, steps, float(steps))
        write_run(of(CONFIG, run), finished=False)


def killed_at(number: int, run: Path) -> bool:
    """Run a session in a child process that dies before its operation `number` on files; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def count_down(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
            if writes or event in CHANGES:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count_down)
            session(run)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "os.link"}


def test_a_kill_between_any_two_operations_loses_one_checkpoint_at_most(run: Path, tmp_path: Path) -> None:
    """The same command goes on from what was there, from the first file operation of a session to the last."""
    number, came_further = 0, True
    while came_further:
        number += 1
        copy = tmp_path / f"kill-{number}"
        shutil.copytree(run, copy)
        whole_before = set(names(copy))
        came_further = killed_at(number, copy)
        listed = recover(str(copy), lambda _: None, before=LATER)
        for one in listed:
            verify(copy / one.name)
        assert listed[-1].steps_done >= 18, number  # nothing that was whole is lost
        supersedes = sum(one.steps_done > 18 for one in listed)
        assert len(whole_before - {one.name for one in listed}) <= supersedes, number
        assert set(names(copy)) == {one.name for one in listed}, number
        known = {LIST, COPY, RECORD, "lease.json", ".lease.json.lock"}
        assert {path.name for path in copy.iterdir() if path.is_file()} <= known, number
        earlier_run(CONFIG, str(copy))  # is of this config, or not yet written
        session(copy)
        again = read_list(str(copy))
        assert again is not None
        assert again[-1].steps_done == listed[-1].steps_done + 5, number
        shutil.rmtree(copy)
    assert number > 40  # operations there are


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/cluster"]
from lape_ray.storage import s3
from test_checkpoint_list import session
from lape_ray.storage import lease
lease.SETTLE_S = 0
count = 0
def count_down(**_):
    global count
    count += 1
    if count == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
s3.client().meta.events.register("before-call.s3", count_down)
session({run!r})
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_between_any_two_requests_to_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0)
    (tmp_path / "server").mkdir()
    with gateway(tmp_path / "server") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        s3.client().create_bucket(Bucket="runs")
        number, came_further = 0, True
        while came_further:
            number += 1
            run = f"s3://runs/{number}"
            session(run)
            code = KILLED.format(tests=str(Path(__file__).parent.parent), number=number, run=run)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            came_further = done.returncode == -signal.SIGKILL
            assert came_further or done.returncode == 0, done.stderr
            listed = recover(run, lambda _: None, before=LATER)
            for one in listed:
                with tempfile.TemporaryDirectory() as folder:
                    for file in storage.listing(f"{run}/{one.name}/"):
                        bucket, _, key = file.address.removeprefix("s3://").partition("/")
                        s3.client().download_file(bucket, key, f"{folder}/{file.name}")
                    verify(Path(folder))
            assert listed[-1].steps_done >= 5, number
            assert set(storage.folders(run)) == {one.name for one in listed}, number
            session(run)
            again = read_list(run)
            assert again is not None
            assert again[-1].steps_done == listed[-1].steps_done + 5, number
        assert number > 40


def test_a_disk_that_is_full_at_any_moment_loses_nothing(run: Path, tmp_path: Path) -> None:
    """A small disk of every size at which a session fails, until one where it does not; then there is space again."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    disk, failures = tmp_path / "disk", set[str]()
    disk.mkdir()
    for pages in range(10, 200):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * 4}k", "tmpfs", str(disk)], check=True)
        try:
            copy = disk / "run"
            try:
                shutil.copytree(run, copy)
            except OSError:
                continue  # as small as that
            try:
                session(copy)
                break
            except Exception as error:  # each library has its own
                failures.add(f"{type(error).__name__} {last_file(error)}")
            subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
            listed = recover(str(copy), lambda _: None, before=LATER)
            for one in listed:
                verify(copy / one.name)
            assert listed[-1].steps_done >= 18, pages
            assert len(listed) >= 3, pages
            session(copy)
            again = read_list(str(copy))
            assert again is not None
            assert again[-1].steps_done == listed[-1].steps_done + 5, pages
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    assert len(failures) > 3, failures  # places


def last_file(error: BaseException) -> str:
    """The last function of ours that an error passed through."""
    ours = [frame.name for frame in traceback.extract_tb(error.__traceback__) if "lape_ray" in frame.filename]
    return ours[-1] if ours else ""


# --- the run's record -----------------------------------------------------------------------------------------


def named(name: str, **changes: object) -> TrainConfig:
    return replace_fields(CONFIG, {"run.name": name, **changes})


def test_a_record_that_is_damaged_is_made_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "{", "[]", "{}"):
        (run / RECORD).write_text(text)
        earlier = earlier_run(CONFIG, str(run))
        assert earlier is not None
        assert earlier.mlflow_run_id == "0" * 32
        assert not earlier.finished
        assert f"{run / RECORD}" in capsys.readouterr().out
    (run / RECORD).unlink()
    assert earlier_run(CONFIG, str(run)) is not None


def test_what_is_no_run_is_neither_continued_nor_overwritten(tmp_path: Path, run: Path) -> None:
    data = tmp_path / "data"
    (data / "checkpoint-500").mkdir(parents=True)
    (data / "checkpoint-500/model.bin").write_bytes(b"another tool's")
    for config in (named("data"), named("data", **{"run.overwrite": True})):
        with pytest.raises(ValueError, match=r"data holds 'checkpoint-500' and no run\.json.*choose another"):
            earlier_run(config, str(data))
    write_run(of(named("mine"), str(run)), finished=True)
    with pytest.raises(ValueError, match="is not overwritten: it holds the run 'mine'"):
        earlier_run(named("run", **{"run.overwrite": True}), str(run))
    assert earlier_run(named("mine", **{"run.overwrite": True}), str(run)) is None


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "-x", "_x", ".x", "a b", "a\n", "ü", "x" * 201])
def test_names_that_mean_another_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must begin with a letter or digit"):
        named(name)


def test_an_emptied_folder_keeps_its_lease(run: Path) -> None:
    with leased(str(run), "run") as held:
        storage.empty_folder(str(run), but=storage.LEASE_FILES)
        held.check()
    assert sorted(path.name for path in run.iterdir()) == [".lease.json.lock", "lease.json"]


def test_the_list_is_written_twice(tmp_path: Path) -> None:
    write_list(str(tmp_path), [Listed(name="checkpoint-1", steps_done=1, score=2.0)])
    assert (tmp_path / LIST).read_text() == (tmp_path / COPY).read_text()
