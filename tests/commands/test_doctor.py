"""`lape-ray doctor`: each line tells a machine that works from one that does not, and says the fix."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lape_ray.commands import checks, doctor
from lape_ray.commands.checks import AbsentError, BrokenError

SECRET = "hunter2-hunter2"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def plain_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, no service, and a home with space."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "RAY_ADDRESS", "CC",
                 "MLFLOW_TRACKING_URI"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checks, "gpu_files", list)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**40))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that work, as far as PyTorch tells."""
    monkeypatch.setattr(checks, "gpu_files", lambda: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def port() -> Iterator[int]:
    """A port where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def broken(check: Callable[[], str]) -> tuple[str, str]:
    """What does not work, and its fix."""
    with pytest.raises(BrokenError) as error:
        check()
    return str(error.value), error.value.fix


def absent(check: Callable[[], str]) -> str:
    with pytest.raises(AbsentError) as error:
        check()
    return str(error.value)


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_python().endswith(sys.executable)
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert "use Python 3.11" in broken(checks.check_python)[1]


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "on the CPU" in absent(checks.check_gpu)
    monkeypatch.setattr(checks, "gpu_files", lambda: ["/dev/nvidia0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    what, fix = broken(checks.check_gpu)
    assert "/dev/nvidia0 is there" in what
    assert fix == "install a driver for CUDA 13.2"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "PyTorch with CUDA" in broken(checks.check_gpu)[1]


def test_nccl(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    assert "no GPU" in absent(checks.check_nccl)
    request.getfixturevalue("gpus")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert "built without" in broken(checks.check_nccl)[0]


def test_triton(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    assert "no GPU" in absent(checks.check_triton)
    request.getfixturevalue("gpus")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", missing)
    assert broken(checks.check_triton)[0] == "not installed"


def test_compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    assert checks.check_compiler() in ("gcc", "clang", "cc")
    (tmp_path / "broken-cc").write_text(
        "#!/bin/sh\necho 'x.c:1: fatal error: Python.h: No such file' >&2; exit 1\n"
    )
    (tmp_path / "broken-cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "broken-cc"))
    assert "Python.h" in absent(checks.check_compiler)
    request.getfixturevalue("gpus")
    what, fix = broken(checks.check_compiler)
    assert "Python.h: No such file" in what
    assert "python3-dev" in fix
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "apt-get install gcc" in broken(checks.check_compiler)[1]


def test_libjpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_libjpeg() == "the compiled decoder works"
    monkeypatch.setitem(sys.modules, "_lape_ray_native", None)
    monkeypatch.delitem(sys.modules, "lape_ray.data.native")
    monkeypatch.delattr("lape_ray.data.native")
    what, fix = broken(checks.check_libjpeg)
    assert "cannot be imported" in what
    assert "make setup" in fix


def test_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> Any:
        raise OSError("libopencv_core.so.406: cannot open shared object file")

    monkeypatch.setattr(checks, "missing_for_ffcv", list)
    package = SimpleNamespace(origin="/none/ffcv/__init__.py")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: package)
    assert "no compiled library" in broken(checks.check_ffcv)[0]
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/none/_libffcv.so")]))
    monkeypatch.setattr(checks.ctypes, "CDLL", refuse)
    what, fix = broken(checks.check_ffcv)
    assert "libopencv_core" in what
    assert "libopencv-dev" in fix
    monkeypatch.setattr(checks, "missing_for_ffcv", lambda: ["distutils"])
    assert "lape_ray[ffcv]" in broken(checks.check_ffcv)[1]
    monkeypatch.setattr(checks, "missing_for_ffcv", lambda: ["ffcv", "numba"])
    assert "only --data.backend ffcv" in absent(checks.check_ffcv)


def test_s3(monkeypatch: pytest.MonkeyPatch, port: int, closed_port: int) -> None:
    assert "only s3://" in absent(lambda: checks.check_s3(None))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    assert "AWS_ENDPOINT_URL" in broken(lambda: checks.check_s3(None))[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    assert "AWS_SECRET_ACCESS_KEY" in broken(lambda: checks.check_s3(None))[1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET)
    assert f"http://127.0.0.1:{port}, with credentials" in checks.check_s3(None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:{port}")
    what, _ = broken(lambda: checks.check_s3(None))
    assert "password" in what
    assert SECRET not in what


def test_an_address_of_runs_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise ValueError(f"storage {address!r} is not writable: SignatureDoesNotMatch")

    monkeypatch.setattr(checks.storage, "check_writable", refuse)
    what, fix = broken(lambda: checks.check_s3("s3://bucket/runs"))
    assert "SignatureDoesNotMatch" in what
    assert "credentials" in fix
    monkeypatch.setattr(checks.storage, "check_writable", lambda _: None)
    assert checks.check_s3("s3://bucket/runs") == "s3://bucket/runs can be written"


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "a file in" in checks.check_mlflow(None)
    assert not (tmp_path / "home").exists(), "looking makes nothing"

    def away(uri: str) -> None:
        raise ValueError(f"the MLflow server {uri!r} cannot be used: connection refused")

    monkeypatch.setattr(checks.tracking, "check_reachable", away)
    what, fix = broken(lambda: checks.check_mlflow("http://127.0.0.1:1"))
    assert "connection refused" in what
    assert "MLFLOW_TRACKING_URI" in fix
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@host")
    what, _ = broken(lambda: checks.check_mlflow(None))
    assert SECRET not in what
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    assert "LAPE_RAY_HOME" in broken(lambda: checks.check_mlflow(None))[1]
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)
    assert broken(lambda: checks.check_mlflow(None))[0] == "not installed"


def test_ray(monkeypatch: pytest.MonkeyPatch, port: int, closed_port: int) -> None:
    def imported(code: int, said: str) -> None:
        monkeypatch.setattr(
            checks.subprocess,
            "run",
            lambda command, **_: subprocess.CompletedProcess(command, code, "", said),
        )

    imported(0, "")
    assert "of its own" in checks.check_ray()
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")
    assert "answers" in checks.check_ray()
    for address in (f"127.0.0.1:{closed_port}", f"ray://127.0.0.1:{closed_port}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert "correct RAY_ADDRESS" in broken(checks.check_ray)[0]
    imported(1, "Traceback\nImportError: libfoo.so")
    assert "ImportError: libfoo.so" in broken(checks.check_ray)[0]

    def slow(command: list[str], **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(checks.subprocess, "run", slow)
    assert "busy" in checks.check_ray()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", missing)
    assert broken(checks.check_ray)[0] == "not installed"


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**27, 2**26, 2**26))
    assert checks.check_shared_memory() == "64 MB free"
    request.getfixturevalue("gpus")
    what, fix = broken(checks.check_shared_memory)
    assert "needs 128 MB" in what
    assert "--shm-size" in fix


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert str(tmp_path / "home") in checks.check_disk(None)
    assert "/runs" in checks.check_disk("/runs")
    monkeypatch.setattr(checks.storage, "free_bytes", lambda place: 1e9 if place == "/tmp" else 1e12)
    assert "RAY_TMPDIR" in broken(lambda: checks.check_disk(None))[1]


def test_the_lines_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing() -> str:
        raise AbsentError("none")

    def fails() -> str:
        raise BrokenError(f"http://user:{SECRET}@host is away\nmore", "start it")

    found: dict[str, Callable[[], str]] = {"Python": lambda: "3", "GPU": nothing}
    monkeypatch.setattr(doctor, "checks", lambda *_: found)
    assert doctor.main([]) == 0
    found |= {"MLflow": fails, "Ray": lambda: str(1 // 0)}
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[:2] == ["ok    Python         3", "-     GPU            none"]
    assert lines[2] == "FAIL  MLflow         http://host is away; fix: start it"
    assert "ZeroDivisionError" in lines[3]


def test_a_check_that_hangs_does_not_hold_the_others_up() -> None:
    over = threading.Event()
    start = time.monotonic()
    lines = list(doctor.examine({"a": lambda: str(over.wait(60)), "b": lambda: "fine"}, 0.3))
    assert time.monotonic() - start < 10
    assert lines[0][:2] == ("a", "FAIL")
    assert lines[1] == ("b", "ok", "fine")
    over.set()


def test_every_line_is_of_a_check() -> None:
    assert list(checks.checks(None, None)) == [
        "Python", "GPU", "NCCL", "Triton", "C compiler", "libjpeg", "FFCV", "S3", "MLflow", "Ray", "shared memory",
        "disk space",
    ]  # fmt: skip
