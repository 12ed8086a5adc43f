"""Time a command's way to its first step, and from its last step to its end.

    python benchmarks/start.py --json start.json

The recipe `smoke` on handwritten digits, in the command's own process and on a Ray of its own, beside the smallest
program that Ray Train runs: one worker, one step of one linear layer. Commands take turns.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, Column, Record, Row, add_ratios, note, parser, run, spread, table

LEAST = """
import ray.train.torch
from ray.train import RunConfig, ScalingConfig

def work():
    import torch
    network = ray.train.torch.prepare_model(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    print("step 1/1", flush=True)

if __name__ == "__main__":
    storage = RunConfig(storage_path={folder!r})
    ray.train.torch.TorchTrainer(work, scaling_config=ScalingConfig(num_workers=1), run_config=storage).fit()
"""
COLUMNS = (
    Column("command", "name"),
    Column("s to the first step", "first", ".1f"),
    Column("over the least", "over"),
    Column("s from the last step to the end", "after", ".1f"),
)
STEP = re.compile(r"step +(\d+)/(\d+)")


def commands(folder: Path) -> dict[str, list[str]]:
    """Write the data and the smallest program into `folder`; returns the commands by name."""
    (folder / "least.py").write_text(LEAST.replace("{folder!r}", repr(str(folder / "least"))))
    data = []
    for split in ("train", "val"):
        file = folder / f"{split}.beton"
        words = ["jobs/write_beton.py", "digits", str(file), "--split", split]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
        data.append(f"--data.{split}={file}")
    smoke = [sys.executable, "jobs/imagenet_deit.py", "smoke", *data]
    return {
        "least": [sys.executable, str(folder / "least.py")],
        "ray": smoke,
        "in_process": [*smoke, "--run.num_workers=0"],
    }


def timed(command: Sequence[str], home: Path) -> tuple[float, float]:
    """Run a command; returns the seconds until its first step, and those from its last step to its end."""
    began, steps = time.perf_counter(), list[float]()
    environment = {**os.environ, "LAPE_RAY_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        output = []
        for line in process.stdout:
            output.append(line)
            if STEP.search(line):
                steps.append(time.perf_counter())
    if process.returncode or not steps:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(output[-30:])}")
    return steps[0] - began, time.perf_counter() - steps[-1]


def main() -> None:
    options = parser(__doc__, rounds=3).parse_args()
    record = Record("start", vars(options), path=options.json)
    print(record.heading(), flush=True)
    with tempfile.TemporaryDirectory(prefix="lape-start-", ignore_cleanup_errors=True) as place:
        given = commands(Path(place))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in given}
        for number in range(1 if options.smoke else options.rounds + 1):
            names = list(given) if number % 2 == 0 else list(reversed(given))
            for name in names:
                note(f"round {number}: {name}")
                times = timed(given[name], Path(place, "home"))
                if number or options.smoke:  # the first round compiles Python files and makes the database
                    found[name].append(times)
                time.sleep(0 if options.smoke else 15)  # for the pages, which another process makes
    rows: list[Row] = []
    for name, pairs in found.items():
        first, after = spread([pair[0] for pair in pairs]), spread([pair[1] for pair in pairs])
        rows.append({"name": name, "first": first, "after": after})
    add_ratios(rows, {"ray": "least", "in_process": "least"}, "first")
    record.add("start", rows)
    print(table("start and end of a command", COLUMNS, rows))


if __name__ == "__main__":
    run(main)
