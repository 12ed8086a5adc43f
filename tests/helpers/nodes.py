"""A run that is submitted to a cluster of several nodes, and loses one; a process of its own: `nodes.py SCENARIO HOME`.

Prints one line of JSON: the losses by step, the worker counts that the run told of, seconds to the next new step.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
from ray.cluster_utils import Cluster

from helpers.faults import LONG, longest_pause, stored
from helpers.service import ROOT, Service
from helpers.tracking_server import history, tracking_server
from lape_ray.cluster.local import LocalCluster, executable, free_ports
from lape_ray.config import Span, TrainConfig, replace_fields
from lape_ray.recipes import recipe


def fields_of(scenario: str, home: Path) -> dict[str, object]:
    """The run of a scenario. One that is drained lasts longer than the node that it is on."""
    fields: dict[str, object] = {
        **{name.replace("__", "."): value for name, value in LONG.items()},
        **{f"data.{split}": str(home / f"{split}.beton") for split in ("train", "val")},
        "run.name": scenario,
        "run.storage": str(home / "runs"),
        "run.num_workers": {"elastic": Span(1, 2), "blind": 1}.get(scenario, 2),
        "run.standby_workers": int(scenario in ("standby", "blind")),
        "run.max_failures": 0 if scenario == "drain" else 3,
        "tracking.pages": scenario == "elastic",
    }
    if epochs := {"drain": 400, "another": 24, "standby": 24, "blind": 80}.get(scenario):
        fields["optim.epochs"] = epochs
    return fields


def config_of(scenario: str, home: Path) -> TrainConfig:
    return replace_fields(recipe("smoke"), fields_of(scenario, home))


def environment(home: Path) -> dict[str, str]:
    """That of a process which starts a cluster of several nodes on this machine."""
    others = ("RAY_ADDRESS", "RAY_AUTH")  # of a cluster that this process is connected to
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(others)},
        # The submitted job's:
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "RAY_AUTH_MODE": "disabled",
        "RAY_health_check_period_ms": "1000",  # as docs/fault_tolerance.md says
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_memory_monitor_refresh_ms": "0",  # what else runs on this machine may take its memory
        "LAPE_RAY_HOME": str(home),
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT / "benchmarks"))),
    }


def main(scenario: str, home: Path) -> None:
    (port,) = free_ports(1)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": port},
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3 if scenario in ("another", "standby") else 2)]
    at = LocalCluster(cluster.address, f"http://{cluster.webui_url}", {"RAY_ADDRESS": cluster.address}, pid=0)
    log = home / "job.log"
    with tracking_server(home) as server, log.open("wb") as output:
        words = [f"--{key}={value}" for key, value in fields_of(scenario, home).items()]
        submission = Service(at, home).submission(
            "jobs/imagenet_deit.py", "smoke", *words, f"--tracking.uri={server.uri}"
        )
        job = subprocess.Popen(**submission, stdout=output, stderr=subprocess.STDOUT)
        reached = stored(home / "runs" / scenario, 28)
        while not reached() and job.poll() is None:
            time.sleep(0.02)
        lost = nodes[1]
        while scenario in ("another", "standby", "blind") and not trains(lost):
            lost = nodes[-2] if lost is nodes[-1] else nodes[-1]
        struck = time.time()
        if scenario == "drain":
            cluster.add_node(num_cpus=1)
            drain(cluster.address, nodes[1].node_id)
            time.sleep(12)
            cluster.remove_node(nodes[1])
        else:
            cluster.remove_node(lost, allow_graceful=False)
            if scenario == "replaced":
                cluster.add_node(num_cpus=1)
            if scenario == "blind":  # Ray Train's controller waits for the node, and looks at no worker
                later = stored(home / "runs" / scenario, 200)
                while not later() and job.poll() is None:
                    time.sleep(0.02)
                struck = time.time()
                (left,) = processes(next(node for node in nodes if node is not lost))
                left.kill()
        code = job.wait(600)
        printed = log.read_text()
        run = re.search(r"MLflow run ([0-9a-f]{32})", printed)
        if code or run is None:
            raise SystemExit(f"the job ended with code {code}:\n{printed[-4000:]}")
        points = history(server.uri, run[1])
        client = mlflow.MlflowClient(server.uri)
        pause, before = longest_pause([(step, when) for step, (_, when) in points.items()], struck)
        print(
            json.dumps(
                {
                    "losses": {step: loss for step, (loss, _) in points.items()},
                    "workers": re.findall(r"(\d) of 1:2 workers", printed),
                    "resumed": re.findall(
                        r"continuing after epoch (\d+) of \d+(?: and step (\d+) of \d+)?", printed
                    ),
                    "pages": [file.path for file in client.list_artifacts(run[1], "summary")],
                    "workers_logged": [
                        point.value for point in client.get_metric_history(run[1], "train/workers")
                    ],
                    "before": before,
                    "recovery_s": pause,
                }
            )
        )
    cluster.shutdown()


def trains(node: Any) -> bool:
    """Whether a worker of the node takes time of a CPU, and does not stand by."""
    workers = processes(node)
    before = [sum(each.cpu_times()[:2]) for each in workers]
    time.sleep(0.5)
    return any(sum(each.cpu_times()[:2]) > then + 0.05 for each, then in zip(workers, before, strict=True))


def processes(node: Any) -> list[psutil.Process]:
    """Those of Ray Train's workers on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [each for each in raylet.children(recursive=True) if "RayTrainWorker" in " ".join(each.cmdline())]


def drain(address: str, node_id: str) -> None:
    """What a cloud's notice of preemption becomes: the node is to go in ten seconds."""
    command = [executable("ray"), "drain-node", f"--address={address}", f"--node-id={node_id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
    subprocess.run([*command, "--deadline-remaining-seconds=10"], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
