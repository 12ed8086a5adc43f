"""The map of the rooms: imports point down, and each outside service has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lape_ray"
# A room may import rooms behind a later arrow, and its own files; those in braces do not know each other.
ORDER = """
    jobs, benchmarks -> commands -> search -> cluster -> report -> inference
        -> {training, tracking, cli} -> {data, model, recipes} -> {config, storage} -> values
"""
DOORS = {
    "ray": {"cluster", "search"},
    "mlflow": {"tracking"},
    "tensorboard": {"tracking"},
    "boto3": {"storage"},
    "huggingface_hub": {"storage"},
    "ffcv": {"data.readers", "benchmarks"},
}

FLOORS = [set(floor.strip("{}").split(", ")) for floor in " ".join(ORDER.split()).split(" -> ")]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def module_of(path: Path) -> str:
    """The name of a file's module, `training.loop`; "" for the package itself."""
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES if module_of(path)}


def imported(path: Path) -> set[str]:
    """The absolute names that a file imports, wherever in it: modules, and what is taken from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(path: Path) -> set[str]:
    """The modules of the package among them."""
    inside = {name.removeprefix("lape_ray.") for name in imported(path) if name.startswith("lape_ray.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in inside} & MODULES.keys()


def room_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    room = room_of(module)
    assert room in FLOOR, f"{room} is a new room: give it a place in ORDER and a line in the README's map"
    for other in map(room_of, imported_modules(MODULES[module])):
        below = FLOOR[room] < FLOOR[other]
        assert other == room or below or {room, other} <= FLOORS[0], (
            f"{module} imports {other}, which is not below it"
        )


def test_no_imports_go_in_circles() -> None:
    """Removing modules that import none of those left removes all, except where some import each other."""
    left = {module: imported_modules(path) for module, path in MODULES.items()}
    while leaves := [module for module, others in left.items() if not others & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left, "these import each other, or stand above those that do"


@pytest.mark.parametrize("module", MODULES)
def test_each_service_has_one_door(module: str) -> None:
    for name in imported(MODULES[module]):
        doors = DOORS.get(name.split(".")[0])
        inside = doors is None or any(f"{module}.".startswith(f"{door}.") for door in doors)
        assert inside, f"{module} imports {name}; its door is {doors}"


def test_every_room_exists() -> None:
    assert {room_of(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md"])
def test_the_texts_have_the_same_order(text: str) -> None:
    assert " ".join(ORDER.split()) in " ".join((ROOT / text).read_text().split())


def test_what_a_search_decides_and_shows_knows_no_ray() -> None:
    knowing = {
        module.removeprefix("search.")
        for module in MODULES
        if room_of(module) == "search"
        and any(name.split(".")[0] == "ray" for name in imported(MODULES[module]))
    }
    tune = {"scheduler", "settings", "trial", "trials", "tuner"}
    assert knowing == tune | {"worker"}


def test_the_loop_needs_torch_alone() -> None:
    """A GPU machine may have neither Ray nor what the data path wants."""
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'ffcv', 'boto3', 'joblib', 'pyarrow', 'psutil', 'numba', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "import lape_ray.training.loop, lape_ray.training.muon, train_step, loader, seeds, gpu\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
