"""The program that errors and reports name is one that can be run where they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lape_ray.commands.main import SUBCOMMANDS
from lape_ray.recipes import command_line, recipe
from lape_ray.values import program as module
from lape_ray.values.program import JOBS, program


@pytest.mark.parametrize("name", module._SCRIPTS)
def test_a_checkout_has_the_jobs_script(name: str) -> None:
    words = program(name).split()
    assert words[0] == "python"
    assert (JOBS.parent / words[1]).is_file()


@pytest.mark.parametrize("name", module._SCRIPTS)
def test_an_installed_package_has_the_subcommand(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOBS", tmp_path)
    assert program(name) == f"lape-ray {name}"
    assert name in SUBCOMMANDS
    assert command_line(recipe("smoke")).startswith("lape-ray train smoke")
