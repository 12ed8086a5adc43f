"""`jobs/benchmark.py seeds`: whole trainings of recipes with several seeds, and what they come to. Knows no Ray.

Several trainings share a GPU, or the CPUs, as processes of their own. Each is written down when it ends, so that a
record which was cut off is completed by the same command. On a cluster the same comparison is the search
`paper_table2`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lape_ray import storage
from lape_ray.bench.record import begin, finish
from lape_ray.config import TrainConfig, config_hash, replace_fields
from lape_ray.data.beton import check_beton, write_beton
from lape_ray.data.sources import open_source, select
from lape_ray.recipes import RECIPES, recipe
from lape_ray.signals import News
from lape_ray.train import Take, train

FIRST_SEED = 121  # of the five that the paper's tables of CIFAR are means of
PAPER = {
    "vit_lite_7_4_basic": 93.448,
    "vit_lite_7_4_lape": 94.290,
    "cvt_7_4_basic": 94.302,
    "cvt_7_4_lape": 94.690,
    "cct_7_3x1_basic": 96.034,
    "cct_7_3x1_lape": 96.530,
}
"""Top-1 on CIFAR-10 in percent, means of five seeds: LaPE (ICCV 2023), table 2."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        source: images, as `open_source` takes them
        splits: its names of the training images and of those that are evaluated where none are held out
        recipes: names; each is trained with every seed
        seeds: how many, from `FIRST_SEED` on
        epochs: of the schedule, whose parts all shrink in proportion; None: the recipe's own
        holdout: training images that are evaluated in place of the test set, and not trained on; for every choice
            that is made; None: the test set
        per_class: training images of each class, the first ones; None: all of them
        at_once: trainings that share the device
        threads: of each training's arithmetic on a CPU
        overrides: fields of the config that are set for every training
    """

    source: str
    splits: tuple[str, str] = ("train", "test")
    recipes: tuple[str, ...] = ("vit_lite_7_4_basic", "vit_lite_7_4_lape")
    seeds: int = 5
    epochs: int | None = None
    holdout: int | None = None
    per_class: int | None = None
    at_once: int = 1
    device: str = "cpu"
    threads: int = 1
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.recipes if name not in RECIPES]:
            raise ValueError(f"--recipes {unknown[0]!r} is not known; known are {', '.join(RECIPES)}")
        for name in ("seeds", "epochs", "holdout", "per_class", "at_once", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")

    def configs(self, folder: Path) -> list[TrainConfig]:
        """Every training, seed by seed, so that a record which is cut off holds whole pairs; data in `folder`."""
        names = {split: str(folder / f"{split}.beton") for split in ("train", "val")}
        found = []
        for seed in range(FIRST_SEED, FIRST_SEED + self.seeds):
            for name in self.recipes:
                fields = {f"data.{split}": path for split, path in names.items()}
                changes = {"run.seed": seed, "data.backend": "resident"}
                config = replace_fields(recipe(name), {**fields, **changes, **self.overrides})
                if self.device.startswith("cuda") and config.micro_batches == 1:
                    config = replace_fields(config, {"run.cuda_graph": True, **self.overrides})
                found.append(shortened(config, self.epochs) if self.epochs else config)
        return found


def shortened(config: TrainConfig, epochs: int) -> TrainConfig:
    """`config` with a schedule of `epochs`, in which warm-up, cool-down and the end of mixing keep their shares."""
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


def run(
    settings: Settings,
    note: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train everything that `earlier`, a record of the same settings, does not hold yet.

    Args:
        note: is told what happens.
        keep: is given the record each time that a training has ended.

    Raises:
        ValueError: `earlier` is a record of other settings.
    """
    record = begin("seeds", dataclasses.asdict(settings), device=settings.device)
    rows: list[dict[str, Any]] = record["sections"].setdefault("runs", [])
    if earlier is not None:
        rows += _rows_of(earlier, record["settings"])
    folder = _data(settings, note)
    done = {(row["recipe"], row["seed"]) for row in rows}
    left = [config for config in settings.configs(folder) if (config.recipe, config.run.seed) not in done]
    # A process for each: what a training leaves in its process (threads, caches, compiled code) is no other's matter.
    pool = ProcessPoolExecutor(settings.at_once, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with pool:
        started = [pool.submit(train_one, config, settings.device, settings.threads) for config in left]
        try:
            for future in as_completed(started):
                row = future.result()
                rows.append(row)
                note(
                    f"{len(rows)} of {len(settings.recipes) * settings.seeds}: {row['recipe']} seed {row['seed']}: "
                    f"{row['acc1']:.2f} after {row['seconds']:.0f} s"
                )
                finish(record)
                keep(record)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    finish(record)
    return record


def _rows_of(earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    free = ("at_once", "threads", "seeds", "recipes")  # these may change when more is added
    old, new = (
        {k: v for k, v in json.loads(json.dumps(s)).items() if k not in free}
        for s in (earlier["settings"], settings)
    )
    if changed := sorted(key for key in new if old.get(key) != new[key]):
        raise ValueError(
            f"the record holds trainings with another {', '.join(changed)}; write to another --json, or delete it"
        )
    return list(earlier["sections"]["runs"])


def _data(settings: Settings, note: Callable[[str], None]) -> Path:
    """The folder that holds the two splits; they are written where they are not there yet."""
    kind = f"holdout{settings.holdout}" if settings.holdout else "test"
    kind += f"-first{settings.per_class}" if settings.per_class else ""
    folder = storage.home() / "seeds" / f"{Path(settings.source).name}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    training, test = settings.splits
    subsets: dict[str, tuple[str, str | None]] = {"train": (training, None), "val": (test, None)}
    if settings.holdout:
        subsets["val"] = (training, f"holdout:{settings.holdout}")
    kept = [f"rest:{settings.holdout}"] if settings.holdout else []
    kept += [f"per-class:{settings.per_class}"] if settings.per_class else []
    subsets["train"] = (training, ",".join(kept) or None)
    for split, (of, subset) in subsets.items():
        path = folder / f"{split}.beton"
        if path.exists():
            check_beton(str(path))
            continue
        note(f"writing {path}")
        write_beton(select(open_source(settings.source, of), subset), path)
    return folder


class Recorder:
    """A reporter that keeps the losses of log steps and the metrics of epochs, and nothing else."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.epochs: list[dict[str, float]] = []

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        self.losses.append(metrics["train/loss"])

    def epoch(self, metrics: dict[str, float], *, step: int, take: Take) -> None:
        self.epochs.append(dict(metrics))

    def checkpoint(self, metrics: dict[str, float], *, step: int, take: Take) -> None: ...

    def stored(self) -> None: ...

    def leaving(self) -> bool:
        return False

    def news(self) -> News:
        return News.NONE

    def line(self, text: str) -> None: ...


def train_one(config: TrainConfig, device: str, threads: int) -> dict[str, Any]:
    """One training, and what became of it; `seconds` are those of the loop, its start and evaluations included."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    recorder = Recorder()
    clock = time.perf_counter()
    metrics = train(config, device=where, reporter=recorder)
    seconds = time.perf_counter() - clock
    evaluated = [epoch["val/acc1"] for epoch in recorder.epochs if "val/acc1" in epoch]
    return {
        "recipe": config.recipe,
        "seed": config.run.seed,
        "config": config_hash(config),
        "epochs": config.optim.total_epochs,
        "acc1": metrics["val/acc1"],
        "best_acc1": max(evaluated),
        "loss": metrics["val/loss"],
        "train_loss": metrics["train/epoch_loss"],
        "acc1_by_epoch": evaluated,
        "images_per_s": metrics["train/images_per_s"],
        "seconds": seconds,
    }
