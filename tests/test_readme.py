"""The README's commands: each names a script that exists, with options that it takes and a config that is valid."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text().replace("\\\n", " ")
JOBS = re.findall(r"python ((?:jobs|benchmarks)/\S+\.py)(.*)", TEXT)
SHORT = {"imagenet_deit.py": ["--dump"], "tune_position.py": ["--list"]}


@pytest.mark.parametrize(("job", "words"), JOBS, ids=[f"{job} {words[:30]}" for job, words in JOBS])
def test_a_command_of_the_readme_is_understood(job: str, words: str) -> None:
    """The exact command with an option that ends it before it works on data."""
    command = [
        sys.executable,
        str(ROOT / job),
        *shlex.split(words, comments=True),
        *SHORT.get(Path(job).name, ["--help"]),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_every_job_but_the_demo() -> None:
    shown = {Path(job).name for job, _ in JOBS if job.startswith("jobs/")}
    assert shown == {path.name for path in (ROOT / "jobs").glob("*.py")} - {"demo.py"}


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)`?", TEXT)) <= targets


def test_the_map_names_every_room() -> None:
    written = TEXT[TEXT.index("## Map") :]
    files = {path.name for path in (ROOT / "lape_ray").glob("*.py")} - {"__init__.py"}
    for name in files | {f"{path.parent.name}/" for path in (ROOT / "lape_ray").glob("*/__init__.py")}:
        assert re.search(rf"^ +{name} {{2,}}\S", written, re.MULTILINE), (
            f"{name} is missing from the README's map"
        )


ROOMS = sorted(
    path.parent
    for path in (ROOT / "lape_ray").glob("*/**/__init__.py")
    if len([*path.parent.glob("*.py")]) > 1 and path.parent.name not in {"search"}
)


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_docstring_of_a_room_is_its_map(room: Path) -> None:
    """A line for each file and folder, and no line for what is not there."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    lines = re.findall(r"^ *(\w+/?(?:, \w+/?)*) {2,}\S", text, re.MULTILINE)
    named = {name for line in lines for name in line.split(", ")}
    files = {path.stem for path in room.glob("*.py")} - {"__init__"}
    assert named == files | {f"{path.parent.name}/" for path in room.glob("*/__init__.py")}
