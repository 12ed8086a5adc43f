"""Time a training step at each size of `data.image_size_schedule`, and say what the schedule saves over its last size.

    python benchmarks/image_sizes.py 128:0-200,224:200-300 --json image_sizes.json
    python benchmarks/image_sizes.py 128:0-200,224:200-300 --device cuda --recipe deit_small_lape --batch 256

The recipe's network and `optimizer_step`, on uint8 images that are on the device already; reading and augmenting them,
which smaller images make cheaper too, are left out. Operations are those of matrix products, as in `train_step.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from common import Candidate, Column, Record, Row, spread
from train_step import Stepper, check_device, synthetic_state, training_flops, wait

from lape_ray.config import DataConfig, ImageSize, TrainConfig, replace_fields
from lape_ray.model import build_model, resolve
from lape_ray.recipes import recipe

SMOKE = {"model.embed_dim": 32, "model.depth": 2, "model.num_heads": 2, "model.num_classes": 10}


@dataclass(frozen=True)
class Timed:
    """The network of one size, whose steps one process times."""

    config: TrainConfig
    device: str
    steps: int


def prepare(timed: Timed) -> Candidate:
    """Build what is timed; called in a separate process."""
    device = torch.device(timed.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    side = resolve(timed.config.model).image_size
    facts = {"side": side, "train_flops": training_flops(build_model(timed.config.model), side)}
    stepper = Stepper(synthetic_state(timed.config, device))

    def work(_: int) -> int:
        stepper.run(timed.steps)
        wait(device)
        return timed.steps * timed.config.data.batch_size

    return Candidate(work, facts)


def shares(phases: Sequence[ImageSize], rows: Sequence[Row], key: str) -> dict[str, Any]:
    """Divide what all epochs of the schedule take by what they would take at its last size, round by round.

    Args:
        rows: by phase, with the time of an image as the spread `key`, and with `train_flops`.
    """
    epochs, last = [phase.end - phase.first for phase in phases], rows[-1]
    rounds = [
        sum(count * ms for count, ms in zip(epochs, at, strict=True)) / (sum(epochs) * at[-1])
        for at in zip(*(row[key]["rounds"] for row in rows), strict=True)
    ]
    flops = sum(count * row["train_flops"] for count, row in zip(epochs, rows, strict=True))
    return {
        "name": "the whole schedule",
        "over": spread(rounds),
        "flops": flops / (sum(epochs) * last["train_flops"]),
    }


COLUMNS = (Column("", "name"), Column("GFLOPs/image", "train_flops", ".2f", 1e-9), Column("CPU ms/image", "cpu_ms"),
           Column("images/s", "images_per_second", ",.1f"), Column("time over the last size", "over", ".3f"),
           Column("FLOPs over", "flops", ".3f"))  # fmt: skip


def main() -> None:
    made = common.parser(__doc__, rounds=6)
    made.add_argument("schedule", help="such as 128:0-200,224:200-300")
    made.add_argument("--recipe", default="deit_tiny_lape", help="(default: %(default)s)")
    made.add_argument("--batch", type=int, default=8, help="images of a step (default: %(default)s)")
    made.add_argument("--steps", type=int, default=1, help="of a round (default: %(default)s)")
    options = made.parse_args()
    device = check_device(options.device)
    phases = DataConfig(image_size_schedule=options.schedule).image_sizes
    fields = {
        "data.batch_size": options.batch,
        "data.rand_augment": None,
        "data.erase_prob": 0.0,
        "data.repeats": 1,
    }
    base = replace_fields(recipe(options.recipe), fields | (SMOKE if options.smoke else {}))
    named = {f"{phase.side} px, epochs {phase.first} to {phase.end}": phase.side for phase in phases}
    named[f"{phases[-1].side} px again"] = phases[-1].side  # what a ratio is uncertain by
    runs = {
        name: (
            prepare,
            Timed(replace_fields(base, {"model.image_size": side}), options.device, options.steps),
        )
        for name, side in named.items()
    }
    record = Record("image_sizes", vars(options), path=options.json, device=options.device)
    rows = common.interleaved(runs, max(1, options.rounds), common.note)
    key = "cpu_ms" if device.type == "cpu" else "wall_ms"
    last = rows[len(phases) - 1]
    common.add_ratios(rows, {row["name"]: last["name"] for row in rows}, key)
    for row in rows:
        row["flops"] = row["train_flops"] / last["train_flops"]
    rows.append(shares(phases, rows[: len(phases)], key))
    record.add("image_sizes", rows)
    print(f"{record.heading()}; median (lowest to highest round)\n")
    print(common.table(f"{options.recipe}, batch {options.batch}", COLUMNS, rows))


if __name__ == "__main__":
    common.run(main)
