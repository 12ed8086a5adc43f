"""Print what a training costs on 8, 64 and 512 GPUs, from figures that were measured on fewer.

    python benchmarks/scaling.py                                # the tables of docs/operations.md
    python benchmarks/scaling.py --record gpu.json --batch 256  # with a rate that gpu.py measured
    python benchmarks/scaling.py --check --json scaling.json    # formulas beside trainings of 2, 4 and 8 workers here

`--check` needs root, `ip` and `tc`: it limits the bandwidth between network namespaces.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from common import Column, Record, Row
from scaling_model import (
    all_reduce_s,
    best_interval_s,
    buckets,
    exposed_s,
    failure_share,
    latency_s,
    step_s,
    stored_every_s,
)

RESULTS = Path(__file__).parent / "results"
RECORDS = [RESULTS / "checkpoint_2026-11-23_cpu.json", RESULTS / "loader_2026-11-23_cpu.json"]
GPUS = (8, 64, 512)
RECIPE_BATCH = 1024
PART_BYTES = 16 * 2**20  # of a transfer to or from S3
MONTHLY_USD_PER_BYTE, USD_PER_GET, USD_PER_PUT = 0.023e-9, 0.4e-6, 5e-6


SCALES = {"GB": 1e9, "MB": 1e6, "GB/s": 1e9}


def figure(default: float, meaning: str, unit: str = "", digits: int = 0) -> Any:
    """Make a field whose value stands in the table in `unit`, with so many digits after the point."""
    return field(default=default, metadata={"meaning": meaning, "unit": unit, "digits": digits})


@dataclass(frozen=True)
class Figures:
    """The figures of a training and its machines; each is an option. Those of records have no default."""

    train_images: float = figure(1_281_167, "training images: ImageNet-1K")
    val_images: float = figure(
        50_000, "validation images; the weights and their average see them after each epoch"
    )
    epochs: float = figure(300, "epochs")
    data_bytes: float = figure(60e9, "data, stored at 500 px", "GB")
    gradient_bytes: float = figure(4 * 22_059_880, "gradients of DeiT-S with LaPE, float32", "MB", 1)
    checkpoint_bytes: float = figure(
        16 * 22_059_880, "a checkpoint: weights, average, Adam's two moments", "MB"
    )
    images_per_s: float = figure(
        3638, "a GPU's rate: ViT-5-S of NVIDIA's nvSubquadratic on 8 H100, end to end; not ours", "images/s"
    )
    batch: float = figure(128, "images of a GPU's step")
    backward_share: float = figure(2 / 3, "share of the backward pass in a step, by its operations", digits=2)
    gpus_per_node: float = figure(8, "GPUs of a node")
    gpu_bytes_per_s: float = figure(300e9, "an all-reduce within a node; assumed", "GB/s")
    rdma_bytes_per_s: float = figure(50e9, "between nodes with RDMA, 400 Gbit/s", "GB/s")
    tcp_bytes_per_s: float = figure(10e9, "between nodes without; assumed", "GB/s")
    cpus_per_gpu: float = figure(12, "CPU cores for a GPU's loader; assumed")
    loader_images_per_s: float = figure(
        math.nan, "decoded, cropped and resized by a core; loader's record", "images/s"
    )
    copy_bytes_per_s: float = figure(
        math.nan, "a checkpoint's copy; record `checkpoint`, on a CPU", "GB/s", 2
    )
    write_bytes_per_s: float = figure(math.nan, "its writing and hashing; the same", "GB/s", 2)
    s3_node_bytes_per_s: float = figure(2e9, "between S3 and a node; assumed", "GB/s")
    s3_bytes_per_s: float = figure(12.5e9, "S3 to a whole cluster, 100 Gbit/s; assumed", "GB/s", 1)
    checkpoint_minutes: float = figure(15, "between checkpoints within a longer epoch", "min")
    mtbf_hours: float = figure(8090, "a GPU's time between failures: Meta, 7.9 h on 1,024 GPUs", "h")
    restart_s: float = figure(75.4, "a restart after a lost node, without compilation; results", "s", 1)
    gpu_hour_usd: float = figure(3, "a GPU hour; assumed", "$", 2)


# ---- measured figures


def read_figures(records: Sequence[Path]) -> dict[str, float]:
    """Return the figures that benchmarks' records hold, of which the last wins.

    Raises:
        ValueError: a record has none.
    """
    found: dict[str, float] = {}
    for path in records:
        content = json.loads(path.read_text())
        reader = READERS.get(content["benchmark"])
        values = reader(content["sections"]) if reader else {}
        if not values:
            raise ValueError(f"--record {path}: it has no figure; give one of {', '.join(READERS)}")
        found |= values
    return found


def _checkpoint(sections: dict[str, list[Row]]) -> dict[str, float]:
    (row,) = sections["checkpoint"]
    copy_s, save_s = row["copy_s"]["median"], row["save_s"]["median"]
    return {"copy_bytes_per_s": row["bytes"] / copy_s, "write_bytes_per_s": row["bytes"] / save_s}


def _loader(sections: dict[str, list[Row]]) -> dict[str, float]:
    rows = sections.get("loaders") or sections.get("loader") or []  # before schema 2: loader, lape_ray
    for row in rows:
        if row["name"] in ("ours", "lape_ray") and "cpu_ms" in row:
            return {"loader_images_per_s": 1e3 / row["cpu_ms"]["median"]}
    return {}


def _gpu(sections: dict[str, list[Row]]) -> dict[str, float]:
    for row in sections["parts"]:
        if values := _train_step(row.get("sections", {})):
            return values
    return {}


def _train_step(sections: dict[str, list[Row]]) -> dict[str, float]:
    for row in sections.get("train_step", []):
        if (row["model"], row["name"]) == ("deit_small", "lape/compiled") and "images_per_second" in row:
            return {"images_per_s": row["images_per_second"]["median"]}
    return {}


READERS: dict[str, Callable[[dict[str, list[Row]]], dict[str, float]]] = {
    "checkpoint": _checkpoint,
    "loader": _loader,
    "gpu": _gpu,
    "train_step": _train_step,
}


# ---- what they predict


@dataclass(frozen=True)
class Step:
    """The times of an optimizer step, in seconds."""

    compute_s: float
    all_reduce_s: float
    exposed_s: float
    step_s: float

    @property
    def share(self) -> float:
        """The share of the step in which GPUs compute."""
        return self.compute_s / self.step_s


def predict_step(figures: Figures, gpus: int, *, batch: float, node_bytes_per_s: float) -> Step:
    """Predict a step of `batch` images a GPU; between nodes gradients go at `node_bytes_per_s`."""
    nodes = math.ceil(gpus / figures.gpus_per_node)
    in_node = min(gpus, round(figures.gpus_per_node))
    compute_s = batch / figures.images_per_s
    link_bytes_per_s = node_bytes_per_s if nodes > 1 else figures.gpu_bytes_per_s
    sizes, hops_s = buckets(figures.gradient_bytes), latency_s(nodes, in_node)
    transfers = [all_reduce_s(size, gpus, bytes_per_s=link_bytes_per_s, latency_s=hops_s) for size in sizes]
    exposed = exposed_s(sizes, transfers, backward_s=figures.backward_share * compute_s)
    data_s = batch / (figures.cpus_per_gpu * figures.loader_images_per_s)
    return Step(compute_s, sum(transfers), exposed, step_s(compute_s, exposed, data_s))


@dataclass(frozen=True)
class Prediction:
    """The prediction for a training on so many GPUs, with RDMA between nodes."""

    figures: Figures
    gpus: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.figures.gpus_per_node)

    def step(self, *, rdma: bool = True, batch: float | None = None) -> Step:
        figures = self.figures
        speed = figures.rdma_bytes_per_s if rdma else figures.tcp_bytes_per_s
        return predict_step(figures, self.gpus, batch=batch or figures.batch, node_bytes_per_s=speed)

    @property
    def images_per_s(self) -> float:
        """The rate of GPUs that never wait."""
        return self.gpus * self.figures.images_per_s

    @property
    def training_s(self) -> float:
        """The time of an epoch's steps."""
        return self.figures.train_images / self.images_per_s / self.step().share

    @property
    def validation_s(self) -> float:
        """The time of an epoch's two validations; a forward pass is a third of a step's operations."""
        return 2 * self.figures.val_images / (3 * self.images_per_s)

    @property
    def stall_s(self) -> float:
        """Tell how long an epoch's checkpoint stops the training: for its copy, which a GPU hides for the most part."""
        return self.figures.checkpoint_bytes / self.figures.copy_bytes_per_s

    @property
    def stored_every_s(self) -> float:
        """The time between two checkpoints that are stored."""
        figures, size = self.figures, self.figures.checkpoint_bytes
        store_s = size / figures.write_bytes_per_s + size / figures.s3_node_bytes_per_s
        return stored_every_s(store_s, self.epoch_s)

    @property
    def checkpoints(self) -> float:
        """The number of checkpoints that are stored."""
        return self.figures.epochs * self.epoch_s / self.stored_every_s

    @property
    def staging_s(self) -> float:
        """The time in which each node gets the data, by its own limit or the cluster's."""
        figures = self.figures
        one = figures.data_bytes / figures.s3_node_bytes_per_s
        return max(one, self.nodes * figures.data_bytes / figures.s3_bytes_per_s)

    @property
    def epoch_s(self) -> float:
        return self.training_s + self.validation_s + self.stall_s

    @property
    def mtbf_s(self) -> float:
        return 3600 * self.figures.mtbf_hours / self.gpus

    @property
    def failure_share(self) -> float:
        interval_s = min(self.stored_every_s, 60 * self.figures.checkpoint_minutes)
        return failure_share(self.mtbf_s, self.figures.restart_s, interval_s)

    @property
    def whole_s(self) -> float:
        """The time of all: staging, epochs and failures; not the start of Ray and the first step's compilation."""
        return (self.staging_s + self.figures.epochs * self.epoch_s) * (1 + self.failure_share)

    @property
    def goodput(self) -> float:
        """The share of the whole time that goes into steps which count."""
        return self.figures.epochs * self.training_s / self.whole_s

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.whole_s / 3600

    @property
    def requests(self) -> tuple[float, float]:
        """The requests to S3 that get data and that put checkpoints."""
        figures = self.figures
        parts = math.ceil(figures.checkpoint_bytes / PART_BYTES) + 3  # begin, end, meta.json
        return self.nodes * figures.data_bytes / PART_BYTES, self.checkpoints * parts

    @property
    def s3_usd(self) -> float:
        """The price of the requests, and of data and two checkpoints for a month."""
        figures, (gets, puts) = self.figures, self.requests
        stored_bytes = figures.data_bytes + 2 * figures.checkpoint_bytes
        return gets * USD_PER_GET + puts * USD_PER_PUT + stored_bytes * MONTHLY_USD_PER_BYTE


