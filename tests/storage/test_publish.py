"""What staging for remote storage leaves on a machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lape_ray import storage

STAGES_AND_WAITS = """
import sys, time
from lape_ray import storage
with storage.staging("s3://bucket/run/checkpoint-1") as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print(folder.parent, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # asks for TMPDIR again
    return tmp_path


def staging_process() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", STAGES_AND_WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_staged_is_swept(temporary: Path) -> None:
    living, kept = staging_process()
    killed, left = staging_process()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    try:
        assert {kept, left} <= set(temporary.iterdir())
        with storage.staging("s3://bucket/run/checkpoint-2"):
            assert left.exists(), "it is young: it might be about to be locked"
        for folder in (kept, left):
            os.utime(folder, (0, 0))
        with storage.staging("s3://bucket/run/checkpoint-2") as folder:
            assert not left.exists()
            assert (kept / "checkpoint-1/weights").stat().st_size == 1000
            assert folder.parent.parent == temporary
        assert list(temporary.iterdir()) == [kept]
    finally:
        living.kill()
        living.wait()
