"""Faults that long runs die of, done to real runs: each ends with the history of one that nothing happened to."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from helpers.faults import (
    LONG,
    Strike,
    busy,
    command,
    contest,
    family,
    job,
    note_cost,
    seconds_to_import,
    stored,
    whole,
    workers,
)
from helpers.networks import FAMILIES
from helpers.service import Service, alone, weights_alone
from helpers.tracking_server import history, tracking_server
from safetensors.torch import load_file

from lape_ray.cluster.controller import WorkersFailedError
from lape_ray.cluster.journal import read_journal
from lape_ray.cluster.launch import fit
from lape_ray.cluster.run_end import StorageError
from lape_ray.config import replace_fields
from lape_ray.training.checkpoint import MARKER, DamagedError, file_checksums

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.faults]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> list[float]:
    return alone(service.config(**LONG)).losses


def no_litter(service: Service, name: str) -> None:
    """As many checkpoints as are kept, and nothing half written."""
    run = service.home / "runs" / name
    found = [path.name for path in run.iterdir() if path.is_dir() and path.name != "journal"]
    assert all(each.startswith("checkpoint-") for each in found)
    assert len(found) <= 3


def losses(uri: str, run_id: str) -> list[float]:
    return [loss for loss, _ in history(uri, run_id).values()]


def test_a_killed_worker(
    service: Service, undisturbed: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL; the loop goes on from the last checkpoint, and nothing is logged twice or left out."""
    strike = Strike(stored(service.home / "runs/killed", 28), lambda: workers(service)[-1].kill())
    with strike.armed():
        result = fit(service.config(run__name="killed", **LONG))
    output = capfd.readouterr().out
    assert service.losses(service.run(result.mlflow_run_id)) == undisturbed
    assert re.search(r"continuing after epoch \d+ of 20", output), output
    no_litter(service, "killed")
    journal = read_journal(str(service.home / "runs/killed"))
    division = journal.division()
    lost = division.seconds
    # Ray Train may start the new process before the failure is told, and then nothing is left for "start".
    for part in ("detect", "import", "load", "first_step_again"):
        assert lost[part] > 0, (part, lost)
    trained = max(one.until for one in journal.attempts)
    assert lost["idle"] < division.until - trained + 0.1, "nothing but the end of the command"
    note_cost(service, result.mlflow_run_id, "worker SIGKILL", strike.at, output)


