"""One training process of `jobs/benchmark.py ray`, whoever started it; run as a module it is torchrun's.

Knows torch.distributed and no Ray: Ray Train hands in its `report`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lape_ray.bench.clock import window
from lape_ray.bench.synthetic import Stepper, synthetic_state, training_config


def measure(
    job: Mapping[str, Any], report: Callable[[dict[str, float]], None] | None = None
) -> dict[str, Any]:
    """What this process measured, within its process group.

    Args:
        job: `orchestration.Settings` as a dict, and `started`, the time when the launch began (seconds since 1970).
        report: Ray Train's; timed after the steps.

    Returns:
        steps_s: of every timed step; cpu_s: CPU seconds of a step of this process, its median
        startup_s: from `started` to the end of the first step; clocks of several machines must agree for it
        report_ms: of every call of `report`
        threads, workers, loss: what must be the same for all launchers
    """
    device = torch.device("cpu")
    if job["device"].startswith("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    config = training_config(
        job["model"], join="lape", batch_size=job["batch_size"], workers=dist.get_world_size(), compile="off"
    )
    stepper = Stepper(synthetic_state(config, device))
    stepper.run(1)
    stepper.mean_loss()  # waits for the device
    startup_s = time.time() - job["started"]
    stepper.run(job["warmup_steps"])
    dist.barrier()
    windows = [window(stepper.run, 1, device) for _ in range(job["steps"])]
    loss = stepper.mean_loss()
    report_ms = []
    if report is not None:
        for _ in range(job["reports"]):
            wall = time.perf_counter()
            report({"train/loss": loss})
            report_ms.append(1e3 * (time.perf_counter() - wall))
    return {
        "steps_s": [each.step_s for each in windows],
        "cpu_s": statistics.median(each.cpu_s for each in windows),
        "startup_s": startup_s,
        "report_ms": report_ms,
        "threads": torch.get_num_threads(),
        "workers": dist.get_world_size(),
        "loss": loss,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    gpu = job["device"].startswith("cuda")
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        found = measure(job)
        if dist.get_rank() == 0:
            Path(job["out"]).write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
