"""`jobs/benchmark.py gpu`: everything that wants a GPU, one after the other, within a time. Standard library only."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lape_ray.bench.record import ROOT

PARTS = ("compare", "step", "checkpoint", "loader")  # what matters most comes first
SHARE = {"compare": 0.6, "step": 0.7, "checkpoint": 0.5, "loader": 1.0}  # of what is left
GRACE_S = 60  # for a part to end what it has begun when its minutes are over
CUT_OFF = 143


@dataclass(frozen=True)
class Outcome:
    """How a part ended: its exit code, None where it was not begun, and seconds."""

    part: str
    code: int | None
    seconds: float

    @property
    def text(self) -> str:
        if self.code is None:
            return f"{self.part}: not begun, the time was over"
        how = (
            "done"
            if self.code == 0
            else "cut off"
            if self.code == CUT_OFF
            else f"failed with code {self.code}"
        )
        return f"{self.part}: {how} after {self.seconds:.0f} s"


def run(
    folder: Path, *, parts: Sequence[str], minutes: float, device: str, options: Sequence[str]
) -> list[Outcome]:
    """Run `parts` in processes of their own; each writes `folder`/PART.json and PART.txt as far as it comes.

    A part that fails or takes too long does not keep the next from running.

    Args:
        options: passed on to every part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    outcomes = []
    for part in parts:
        left = end - time.monotonic()
        if left < GRACE_S / 2:
            outcomes.append(Outcome(part, None, 0.0))
            continue
        share = left if part == parts[-1] else left * SHARE[part]
        command = [sys.executable, str(ROOT / "jobs" / "benchmark.py"), part, "--device", device]
        command += ["--json", str(folder / f"{part}.json"), *options]
        if part in ("step", "compare"):
            command += ["--minutes", f"{max(share - GRACE_S, share / 2) / 60:.2f}"]
        print(f"== {part}, at most {share:.0f} s", flush=True)
        started = time.monotonic()
        with (folder / f"{part}.txt").open("w") as out:
            process = subprocess.Popen(command, stdout=out)
            try:
                code = process.wait(timeout=share)
            except subprocess.TimeoutExpired:
                process.terminate()  # it takes its temporary files and processes with it
                try:
                    process.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                code = CUT_OFF
        print((folder / f"{part}.txt").read_text(), flush=True)
        outcomes.append(Outcome(part, code, time.monotonic() - started))
    return outcomes


def run_all(folder: Path, only: str, minutes: float, device: str, *, quick: bool) -> int:
    """`run`, its outcomes printed; returns 0 if every part was done.

    Raises:
        ValueError: `only` names a part that there is not.
    """
    parts = tuple(only.split(",")) if only else PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--only {unknown[0]} is not known; choose from {', '.join(PARTS)}")
    options = ["--quick"] if quick else []
    outcomes = run(folder, parts=parts, minutes=minutes, device=device, options=options)
    print("\n".join(outcome.text for outcome in outcomes))
    return 0 if all(outcome.code == 0 for outcome in outcomes) else 1