@slow
def test_a_standby_takes_a_killed_workers_place(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGKILL twice; what Ray Train starts in the first one's place stands by for the second."""
    folder, fields = service.home / "runs/standby", {**LONG, "optim__epochs": 80}
    struck: list[tuple[float, int]] = []

    def strike() -> None:
        while len(workers(service)) < 2 or len(trains := busy(service)) != 1:
            pass
        struck.append((time.time(), trains[0].pid))
        trains[0].kill()

    with Strike(stored(folder, 28), strike).armed(), Strike(stored(folder, 128), strike).armed():
        result = fit(service.config(run__name="standby", run__standby_workers=1, **fields))
    output = capfd.readouterr().out
    assert service.losses(service.run(result.mlflow_run_id)) == alone(service.config(**fields)).losses
    assert len(re.findall(r"continuing after epoch \d+ of 80", output)) == 2, output
    no_litter(service, "standby")
    for (at, pid), (until, other) in zip(struck, [*struck[1:], (math.inf, 0)], strict=True):
        assert pid != other
        pause = note_cost(service, result.mlflow_run_id, "worker SIGKILL, one stands by", at, output, until)
        assert pause is not None and pause < 4


@slow
def test_a_standby_that_hangs_is_ended(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGSTOP of the one that stands by, then SIGKILL of the one that trains: both are started again."""
    folder, fields = service.home / "runs/standby-hung", {**LONG, "optim__epochs": 80}
    stopped: list[psutil.Process] = []

    def strike() -> None:
        while len(workers(service)) < 2 or len(trains := busy(service)) != 1:
            pass
        stopped.extend(set(workers(service)) - set(trains))
        stopped[0].suspend()
        trains[0].kill()

    with Strike(stored(folder, 28), strike).armed() as first:
        result = fit(service.config(run__name="standby-hung", run__standby_workers=1, **fields))
    output = capfd.readouterr().out
    assert service.losses(service.run(result.mlflow_run_id)) == alone(service.config(**fields)).losses
    assert not stopped[0].is_running()
    note_cost(service, result.mlflow_run_id, "worker SIGKILL, the one that stands by hangs", first.at, output)


@slow
def test_a_killed_supervisor(
    service: Service, undisturbed: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the workers meet; the controller ends with it, and the driver starts both again."""

    def kill() -> None:
        (found,) = [one for one in family(service) if "RunSupervisor" in " ".join(command(one))]
        found.kill()

    strike = Strike(stored(service.home / "runs/unsupervised", 28), kill)
    with strike.armed():
        result = fit(service.config(run__name="unsupervised", **LONG))
    output = capfd.readouterr().out
    assert service.losses(service.run(result.mlflow_run_id)) == undisturbed
    assert "Ray Train's controller failed, starting it again" in output
    no_litter(service, "unsupervised")
    note_cost(service, result.mlflow_run_id, "supervisor SIGKILL", strike.at, output)


@slow
@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_keep_their_processes(
    service: Service, victim: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of one of two, also of the one that stores and prints; the other trains on in its process."""
    name = f"survivor-{victim}"
    folder, fields = service.home / "runs" / name, {**LONG, "run__num_workers": 2}
    before: list[int] = []
    after: list[int] = []

    def strike() -> None:
        processes = workers(service)
        before.extend(process.pid for process in processes)
        processes[victim].kill()

    def look() -> None:
        after.extend(process.pid for process in workers(service))

    with Strike(stored(folder, 28), strike).armed() as first, Strike(stored(folder, 70), look).armed():
        result = fit(service.config(run__name=name, **fields))
    output = capfd.readouterr().out
    assert len(before) == len(after) == 2
    assert set(before) & set(after) == {before[1 - victim]}
    assert service.losses(service.run(result.mlflow_run_id)) == pytest.approx(
        alone(service.config(**fields)).losses, rel=1e-4
    )
    no_litter(service, name)
    pause = note_cost(service, result.mlflow_run_id, "worker SIGKILL, two workers", first.at, output)
    assert pause is not None and pause < max(8.0, 2 * seconds_to_import())


@slow
@pytest.mark.parametrize("family", ["ceit_tiny", "swin_tiny"])
def test_a_killed_worker_of_another_family(
    service: Service, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL; the last weights and statistics are those of an undisturbed run, bit for bit."""
    name = f"killed-{family}"
    folder = service.home / "runs" / name
    config = service.config(run__name=name, **{**LONG, **FAMILIES[family], "optim__epochs": 8})
    with Strike(stored(folder, 13), lambda: workers(service)[-1].kill()).armed():
        fit(config)
    output = capfd.readouterr().out
    assert re.search(r"continuing after epoch \d+ of 8", output), output
    wanted = weights_alone(config)
    found = load_file(folder / "checkpoint-epoch-000008/model.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert torch.equal(value, wanted[key]), key


@slow
def test_sigterm_with_ten_seconds_of_grace(service: Service, undisturbed: list[float]) -> None:
    """A checkpoint and the end within the grace; the same command goes on behind the step where it stopped."""
    first = job(service, "terminated")
    with Strike(stored(service.home / "runs/terminated", 28), first.terminate).armed() as strike:
        output, _ = first.communicate(timeout=600)
    took = time.time() - strike.at
    assert first.returncode == 143, output
    stopped = re.search(r"error: stopped after epoch (\d+) and step (\d+) of 5, with a checkpoint", output)
    assert stopped, output
    assert took < 10, f"the run took {took:.1f} s to end"
    assert service.run_of(output).info.status == "KILLED"
    again = time.time()
    second = job(service, "terminated")
    rest, _ = second.communicate(timeout=600)
    assert second.returncode == 0, rest
    within = f" and step {stopped[2]} of 5" if stopped[2] != "5" else ""
    assert f"continuing after epoch {stopped[1]} of 20{within}" in rest or stopped[2] == "5", rest
    assert service.run_of(rest).info.run_id == service.run_of(output).info.run_id
    assert service.losses(service.run_of(rest)) == undisturbed
    note_cost(service, service.run_of(rest).info.run_id, "SIGTERM; from the next submission on", again, rest)


@slow
@pytest.mark.parametrize("own_ray", [False, True])
def test_ctrl_c_once_and_twice(service: Service, undisturbed: list[float], own_ray: bool) -> None:
    """The first is a SIGTERM, the second ends at once; both reach all processes of the terminal, as a terminal's do."""
    name = f"interrupted-{own_ray}"
    folder = service.home / "runs" / name
    first = job(service, name, own_ray=own_ray)
    with Strike(stored(folder, 28), lambda: os.killpg(first.pid, signal.SIGINT)).armed() as strike:
        output, _ = first.communicate(timeout=600)
    assert first.returncode == 143, output
    assert time.time() - strike.at < 20
    _, _, rest = output.partition("Ctrl-C: the run ends after a checkpoint; a second one ends it at once\n")
    assert re.search(r"error: stopped after epoch \d+ and step \d+ of 5, with a checkpoint", rest), output
    assert len([line for line in rest.splitlines() if " step " not in line.partition("error")[0]]) < 5, rest
    assert service.run_of(output).info.status == "KILLED"

    second = job(service, name, own_ray=own_ray)

    def twice() -> None:
        os.killpg(second.pid, signal.SIGINT)
        time.sleep(0.1)
        os.killpg(second.pid, signal.SIGINT)

    with Strike(stored(folder, 58), twice).armed() as strike:
        output, _ = second.communicate(timeout=600)
    assert second.returncode == -signal.SIGINT, output
    assert time.time() - strike.at < 5
    assert "Traceback" not in output.partition("Ctrl-C: ")[2]
    assert stored(folder, 58)()

    again = time.time()
    last = job(service, name, own_ray=own_ray)
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    assert service.losses(service.run_of(output)) == undisturbed
    no_litter(service, name)
    if not own_ray:
        note_cost(
            service,
            service.run_of(output).info.run_id,
            "Ctrl-C twice; from the next submission on",
            again,
            output,
        )


@slow
@pytest.mark.parametrize("own_ray", [False, True])
def test_two_drivers_in_two_rays(service: Service, own_ray: bool) -> None:
    """The second is refused while the first lives, whatever it is told, and goes on at once when that was killed."""
    folder = service.home / f"runs/contested-{own_ray}"
    output = contest(service, f"contested-{own_ray}", stored(folder, 13), own_ray=own_ray)
    assert "exists and is not finished: continuing it" in output
    no_litter(service, folder.name)


@slow
def test_lists_of_checkpoints_that_are_damaged_between_submissions(
    service: Service, undisturbed: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    """Ours empty, missing, torn or of another run, and Ray's of a version before: nothing whole is deleted."""
    folder = service.home / "runs/listless"
    config = service.config(run__name="listless", **LONG)
    other = json.dumps(
        {"format": 1, "checkpoints": [{"name": "checkpoint-epoch-000999", "steps_done": 4995, "score": 99.0}]}
    )
    damages = ["", None, '{"format": 1, "checkpoints": [', other]
    for epoch, text in enumerate(damages, start=3):
        result = fit(replace_fields(config, {"run.stop_after_epochs": epoch}))
        for name in ("checkpoints.json", "checkpoints.copy.json", "checkpoint_manager_snapshot.json"):
            (folder / name).write_text(text or "")
            if text is None:
                (folder / name).unlink()
        before = whole(folder)
        assert before
        capfd.readouterr()
        fit(replace_fields(config, {"run.stop_after_epochs": epoch}))  # nothing is left to train
        output = capfd.readouterr().out
        assert before <= whole(folder), output
        assert f"continuing after epoch {epoch} of 20" in output
        assert re.search(r"runs/listless: .*whole", output), output
    fit(config)
    assert service.losses(service.run(result.mlflow_run_id)) == undisturbed


@slow
def test_a_killed_driver(service: Service, undisturbed: list[float]) -> None:
    first = job(service, "driverless")
    with Strike(stored(service.home / "runs/driverless", 28), first.kill).armed():
        first.communicate(timeout=600)
    assert first.returncode == -signal.SIGKILL
    again = time.time()
    second = job(service, "driverless")
    output, _ = second.communicate(timeout=600)
    ended = time.time()
    assert second.returncode == 0, output
    assert "run driverless exists and is not finished: continuing it" in output
    assert service.losses(service.run_of(output)) == undisturbed
    assert service.run_of(output).info.status == "FINISHED"
    no_litter(service, "driverless")
    division = read_journal(str(service.home / "runs/driverless")).division()
    assert division.wall_s == pytest.approx(ended - division.began, rel=0.03), "the rest is Python's end"
    for part in ("idle", "start", "load"):
        assert division.seconds[part] > 0, division.seconds
    note_cost(
        service,
        service.run_of(output).info.run_id,
        "driver SIGKILL; from the next submission on",
        again,
        output,
    )


@slow
def test_a_hung_worker(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGSTOP of one of two; the other says so after run.timeout_s, and both begin anew."""
    changes = {**LONG, "run__num_workers": 2, "run__timeout_s": 10}
    strike = Strike(stored(service.home / "runs/hung", 28), lambda: workers(service)[-1].suspend())
    with strike.armed():
        result = fit(service.config(run__name="hung", **changes))
    output = capfd.readouterr().out
    assert service.losses(service.run(result.mlflow_run_id)) == pytest.approx(
        alone(service.config(**changes)).losses, rel=1e-4
    )
    assert "continuing after epoch" in output
    note_cost(
        service, result.mlflow_run_id, "worker SIGSTOP, two workers, --run.timeout_s 10", strike.at, output
    )


@slow
def test_a_full_disk(service: Service, undisturbed: list[float], tmp_path: Path) -> None:
    """One line, a checkpoint that is whole, and a run that goes on once there is space."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True)
    ballast = small / "ballast"
    try:
        words = {**LONG, "run__storage": str(small), "run__keep_checkpoints": 1}
        config = service.config(run__name="full", **words)

        over = threading.Event()

        def fill() -> None:
            """Take all there is, also what deleted checkpoints leave."""
            with ballast.open("wb", buffering=0) as opened:
                while not over.wait(0.001):
                    with contextlib.suppress(OSError):
                        while True:
                            opened.write(bytes(4096))

        with Strike(stored(small / "full", 28), fill).armed():
            with pytest.raises(StorageError, match=r"could not be stored: .*No space left"):
                fit(config)
            over.set()
        assert whole(small / "full"), "what was stored before is whole"
        ballast.unlink()
        again = time.time()
        result = fit(config)
        assert service.losses(service.run(result.mlflow_run_id)) == undisturbed
        note_cost(service, result.mlflow_run_id, "disk full; from the next submission on", again)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@slow
def test_tracking_that_is_away_for_a_while_and_a_worker_that_dies_meanwhile(
    service: Service, undisturbed: list[float], tmp_path: Path
) -> None:
    """What the dead worker had not sent lies in the run's folder, and the next one sends it."""
    with tracking_server(tmp_path) as server:
        away = Strike(stored(service.home / "runs/away", 13), server.kill)
        dies = Strike(stored(service.home / "runs/away", 48), lambda: workers(service)[-1].kill())
        back = Strike(stored(service.home / "runs/away", 78), server.start)
        with away.armed(), dies.armed(), back.armed():
            result = fit(service.config(run__name="away", tracking__uri=server.uri, **LONG))
        assert result.tracked
        assert losses(server.uri, result.mlflow_run_id) == undisturbed
        assert mlflow.MlflowClient(server.uri).get_run(result.mlflow_run_id).info.status == "FINISHED"


@slow
def test_tracking_that_is_gone_until_the_run_is_submitted_again(
    service: Service, undisturbed: list[float], tmp_path: Path
) -> None:
    """The training comes to its end without it; the same command, later, completes the history and the artifacts."""
    with tracking_server(tmp_path) as server:
        config = service.config(run__name="gone", tracking__uri=server.uri, **LONG)
        with Strike(stored(service.home / "runs/gone", 13), server.kill).armed():
            first = fit(config)
        assert not first.tracked
        assert "submit the same command again to complete it" in first.summary()
        server.start()
        second = fit(config)
        assert second.tracked
        assert second.mlflow_run_id == first.mlflow_run_id
        assert losses(server.uri, second.mlflow_run_id) == undisturbed
        client = mlflow.MlflowClient(server.uri)
        assert client.get_run(second.mlflow_run_id).info.status == "FINISHED"
        assert "model/model.safetensors" in {
            file.path for file in client.list_artifacts(second.mlflow_run_id, "model")
        }


@slow
def test_a_run_that_fails_again_and_again_gives_up_and_says_why(service: Service) -> None:
    """The worker's own words, and not Ray's; a run that comes forward in between would go on."""
    first = fit(service.config(run__name="broken", run__stop_after_epochs=1))
    folder = service.home / "runs/broken/checkpoint-epoch-000001"
    whole_meta = (folder / MARKER).read_text()
    (folder / MARKER).write_text(whole_meta.replace('"world_size"', '"word_size"'))
    with pytest.raises(
        DamagedError, match=r"no checkpoint of this run is whole .*meta\.json is damaged: .*world_size"
    ):
        fit(service.config(run__name="broken", optim__epochs=1))
    (folder / "optimizer.pt").write_bytes(b"no state")  # of which meta.json says the same
    (folder / MARKER).unlink()
    (folder / MARKER).write_text(json.dumps({**json.loads(whole_meta), "files": file_checksums(folder)}))
    with pytest.raises(WorkersFailedError, match=r"failed 2 times without a new checkpoint .*max_failures=1"):
        fit(service.config(run__name="broken", run__max_failures=1, optim__epochs=1))
    assert service.run(first.mlflow_run_id).info.status == "FAILED"
