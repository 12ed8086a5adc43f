"""Run the whole service on this machine: digits -> .beton -> a private Ray -> a submitted job -> MLflow.

`make demo` trains one network, `make demo-tune` (--tune) compares position embeddings and joins. Everything it keeps
lies in --home; the Ray it starts is gone when it ends. That Ray and the job have this process's environment, secrets
included; none of them is sent.
"""

import argparse
from pathlib import Path

from lape_ray.cli import run_job

PROJECT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--home", type=Path, default=PROJECT / "runs", help="folder for data, checkpoints and MLflow")
    add("--tune", action="store_true", help="a search over positions and joins, with two seeds")
    add("--workers", type=int, default=2, help="training processes, one CPU each")
    options, overrides = parser.parse_known_args()
    from lape_ray.cluster.demo import run_demo  # after parsing, so that --help is instant

    return run_demo(PROJECT, **vars(options), overrides=overrides)


if __name__ == "__main__":
    run_job(main)
