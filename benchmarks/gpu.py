"""Measure on a GPU in one go, within nine minutes: comparisons first, then figures, the most valuable first.

    PYTHONPATH=. python benchmarks/gpu.py --json results/gpu.json

It needs torch, torchvision, timm, Triton and the compiled decoder; no Ray, FFCV or MLflow. Each part is a command in a
separate process. The record is written after each part, and the part's tables are printed then: what is cut off or
fails costs nothing that was measured before.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from common import ROOT, Record, Row, parser, run

MINUTES = 8.75
GRACE_S = 10  # for a part to end its processes when its time is over


class Part(NamedTuple):
    """A command of this folder, and about how many seconds it takes; after twice as many it is cut off.

    Where all parts have another time than `MINUTES`, that is more or less in proportion.
    """

    command: str
    expected_s: int


PARTS = {
    # Parity of all candidates, replayed steps beside plain ones; nothing is timed.
    "checks": Part("train_step.py --rounds 0 --models vit_lite:128 --candidates basic/eager,lape/eager,timm/eager,"
                   "torchvision/eager,plain/eager,basic/compiled,lape/compiled,lape/graph", 70),
    "deit_small": Part("train_step.py --models deit_small:256 --rounds 4 --candidates "
                       "lape/compiled,basic/compiled,again/compiled,timm/compiled", 95),
    "deit_tiny": Part("train_step.py --models deit_tiny:256 --rounds 4 --candidates "
                      "lape/compiled,lape/graph,basic/compiled,timm/compiled", 85),
    "data": Part("loader.py --parts augmentation,training --rounds 2", 85),
    "deit_base": Part("train_step.py --models deit_base:256 --rounds 2 --steps 25 --candidates "
                      "lape/compiled,basic/compiled,timm/compiled", 80),
    "eager": Part("train_step.py --models deit_small:256 --rounds 2 --candidates "
                  "lape/eager,basic/eager,timm/eager,torchvision/eager,plain/eager", 45),
    "batches": Part("train_step.py --models deit_small:512,vit_lite:128 --rounds 2 --candidates "
                    "lape/compiled,lape/graph", 65),
}  # fmt: skip


def run_part(name: str, part: Part, words: list[str], timeout_s: float) -> Row:
    """Run a part; return how it ended, and its sections as far as it wrote them."""
    with tempfile.TemporaryDirectory(prefix="lape_ray-gpu-") as folder:
        path = Path(folder) / "record.json"
        script, *arguments = shlex.split(part.command)
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, *words, "--json", str(path)]
        started = time.monotonic()
        process = subprocess.Popen(command)
        try:
            code: int | None = process.wait(timeout=timeout_s)
            outcome = "done" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"cut off after {timeout_s:.0f} s"
        finally:
            _end(process)
        sections = json.loads(path.read_text())["sections"] if path.exists() else {}
    return {"name": name, "command": part.command, "outcome": outcome, "seconds": time.monotonic() - started,
            "sections": sections}  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part that still runs; by SIGTERM it takes its processes and temporary files with it."""
    process.terminate()
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_parts(names: list[str], words: list[str], minutes: float, record: Record) -> bool:
    """Run parts within a time, of which the first have most; return whether all were done.

    Args:
        words: options of all parts.
    """
    end = time.monotonic() + 60 * minutes
    for name in names:
        timeout_s = min(2 * PARTS[name].expected_s * minutes / MINUTES, end - time.monotonic() - GRACE_S)
        print(f"\n== {name}, at most {timeout_s:.0f} s", flush=True)
        if timeout_s > 0:
            row = run_part(name, PARTS[name], words, timeout_s)
        else:
            row = {"name": name, "command": PARTS[name].command, "outcome": "not begun: the time was over"}
        record.add("parts", [row])
    for row in record.sections["parts"]:
        print(f"{row['name']}: {row['outcome']}" + (f", {row['seconds']:.0f} s" if "seconds" in row else ""))
    return all(row["outcome"] == "done" for row in record.sections["parts"])


def main() -> int:
    made = parser(__doc__, rounds=0)
    made.set_defaults(device="cuda")
    made.add_argument("--only", default=",".join(PARTS), help="parts in their order (default: %(default)s)")
    made.add_argument("--minutes", type=float, default=MINUTES, help="for all of it (default: %(default)s)")
    options = made.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise ValueError(f"--only {unknown[0]} is not known; choose from {', '.join(PARTS)}")
    words = ["--device", options.device, *(["--smoke"] if options.smoke else [])]
    record = Record("gpu", vars(options), path=options.json, device=options.device)
    print(record.heading(), flush=True)
    return 0 if run_parts(names, words, options.minutes, record) else 1


if __name__ == "__main__":
    run(main)