def seconds(value: float) -> str:
    """Return a time for people, with two digits and its unit."""
    units = ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (math.inf, 3600, "h"))
    size, unit = next((size, unit) for limit, size, unit in units if value < limit)
    number = value / size
    return f"{number:.{1 if 0 < number < 9.95 else 0}f} {unit}"


def gigabytes(size: float) -> str:
    return f"{size / 1e12:.1f} TB" if size >= 1e12 else f"{size / 1e9:.0f} GB"


def rows(figures: Figures) -> dict[str, Callable[[Prediction], str]]:
    """Return the rows of the table, by their headings."""

    def both(
        value: Callable[[Step], str], batch: Callable[[int], float | None]
    ) -> Callable[[Prediction], str]:
        def cell(at: Prediction) -> str:
            found = [value(at.step(rdma=rdma, batch=batch(at.gpus))) for rdma in (True, False)]
            return found[0] if at.nodes == 1 else " / ".join(found)

        return cell

    def own(gpus: int) -> float | None:
        return None

    speeds = f"{figures.rdma_bytes_per_s / 1e9:.0f} / {figures.tcp_bytes_per_s / 1e9:.0f} GB/s"
    return {
        "nodes": lambda at: f"{at.nodes}",
        "images/s if perfect": lambda at: f"{at.images_per_s:,.0f}",
        "computing a step": lambda at: seconds(at.step().compute_s),
        f"its all-reduce at {speeds}": both(lambda step: seconds(step.all_reduce_s), own),
        "of that after the backward pass": both(lambda step: seconds(step.exposed_s), own),
        "share of perfect": both(lambda step: f"{step.share * 100:.0f} %", own),
        f"the same, batch {RECIPE_BATCH:,} in all": both(
            lambda step: f"{step.share * 100:.0f} %", lambda gpus: RECIPE_BATCH / gpus
        ),
        "steps of an epoch": lambda at: seconds(at.training_s),
        "its validation, weights and average": lambda at: seconds(at.validation_s),
        "its checkpoint stops training for": lambda at: seconds(at.stall_s),
        "checkpoints' share": lambda at: f"{100 * at.stall_s / at.epoch_s:.1f} %",
        "a checkpoint is stored every": lambda at: seconds(at.stored_every_s),
        "best interval of checkpoints (Young)": lambda at: seconds(best_interval_s(at.stall_s, at.mtbf_s)),
        "time between failures": lambda at: seconds(at.mtbf_s),
        "lost to failures": lambda at: f"{100 * at.failure_share:.2f} %",
        "staging, once": lambda at: seconds(at.staging_s),
        f"{figures.epochs:.0f} epochs, with all that": lambda at: seconds(at.whole_s),
        "goodput: the steps' share of that": lambda at: f"{at.goodput * 100:.0f} %",
        "data from S3": lambda at: gigabytes(at.nodes * figures.data_bytes),
        "checkpoints to S3": lambda at: gigabytes(at.checkpoints * figures.checkpoint_bytes),
        "S3 requests (parts of 16 MiB)": lambda at: f"{sum(at.requests):,.0f}",
        "S3: requests, and a month": lambda at: f"{at.s3_usd:.2f} $",
        "GPU hours": lambda at: f"{at.gpu_hours:,.0f}",
        "their cost": lambda at: f"{figures.gpu_hour_usd * at.gpu_hours:,.0f} $",
    }


