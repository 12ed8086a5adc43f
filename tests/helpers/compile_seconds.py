"""Train a run in this process, and print the CPU seconds of its first step, which compiles, as the last line.

compile_seconds.py HOME STOP_AFTER_EPOCHS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lape_ray.cluster.launch import fit
from lape_ray.config import replace_fields
from lape_ray.recipes import recipe
from lape_ray.training import loop


def main(home: Path, epochs: int) -> None:
    step, seconds = loop.optimizer_step, list[float]()

    def timed(*given: Any, **named: Any) -> Any:
        began = sum(os.times()[:4])  # of this process and those that it waited for, as compilers
        loss = step(*given, **named)
        seconds.append(sum(os.times()[:4]) - began)
        return loss

    loop.optimizer_step = timed
    fields: dict[str, object] = {f"data.{split}": str(home / f"{split}.beton") for split in ("train", "val")}
    fields |= {"run.name": "compiled", "run.num_workers": 0, "run.compile": "default"}
    fields |= {"run.stop_after_epochs": epochs, "optim.epochs": 3, "tracking.pages": False}
    fit(replace_fields(recipe("smoke"), fields))
    print(seconds[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
