"""A run on a cluster of several nodes that loses one; a process of its own: `nodes.py SCENARIO HOME`.

Prints one line of JSON: the losses by step, the worker counts that the run told of, seconds to the next new step.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
import ray
from ray.cluster_utils import Cluster

from helpers.faults import LONG, longest_pause, stored
from helpers.tracking_server import history, tracking_server
from lape_ray.cluster.launch import FitResult, fit
from lape_ray.cluster.local import executable
from lape_ray.config import Span, TrainConfig, replace_fields
from lape_ray.recipes import recipe


class Tee(io.TextIOBase):
    """Keeps what is printed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return sys.stderr.write(text)


def config_of(scenario: str, home: Path) -> TrainConfig:
    """The run of a scenario. One that is drained lasts longer than the node that it is on."""
    fields: dict[str, object] = {
        **{name.replace("__", "."): value for name, value in LONG.items()},
        **{f"data.{split}": str(home / f"{split}.beton") for split in ("train", "val")},
        "run.name": scenario,
        "run.storage": str(home / "runs"),
        "run.num_workers": Span(1, 2) if scenario == "elastic" else 2,
        "run.standby_workers": int(scenario == "standby"),
        "run.max_failures": 0 if scenario == "drain" else 3,
        "tracking.pages": scenario == "elastic",
    }
    if scenario in ("drain", "another", "standby"):
        fields["optim.epochs"] = 400 if scenario == "drain" else 24
    return replace_fields(recipe("smoke"), fields)


def main(scenario: str, home: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3 if scenario in ("another", "standby") else 2)]
    ray.init(address=cluster.address)
    with tracking_server(home) as server:
        config = replace_fields(config_of(scenario, home), {"tracking.uri": server.uri})
        done: list[FitResult] = []
        failed: list[BaseException] = []

        def train() -> None:
            try:
                done.append(fit(config))
            except BaseException as error:
                failed.append(error)

        tee = Tee()
        with contextlib.redirect_stdout(tee):
            thread = threading.Thread(target=train, daemon=True)
            thread.start()
            reached = stored(home / "runs" / scenario, 28)
            while not reached() and thread.is_alive():
                time.sleep(0.02)
            lost = nodes[1]
            while scenario in ("another", "standby") and not trains(lost):
                lost = nodes[1] if lost is nodes[2] else nodes[2]
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
            thread.join(600)
        if failed or not done:
            raise SystemExit(f"the run failed: {failed}")
        run_id = done[0].mlflow_run_id
        points = history(server.uri, run_id)
        client = mlflow.MlflowClient(server.uri)
        pause, before = longest_pause([(step, when) for step, (_, when) in points.items()], struck)
        print(
            json.dumps(
                {
                    "losses": {step: loss for step, (loss, _) in points.items()},
                    "workers": re.findall(r"(\d) of 1:2 workers", tee.text),
                    "resumed": re.findall(
                        r"continuing after epoch (\d+) of \d+(?: and step (\d+) of \d+)?", tee.text
                    ),
                    "pages": [file.path for file in client.list_artifacts(run_id, "summary")],
                    "workers_logged": [
                        point.value for point in client.get_metric_history(run_id, "train/workers")
                    ],
                    "before": before,
                    "recovery_s": pause,
                }
            )
        )
    ray.shutdown()
    cluster.shutdown()


def trains(node: Any) -> bool:
    """Whether a worker of the node takes time of a CPU, and does not stand by."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    workers = [
        each for each in raylet.children(recursive=True) if "RayTrainWorker" in " ".join(each.cmdline())
    ]
    before = [sum(each.cpu_times()[:2]) for each in workers]
    time.sleep(0.5)
    return any(sum(each.cpu_times()[:2]) > then + 0.05 for each, then in zip(workers, before, strict=True))


def drain(address: str, node_id: str) -> None:
    """What a cloud's notice of preemption becomes: the node is to go in ten seconds."""
    command = [executable("ray"), "drain-node", f"--address={address}", f"--node-id={node_id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
    subprocess.run([*command, "--deadline-remaining-seconds=10"], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
