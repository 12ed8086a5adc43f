"""Jobs and benchmarks as commands, run within the test's process: a new one imports torch, which takes seconds."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from helpers.plugins import forget

ROOT = Path(__file__).parent.parent.parent


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_here(script: str, *words: str | Path) -> Done:
    """Run `python SCRIPT WORDS...`, a path in the checkout, and catch what it prints and how it ends."""
    path, stdout, stderr = str(ROOT / script), io.StringIO(), io.StringIO()
    with (
        mock.patch("lape_ray.cli.atexit"),  # the tests' process ends with a code of its own
        mock.patch.object(sys, "argv", [path, *map(str, words)]),
        mock.patch.object(sys, "path", [str(Path(path).parent), *sys.path]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            forget()
    if not isinstance(code, int):  # sys.exit("words") prints them, and ends with 1
        print(code, file=stderr)
        code = 1
    return Done(code, stdout.getvalue(), stderr.getvalue())
