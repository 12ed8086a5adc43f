"""Train recipes with several seeds on a machine without Ray, and say what their accuracies come to.

    python benchmarks/seeds.py cifar10 --device cuda --at-once 2 --json seeds.json
    python benchmarks/seeds.py cifar10 --device cuda --recipes vit_lite_fast --holdout 5000 --json fast.json

Each training is a separate process, and is written down when it ends: a record that was cut off is completed by the
same command. With --holdout, for any choice, training images are evaluated that are not trained on; the test set is
for the end. On a cluster the same comparison is a search: `tune_position.py paper_table2`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import Column, Record, Row, note, run, table

from lape_ray import storage
from lape_ray.cli import ConfigParser, at_least_one
from lape_ray.config import TrainConfig, config_hash, replace_fields
from lape_ray.data.beton import check_beton, write_beton
from lape_ray.data.sources import open_source, select
from lape_ray.recipes import recipe
from lape_ray.report.statistics import LEVEL, Estimate
from lape_ray.training.checkpoint import Snapshot
from lape_ray.training.flags import Flags
from lape_ray.training.loop import train

FIRST_SEED = 121  # of the five that the paper's tables of CIFAR are means of
FREE = ("at_once", "threads", "seeds", "recipes", "json")  # may change when a record is completed


def configs(options: argparse.Namespace, folder: Path) -> list[TrainConfig]:
    """Return every training, seed by seed, so that a record which is cut off holds whole pairs; data in `folder`."""
    data = {f"data.{split}": str(folder / f"{split}.beton") for split in ("train", "val")}
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        for name in options.recipes.split(","):
            fields = {**data, "training.seed": seed, "data.backend": "resident", **options.overrides}
            config = replace_fields(recipe(name), fields)
            if options.device == "cuda" and config.micro_batches == 1:
                config = replace_fields(config, {"run.cuda_graph": True, **options.overrides})
            found.append(shortened(config, options.epochs) if options.epochs else config)
    return found


def shortened(config: TrainConfig, epochs: int) -> TrainConfig:
    """Return `config` with a schedule of `epochs`, of which warm-up, cool-down and mixing keep their shares."""
    optim, share = config.optim, epochs / config.optim.epochs
    off = config.data.mix_off_epoch
    return replace_fields(
        config,
        {
            "optim.epochs": epochs,
            "optim.warmup_epochs": optim.warmup_epochs * share,
            "optim.cooldown_epochs": round(optim.cooldown_epochs * share),
            "data.mix_off_epoch": None if off is None else round(off * share),
        },
    )


def write_splits(options: argparse.Namespace) -> Path:
    """Write the two splits where they are missing; return their folder."""
    held, per_class = options.holdout, options.per_class
    kind = (f"holdout{held}" if held else options.test) + (f"-first{per_class}" if per_class else "")
    folder: Path = storage.home() / "seeds" / f"{Path(options.source).name}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = [f"rest:{held}"] * bool(held) + [f"per-class:{per_class}"] * bool(per_class)
    subsets: dict[str, tuple[str, str | None]] = {
        "train": ("train", ",".join(kept) or None),
        "val": ("train", f"holdout:{held}") if held else (options.test, None),
    }
    for split, (of, subset) in subsets.items():
        path = folder / f"{split}.beton"
        if path.exists():
            check_beton(str(path))
            continue
        note(f"writing {path}")
        write_beton(select(open_source(options.source, of), subset), path)
    return folder


class Recorder:
    """A reporter that keeps the losses of log steps and the metrics of epochs, and nothing else."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.epochs: list[dict[str, float]] = []

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        self.losses.append(metrics["train/loss"])

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        self.epochs.append(dict(metrics))

    def checkpoint(
        self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]
    ) -> None: ...

    def checkpoint_stored(self) -> None: ...

    def wait_until_saved(self) -> None: ...

    def node_leaving(self) -> bool:
        return False

    def poll_flags(self) -> Flags:
        return Flags.NONE

    def line(self, text: str) -> None: ...


def train_one(config: TrainConfig, device: str, threads: int) -> Row:
    """Train once; `seconds` are those of the loop, its start and evaluations included."""
    torch.set_num_threads(threads)
    recorder = Recorder()
    clock = time.perf_counter()
    metrics = train(config, device=torch.device(device), reporter=recorder)
    evaluated = [epoch["val/acc1"] for epoch in recorder.epochs if "val/acc1" in epoch]
    return {
        "recipe": config.recipe,
        "seed": config.training.seed,
        "config": config_hash(config),
        "epochs": config.optim.total_epochs,
        "acc1": metrics["val/acc1"],
        "best_acc1": max(evaluated),
        "loss": metrics["val/loss"],
        "train_loss": metrics["train/epoch_loss"],
        "acc1_by_epoch": evaluated,
        "images_per_s": metrics["train/images_per_s"],
        "seconds": time.perf_counter() - clock,
    }


