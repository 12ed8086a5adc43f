"""The driver of one Ray Train launch of `jobs/benchmark.py ray`, in a process of its own as torchrun is.

A process reads Ray's access token once, as it starts: the one that started the cluster could not connect to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lape_ray.bench.rank import measure
from lape_ray.cluster import connected, run_workers


def main() -> None:
    job = json.loads(sys.argv[1])
    gpu = job["device"].startswith("cuda")
    with connected():
        found = run_workers(measure, job, workers=job["workers"], threads=job["threads"], use_gpu=gpu)
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
