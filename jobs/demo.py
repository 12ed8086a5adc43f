"""Run the whole service on this machine: digits -> .beton -> a private Ray -> a submitted job -> MLflow.

`make demo` trains one network, `make demo-tune` (--tune) compares position embeddings and joins. Everything it keeps
lies in --home; the Ray it starts is gone when it ends. That Ray and the job have this process's environment, secrets
included; none of them is sent.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lape_ray.cli import run_job
from lape_ray.cluster.local import executable, local_cluster
from lape_ray.values.redaction import refuse_secret, shared_variables

PROJECT = Path(__file__).resolve().parent.parent
# Half as wide as the demo's network and half as long, one worker a trial: 28 trials in minutes.
SEARCH = (
    "--seeds=2", "--model.bias=none", "--model.rotary=none", "--model.embed_dim=64", "--optim.epochs=12",
    "--run.num_workers=1",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--home", type=Path, default=PROJECT / "runs", help="folder for data, checkpoints and MLflow"
    )
    parser.add_argument(
        "--tune", action="store_true", help="a search over positions and joins, with two seeds"
    )
    parser.add_argument("--workers", type=int, default=2, help="training processes, one CPU each")
    options, overrides = parser.parse_known_args()
    from lape_ray.tracking import git_commit  # after parsing, so that --help is instant

    for word in overrides:  # they become the command line of the job
        refuse_secret("option", word)
    started, home = time.monotonic(), options.home.absolute()
    data = {split: home / "data" / f"digits_{split}.beton" for split in ("train", "val")}
    for split, path in data.items():
        if not path.exists():
            write = [
                sys.executable,
                str(PROJECT / "jobs/write_beton.py"),
                "digits",
                str(path),
                "--split",
                split,
            ]
            subprocess.run(write, check=True)
    # A separate name for every training, so that each can be compared with the others in MLflow.
    job = ["python", "jobs/imagenet_deit.py", "demo", f"--run.num_workers={options.workers}"]
    if options.tune:
        job = ["python", "jobs/tune_position.py", "positions", "demo", *SEARCH]
    job += [f"--data.{split}={path}" for split, path in data.items()] + overrides
    variables = shared_variables() | {"LAPE_RAY_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    if commit := git_commit(PROJECT):  # a submitted job has the files, but not the repository
        variables["LAPE_RAY_GIT_COMMIT"] = commit
    print("starting a Ray of its own ...", flush=True)
    with local_cluster(num_cpus=options.workers) as ray:
        submit = [
            executable("ray"),
            "job",
            "submit",
            f"--address={ray.dashboard}",
            f"--working-dir={PROJECT}",
        ]
        submit += [f"--runtime-env-json={json.dumps({'env_vars': variables})}", "--", *job]
        code = subprocess.run(submit, env={**os.environ, **ray.environment}).returncode
    print(
        f"demo {'finished' if code == 0 else 'failed'} after {time.monotonic() - started:.0f} s", flush=True
    )
    return code


if __name__ == "__main__":
    run_job(main)
