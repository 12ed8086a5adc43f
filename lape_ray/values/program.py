"""Name what a person types to run a part of this package."""

from __future__ import annotations

from pathlib import Path

JOBS = Path(__file__).parent.parent.parent / "jobs"
_SCRIPTS = {"train": "imagenet_deit.py", "write-data": "write_beton.py"}


def program(subcommand: str) -> str:
    """Name the job's script in a checkout, and the console's subcommand where only the package is installed."""
    script = _SCRIPTS[subcommand]
    return f"python jobs/{script}" if (JOBS / script).is_file() else f"lape-ray {subcommand}"
