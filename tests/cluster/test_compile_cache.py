"""Compiled code that travels with a run's storage."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.service import ROOT

from lape_ray import tracking
from lape_ray.cluster.compile_cache import FOLDERS, compile_cache
from lape_ray.config import RunConfig, TrainConfig
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that compiles, with an MLflow that keeps tags."""
    tags: dict[str, str] = {}
    monkeypatch.setattr(tracking, "tag_run", lambda uri, run_id, new: tags.update(new))
    monkeypatch.setattr(tracking, "read_run", lambda uri, run_id, metrics: SimpleNamespace(tags=tags))
    for name in FOLDERS:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "runs/compiled"
    folder.mkdir(parents=True)
    config = TrainConfig(run=RunConfig(compile="default"))
    return SimpleNamespace(
        folder=str(folder), tracking_uri="", mlflow_run_id="", config=config, check_lease=lambda: None
    )


def compile_on(machine: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Compile on a machine; returns whether it had the result already."""
    monkeypatch.setenv("LAPE_RAY_CACHE", str(machine))
    with compile_cache(run, CPU) as store:
        kernel = Path(os.environ[FOLDERS[0]], "ab/kernel.so")
        found = kernel.exists()
        kernel.parent.mkdir(exist_ok=True)
        kernel.write_bytes(b"code")
        store()
    assert FOLDERS[0] not in os.environ
    return found


def test_a_fresh_machine_has_what_another_one_compiled(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [compile_on(tmp_path / name, run, monkeypatch) for name in ("one", "one", "two")] == [
        False,
        True,
        True,
    ]


def test_python_3_11_2_unpacks_it(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12's, whose `extractall` takes no filter."""
    extractall = tarfile.TarFile.extractall
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda archive, path: extractall(archive, path))
    assert not compile_on(tmp_path / "one", run, monkeypatch)
    assert compile_on(tmp_path / "two", run, monkeypatch)


def test_an_archive_that_the_mlflow_run_does_not_know_is_not_opened(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_on(tmp_path / "one", run, monkeypatch)
    (archive,) = Path(run.folder).glob("compiled-*.tar.gz")
    archive.write_bytes(archive.read_bytes() + b"x")
    assert not compile_on(tmp_path / "two", run, monkeypatch)


def test_the_users_own_folder_is_left_alone(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDERS[0], "/elsewhere")
    with compile_cache(run, CPU) as store:
        assert os.environ[FOLDERS[0]] == "/elsewhere"
        store()
    assert not list(Path(run.folder).iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_start_compiles_in_a_fifth_of_the_time(tmp_path: Path) -> None:
    """On a fresh machine, and a run that goes on: what is left is tracing."""
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:16"), tmp_path / f"{split}.beton", workers=1)

    def seconds(machine: str, epochs: int) -> float:
        environment = {name: value for name, value in os.environ.items() if name not in FOLDERS}
        environment |= {"LAPE_RAY_HOME": str(tmp_path), "LAPE_RAY_CACHE": str(tmp_path / machine)}
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # so that compilers are children of this process
        command = [sys.executable, str(ROOT / "tests/helpers/compile_seconds.py"), str(tmp_path), str(epochs)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return float(done.stdout.splitlines()[-1])

    first, second = seconds("one", 1), seconds("two", 2)
    print(f"compilation took {first:.1f} s of the CPUs, and {second:.1f} s on a second machine")
    assert second <= 0.2 * first
