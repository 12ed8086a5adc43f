"""The version of the code that a run is of, as tags of its run."""

from __future__ import annotations

import contextlib
import getpass
import os
import subprocess
from pathlib import Path


def source_tags(program: str) -> dict[str, str]:
    """Return the tags by which MLflow's list names source, version and user of a run; unknown ones are left out.

    The commit is $LAPE_RAY_GIT_COMMIT, for code that was sent without its repository, else that of this checkout.
    """
    tags = {"mlflow.source.name": program, "mlflow.source.type": "JOB"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    commit = os.environ.get("LAPE_RAY_GIT_COMMIT") or git_commit(Path(__file__).parent)
    if commit:
        tags |= {"mlflow.source.git.commit": commit, "git_commit": commit}
    return tags


def git_commit(folder: Path) -> str | None:
    """Return the commit of the checkout that `folder` lies in, `-dirty` where files differ from it.

    Outside of a checkout it is None.
    """
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
