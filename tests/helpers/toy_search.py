"""A search whose trials are a formula, on the real Ray Tune: a driver to be killed and started again.

toy_search.py FOLDER SCHEDULE SAMPLE LANES KILL_AFTER RESULT: trains below FOLDER, kills itself as soon as it has heard
of so many epochs (0: never), and writes the records of its trials to the file RESULT at the end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from lape_ray.search.command import plan_of
from lape_ray.search.record import trial_folder
from lape_ray.search.settings import Settings
from lape_ray.search.trial import LapeTrial
from lape_ray.search.trials import opened
from lape_ray.search.tuner import run_tuner

TRAINED = "trained.jsonl"  # a line for each epoch that was ever trained: process, entry, lineage


class ToyTrial(LapeTrial):
    """A trial without workers, whose accuracy depends on its learning rates; it stores as the real one does."""

    def _start_workers(self) -> None:
        """There are none."""

    def _find(self) -> dict[str, Any]:
        trial = self._trial
        self._file = Path(trial_folder(self._settings.folder, trial.number), TRAINED)
        self._lineage = [[clone.epoch, clone.source] for clone in trial.lineage]
        stored: list[Any] = []
        for line in self._file.read_text().splitlines() if self._file.exists() else ():
            _, entry, lineage = json.loads(line)
            stored[entry["epoch"] - 1 :] = [(entry, lineage)]
        curve = []
        for entry, lineage in stored:
            if lineage != [clone for clone in self._lineage if clone[0] < entry["epoch"]]:
                break
            curve.append(entry)
        return {"curve": curve, "checkpoint": "", "loaded": []}

    def _train_epoch(self) -> None:
        trial = self._trial
        curve = self._found["curve"]
        before = curve[-1]["metrics"]["val/acc1"] if curve else 30 + trial.number % 7 / 10
        gained = 6 - 2 * abs(math.log10(trial.values["optim.lr"]) + 3)
        time.sleep(float(os.environ.get("TOY_EPOCH_S", "0.05")))
        entry = {"epoch": len(curve) + 1, "metrics": {"val/acc1": before + gained}, "seconds": 1.0}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:  # at once, for this process may be killed at any moment
            file.write(json.dumps((os.getpid(), entry, self._lineage)) + "\n")
        curve.append(entry)


class Kill:
    """A display that counts epochs, and ends the process as nothing else can."""

    draws = False

    def __init__(self, after: int) -> None:
        self.after, self.heard = after, 0

    def reported(self, trial: Any, trials: Any, decision: str) -> None:
        self.heard += 1
        if self.heard == self.after:
            os.kill(os.getpid(), signal.SIGKILL)

    def line(self, text: str) -> None:
        print(text, flush=True)

    def ended(self, trial: Any, trials: Any) -> None:
        pass

    def draw(self, trials: Any) -> None:
        pass


def toy_settings(folder: str, schedule: str, sample: str) -> Settings:
    trials = {"pbt": 6, "hyperband": None}.get(schedule, 9)
    plan = plan_of(
        space="free", recipe="demo", axes=["optim.lr=loguniform(1e-4,1e-2)"], schedule=schedule, sample=sample,
        trials=trials, grace=3 if schedule == "pbt" else 1, overrides={
            "optim.epochs": 9, "run.name": "toy", "run.num_workers": 1,
            "run.wait_s": float(os.environ.get("TOY_WAIT_S", "300")),
        },
    )  # fmt: skip
    return Settings(plan=plan, folder=folder, lease="", tracking_uri="", need={"CPU": 1}, variables={})


RUNS = SimpleNamespace(
    open_child=lambda trial, config: f"run-{trial.number}",
    reopen=lambda trial: None,
    settle=lambda trial: None,
)


def main(folder: str, schedule: str, sample: str, lanes: str, kill_after: str, result: str) -> None:
    ray.init(log_to_driver=False)
    settings, kill = toy_settings(folder, schedule, sample), Kill(int(kill_after))
    with opened(settings, int(lanes), kill, RUNS) as session:  # type: ignore[arg-type]
        run_tuner(session, ToyTrial)
    Path(result).write_text(json.dumps([dataclasses.asdict(trial) for trial in session.trials]))


if __name__ == "__main__":
    main(*sys.argv[1:])