def earlier_rows(path: Path | None, settings: Mapping[str, Any]) -> list[Row]:
    """Return the trainings that the record at `path` holds already; a ValueError if it is one of other settings."""
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    old, new = (
        {key: value for key, value in s.items() if key not in FREE} for s in (earlier["settings"], settings)
    )
    if changed := sorted(key for key in old | new if old.get(key) != new.get(key)):
        raise ValueError(
            f"{path} holds trainings with another {', '.join(changed)}; write to another --json, or delete it"
        )
    return list(earlier["sections"]["runs"])


def train_all(options: argparse.Namespace, record: Record) -> None:
    """Train everything that the record does not hold yet."""
    rows = record.sections["runs"]
    done = {(row["recipe"], row["seed"]) for row in rows}
    wanted = configs(options, write_splits(options))
    left = [config for config in wanted if (config.recipe, config.training.seed) not in done]
    # One process for each training, so that threads, caches and compiled code are not shared.
    pool = ProcessPoolExecutor(options.at_once, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with pool:
        started = [pool.submit(train_one, config, options.device, options.threads) for config in left]
        try:
            for future in as_completed(started):
                row = future.result()
                record.add("runs", [row])
                note(
                    f"{len(rows)} of {len(wanted)}: {row['recipe']} seed {row['seed']}: {row['acc1']:.2f} after "
                    f"{row['seconds']:.0f} s"
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


COLUMNS = (Column("recipe", "recipe"), Column("n", "n", ".0f"), Column("top-1", "mean"), Column("sd", "sd"),
           Column("over basic", "gain", "+.2f"), Column(f"{LEVEL:.0%} interval", "interval"),
           Column("s a run", "seconds", ",.0f"))  # fmt: skip


def summary(rows: list[Row]) -> list[Row]:
    """Return a row for each recipe: means over its seeds, and the difference to `basic` over the seeds of both."""
    runs: dict[str, dict[int, Row]] = {}
    for row in rows:
        runs.setdefault(row["recipe"], {})[row["seed"]] = row
    found = []
    for name, by_seed in runs.items():
        ours = Estimate.of([row["acc1"] for row in by_seed.values()])
        seconds = sum(row["seconds"] for row in by_seed.values()) / len(by_seed)
        one: Row = {"recipe": name, "n": ours.n, "mean": ours.mean, "sd": ours.sd, "seconds": seconds}
        basic = runs.get(name.replace("_lape", "_basic"), {}) if "_lape" in name else {}
        pairs = [row["acc1"] - basic[seed]["acc1"] for seed, row in by_seed.items() if seed in basic]
        if pairs:
            gain = Estimate.of(pairs)
            one["gain"] = gain.mean
            one["interval"] = None if gain.interval is None else "{:+.2f} to {:+.2f}".format(*gain.interval)
        found.append(one)
    return found


def report(record: Record) -> str:
    """Return the record as a table for people."""
    settings, rows = record.content["settings"], record.sections["runs"]
    held = settings["holdout"]
    of = f"{held} training images that were held out" if held else f"the split {settings['test']}"
    epochs = ", ".join(str(epochs) for epochs in sorted({row["epochs"] for row in rows}))
    return f"{record.heading()}\n\n" + table(
        f"Top-1 on {of} after the last of {epochs} epochs, in percent", COLUMNS, summary(rows)
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line; fields of the config that it sets are `overrides` then."""
    usage = "%(prog)s SOURCE [options] [--section.field VALUE ...]"
    made = ConfigParser(usage=usage, description=__doc__)
    fields = {action.dest for action in made._actions}
    add = made.add_argument
    add("source", help="images with a split train: a folder of class folders, or of parquet or tar shards")
    add("--test", default="test", metavar="SPLIT", help="its split that is evaluated (default: %(default)s)")
    add("--recipes", default="vit_lite_7_4_basic,vit_lite_7_4_lape", help="names (default: %(default)s)")
    for name, default, what in (
        ("--seeds", 5, "of each recipe, from 121 on"),
        ("--epochs", None, "of the schedule, shortened in proportion; none: the recipe's"),
        ("--holdout", None, "training images to evaluate, in place of the test set"),
        ("--per-class", None, "training images of each class; none: all"),
        ("--at-once", 1, "trainings that share the device"),
        ("--threads", 1, "of a CPU's arithmetic, in each process"),
    ):
        add(name, type=at_least_one, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    add("--json", type=Path, metavar="FILE", help="the record; one that was cut off is completed")
    options = made.parse_args(argv)
    options.overrides = {name: value for name, value in vars(options).items() if name in fields}
    for name in options.overrides:
        delattr(options, name)
    for name in options.recipes.split(","):
        recipe(name)  # refuses what is not known
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    record = Record("seeds", vars(options), path=options.json, device=options.device)
    record.sections["runs"] = earlier_rows(options.json, record.content["settings"])
    train_all(options, record)
    print(report(record))


if __name__ == "__main__":
    run(main)
