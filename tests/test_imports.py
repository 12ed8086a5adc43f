"""The map of the rooms: imports point down, and each outside service has one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lape_ray"

# A room may import rooms of a lower floor, and its own modules.
FLOORS = [
    {"redaction", "typed"},
    {"config", "muon"},
    {
        "acceleration",
        "estimate",
        "recipes",
        "storage",
        "metrics",
        "optim",
        "model",
        "local_cluster",
        "runs_view",
        "step_graph",
    },
    {"cli", "data", "checkpoint", "tracking", "training"},
    {"distill", "predict"},
    {"checkpoint_list", "signals", "supervision"},
    {"state"},
    {"run_record", "step", "preflight"},
    {"train"},
    {"cluster", "evaluation", "gauges", "samples", "served"},
    {"subjects"},
    {"report", "export"},
    {"worker"},
    {"controller"},
    {"launch"},
    {"search"},
    {"jobs", "benchmarks"},
]
DOORS = {
    "ray": {"cluster", "controller", "gauges", "launch", "search", "supervision", "worker"},
    "mlflow": {"tracking"},
    "boto3": {"storage"},
    "ffcv": {"data", "benchmarks"},  # benchmarks: as a peer
}


def room_of(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        return path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return path.relative_to(ROOT).parts[0]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in FLOOR, f"{room} is a new room: give it a floor in this test and a line in the README's map"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "lape_ray" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != room:
            assert FLOOR[parts[1]] < FLOOR[room], (
                f"{path.name} ({room}) imports {name}, which is not below it"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_service_has_one_door(path: Path) -> None:
    for name in imported(path):
        door = DOORS.get(name.split(".")[0])
        assert door is None or room_of(path) in door, f"{path.name} imports {name}; its door is {door}"


def test_every_room_exists() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR)


def test_in_a_search_two_modules_know_ray() -> None:
    knowing = {path.name for path in FILES if room_of(path) == "search" and "ray" in imported(path)}
    assert knowing == {"lanes.py", "worker.py"}
