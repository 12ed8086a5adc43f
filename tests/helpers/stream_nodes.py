"""Runs whose data come from S3 to 1, 2 and 4 nodes of a cluster, as they are submitted: `stream_nodes.py HOME`.

HOME holds data/, and the S3 of the environment a copy of it at s3://lape/data. Each node has a cache of its own. Prints
one line of JSON: by number of nodes the share of the data that S3 sent, how many whole copies of files the nodes had at
the end, the losses of all steps, and those of a run on HOME/data.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

from ray.cluster_utils import Cluster

from helpers.s3_server import Proxy
from helpers.service import Service
from helpers.tracking_server import history, tracking_server
from lape_ray.cluster.local import LocalCluster, free_ports

SIZES = (1, 2, 4)
EPOCHS = 4  # so that every node has fetched all before its run ends


def count_whole(cache: Path) -> int:
    """Count the files of a node's cache that are whole; they have what is in data/."""
    files = [file for mark in cache.glob("*/.complete") for file in mark.parent.glob("*.beton")]
    for file in files:
        assert filecmp.cmp(file, cache.parent.parent / "data" / file.name, shallow=False), file
    return len(files)


def main(home: Path) -> None:
    os.environ.pop("LAPE_RAY_CACHE", None)  # the driver's would be that of all nodes
    proxy = Proxy(urlsplit(os.environ["AWS_ENDPOINT_URL"]).port)
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
    (port,) = free_ports(1)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": port},
    )
    caches = [home / "caches" / str(number) for number in range(max(SIZES))]
    for cache in caches:
        cluster.add_node(num_cpus=1, env_vars={"LAPE_RAY_CACHE": str(cache)})
    at = LocalCluster(cluster.address, f"http://{cluster.webui_url}", {"RAY_ADDRESS": cluster.address}, pid=0)
    total, told = sum(file.stat().st_size for file in (home / "data").iterdir()), {}
    with tracking_server(home) as server:

        def losses(workers: int, place: str) -> list[float]:
            fields = {f"data.{split}": f"{place}/{split}.beton" for split in ("train", "val")}
            fields |= {
                "run.name": f"{'streamed' if '://' in place else 'local'}-{workers}",
                "run.num_workers": str(workers),
            }
            fields |= {"optim.epochs": str(EPOCHS), "run.log_steps": "1", "run.storage": str(home / "runs")}
            fields |= {"tracking.uri": server.uri, "tracking.pages": "false"}
            words = [f"--{key}={value}" for key, value in fields.items()]
            done = Service(at, home).submit_job("jobs/imagenet_deit.py", "smoke", *words)
            run = re.search(r"MLflow run ([0-9a-f]{32})", done.stdout)
            if done.returncode or run is None:
                raise SystemExit(f"the job ended with code {done.returncode}:\n{done.stdout[-4000:]}")
            return [loss for loss, _ in history(server.uri, run[1]).values()]

        for size in SIZES:
            before = proxy.received
            streamed = losses(size, "s3://lape/data")
            sent = (proxy.received - before) / total
            whole = sum(map(count_whole, caches))
            for cache in filter(Path.exists, caches):
                shutil.rmtree(cache)
            local = losses(size, str(home / "data"))
            told[size] = {"sent": sent, "whole": whole, "losses": streamed, "local": local}
    cluster.shutdown()
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