def markdown(figures: Figures) -> str:
    """Return the tables of docs/operations.md: the figures, then what follows from them."""
    lines = ["| figure | | option |", "|---|---|---|"]
    for part in dataclasses.fields(figures):
        unit, digits = part.metadata["unit"], part.metadata["digits"]
        value = f"{getattr(figures, part.name) / SCALES.get(unit, 1):,.{digits}f} {unit}".rstrip()
        lines.append(f"| {part.metadata['meaning']} | {value} | `--{part.name}` |")
    sizes = [Prediction(figures, gpus) for gpus in GPUS]
    lines += ["", f"| | {' | '.join(f'{gpus} GPUs' for gpus in GPUS)} |", "|---" * (1 + len(GPUS)) + "|"]
    for heading, cell in rows(figures).items():
        lines.append(f"| {heading} | {' | '.join(cell(at) for at in sizes)} |")
    return "\n".join(lines)


# ---- the formulas beside trainings here

WORKERS = (2, 4, 8)
# Slow enough for communication to take seconds: a busy machine's delays are small beside them.
SIZE: dict[str, Any] = {"bytes_per_s": 8e6, "depth": 6, "forward_s": 1.5, "backward_s": 6.0}
SMOKE: dict[str, Any] = {"bytes_per_s": 1e7, "depth": 2, "forward_s": 0.1, "backward_s": 0.4}
COLUMNS = (Column("training", "name"), Column("MB/s", "bytes_per_s", ",.1f", 1e-6),
           Column("compute s", "compute_s"), Column("all-reduce s", "all_reduce_s"),
           Column("exposed s", "exposed_s"), Column("predicted s", "predicted_s"), Column("step s", "step_s"),
           Column("measured over predicted", "over"), Column("load", "load_average", ".1f"))  # fmt: skip


