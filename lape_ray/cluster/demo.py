"""Run the whole service on this machine: the steps behind `lape-ray demo`."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lape_ray.cluster.local import LocalCluster, local_cluster
from lape_ray.data.beton.convert import convert
from lape_ray.tracking import git_commit
from lape_ray.values.environment import environment
from lape_ray.values.redaction import refuse_secret, shared_variables

# Half as wide as the demo's network and half as long, one worker a trial: 28 trials in minutes.
SEARCH = (
    "--seeds=2", "--model.bias=none", "--model.rotary=none", "--model.embed_dim=64", "--optim.epochs=12",
    "--run.num_workers=1",
)  # fmt: skip


def run_demo(project: Path | None, *, home: Path, tune: bool, workers: int, overrides: Sequence[str]) -> int:
    """Write the digits, start a Ray, submit a job and wait for it; returns its exit code.

    Args:
        project: checkout that is sent with the job; None: the job runs the installed package.
        home: folder for data, checkpoints and MLflow.
        tune: search over positions and joins; else train one network.
        workers: training processes, one CPU each.
        overrides: options of the job, without secrets, as they become its command line.
    """
    for word in overrides:
        refuse_secret("option", word)
    started, home = time.monotonic(), home.absolute()
    data = write_digits(home / "data")
    # Each training gets a name, so that MLflow can compare it with the others.
    train, search = ["python", "jobs/imagenet_deit.py"], ["python", "jobs/tune_position.py"]
    if project is None:
        train, search = ["lape-ray", "train"], ["lape-ray", "tune"]
    job = [*train, "demo", f"--run.num_workers={workers}"]
    if tune:
        job = [*search, "positions", "demo", *SEARCH]
    job += [f"--data.{split}={path}" for split, path in data.items()] + [*overrides]
    variables = shared_variables() | {"LAPE_RAY_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    if project and (commit := git_commit(project)):  # a submitted job has the files, but not the repository
        variables["LAPE_RAY_GIT_COMMIT"] = commit
    print("starting a private Ray ...", flush=True)
    with local_cluster(num_cpus=workers) as ray:
        folder = {"working_dir": str(project)} if project else {}
        done = _submit(ray, job, {**folder, "env_vars": variables})
    print(f"demo {'finished' if done else 'failed'} after {time.monotonic() - started:.0f} s", flush=True)
    return 0 if done else 1


def _submit(ray: LocalCluster, job: Sequence[str], runtime_env: dict[str, Any]) -> bool:
    """Submit a job as `ray job submit` does, print what it prints, and tell whether it succeeded."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of every file that it does not send
    # The client prefers an address in the environment to the one that it is given.
    with environment({**ray.environment, "RAY_ADDRESS": ray.dashboard}):
        access = {"Authorization": f"Bearer {ray.environment['RAY_AUTH_TOKEN']}"}
        client = JobSubmissionClient(ray.dashboard, headers=access)
        name = client.submit_job(entrypoint=shlex.join(job), runtime_env=runtime_env)

        async def show() -> None:
            async for text in client.tail_job_logs(name):
                print(text, end="", flush=True)

        asyncio.run(show())
        while not (status := client.get_job_status(name)).is_terminal():
            time.sleep(0.2)
    return status == JobStatus.SUCCEEDED


def write_digits(folder: Path) -> dict[str, Path]:
    """Write scikit-learn's digits as one .beton for each split, unless they exist; returns their paths."""
    paths = {split: folder / f"digits_{split}.beton" for split in ("train", "val")}
    for split, path in paths.items():
        if not path.exists():
            print(convert("digits", path, split=split), flush=True)
    return paths