def check(options: argparse.Namespace) -> int:
    """Train with several workers over a limited network; returns 1 where a formula is further off than it may be."""
    from limited_network import why_not  # torch takes seconds to import, which the tables do not need
    from scaling_check import LIMIT, Setup, check

    if reason := why_not():
        raise ValueError(f"--check cannot run here: {reason}")
    record = Record("scaling", vars(options), path=options.json)
    print(record.heading(), flush=True)
    for workers in (2,) if options.smoke else WORKERS:
        common.note(f"{workers} workers")
        setup = (
            Setup(workers, **SMOKE, steps=2)
            if options.smoke
            else Setup(workers, **SIZE, steps=options.rounds)
        )
        record.add("check", [check(setup)])
    found = record.sections["check"]
    print(common.table("a step, by formula and measured", COLUMNS, found))
    wrong = [row["name"] for row in found if abs(row["over"] - 1) > LIMIT]
    if wrong and not options.smoke:
        print(f"more than {LIMIT:.0%} off: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong and not options.smoke else 0


def options_of(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Figures]:
    """Parse the command line; returns the options, and the figures of records and options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--record", type=Path, action="append", default=[], metavar="FILE", help="of a benchmark; repeatable")
    add("--check", action="store_true", help="train here, beside the formulas")
    add("--json", type=Path, metavar="FILE", help="the record of --check")
    add("--rounds", type=int, default=3, help="steps that --check times (default: %(default)s)")
    add("--smoke", action="store_true", help="--check at a tiny size, to see that it runs")
    for part in dataclasses.fields(Figures):
        add(
            f"--{part.name}",
            type=_positive,
            metavar="NUMBER",
            help=part.metadata["meaning"].replace("%", "%%"),
        )
    options = made.parse_args(arguments)
    names = {part.name for part in dataclasses.fields(Figures)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    return options, Figures(**{**read_figures([*RECORDS, *options.record]), **given})


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def main() -> int:
    options, figures = options_of()
    if options.check:
        return check(options)
    print(markdown(figures))
    return 0


if __name__ == "__main__":
    common.run(main)
