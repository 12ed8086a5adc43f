"""The model of scale: each formula beside what it stands for, and its tables beside docs/operations.md."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import scaling
import torch
import torch.distributed as dist
from helpers import threads
from limited_network import why_not
from scaling_check import LIMIT, Setup, build, check, predict, step_times
from scaling_model import (
    MIB,
    all_reduce_s,
    best_interval_s,
    buckets,
    exposed_s,
    failure_share,
    latency_s,
    step_s,
    stored_every_s,
)

from lape_ray.cluster.group import Alone
from lape_ray.cluster.reporter import RunReporter
from lape_ray.training.distributed import World
from lape_ray.training.parallelize import data_parallel

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A team of threads waits for each other at length where cores are shared."""
    with threads.one_thread():
        yield


def test_the_tables_of_the_documentation_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    _, figures = scaling.options_of([])
    text = (ROOT / "docs" / "operations.md").read_text()
    for table in scaling.markdown(figures).split("\n\n"):
        assert table in text, "run python benchmarks/scaling.py, and bring its tables to docs/operations.md"


def test_figures_come_from_options_and_records(tmp_path: Path) -> None:
    step = {"model": "deit_small", "name": "lape/compiled", "images_per_second": {"median": 9000.0}}
    parts = [{"name": "checks"}, {"name": "deit_small", "sections": {"train_step": [step]}}]
    record, other = tmp_path / "gpu.json", tmp_path / "start.json"
    record.write_text(json.dumps({"benchmark": "gpu", "sections": {"parts": parts}}))
    _, figures = scaling.options_of(["--record", str(record), "--batch", "256"])
    assert (figures.images_per_s, figures.batch) == (9000, 256)
    assert figures.copy_bytes_per_s == pytest.approx(91728427 / 0.01944, rel=1e-3)
    other.write_text(json.dumps({"benchmark": "start", "sections": {"start": []}}))
    with pytest.raises(ValueError, match=r"start\.json: it has no figure; give one of checkpoint, loader"):
        scaling.options_of(["--record", str(other)])
    with pytest.raises(SystemExit):
        scaling.options_of(["--batch", "0"])


def test_an_all_reduce_sends_each_byte_almost_twice() -> None:
    assert all_reduce_s(100.0, 1, bytes_per_s=10) == 0
    assert all_reduce_s(100.0, 2, bytes_per_s=10) == 10
    assert all_reduce_s(100.0, 4, bytes_per_s=10, latency_s=1) == 16
    assert latency_s(1, 2) == pytest.approx(2 * 1.2e-6)  # a tree of two GPUs
    assert latency_s(64, 8) == pytest.approx(2 * (7 * 1.2e-6 + 6 * 8.5e-6))  # the ring: 4 ms


def test_buckets_are_those_of_distributed_data_parallel(tmp_path: Path, one_thread: None) -> None:
    state = build(Setup(1, 1, depth=6, forward_s=0, backward_s=0, steps=1), 1)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = data_parallel(state.network, "none", CPU, one_micro_batch=True)
        for _ in range(5):
            parallel(torch.rand(2, 3, 32, 32)).sum().backward()
        logged = parallel._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    finally:
        dist.destroy_process_group()
    found = [int(size) for size in logged.split(",")]
    expected = buckets(4 * sum(parameter.numel() for parameter in state.network.parameters()))
    assert sum(found) == sum(expected) and len(found) == len(expected) == 3
    assert found == pytest.approx(expected, abs=2.5 * MIB)  # a parameter: 384 x 1,536 floats


def test_only_what_the_backward_pass_does_not_hide_is_exposed() -> None:
    sizes = [1.0, 4.0, 5.0]
    assert exposed_s(sizes, [0.1, 0.4, 0.5], backward_s=10) == pytest.approx(0.5)  # the last bucket
    assert exposed_s(sizes, [1, 40, 50], backward_s=10) == pytest.approx(5 + 40 + 50 - 10)
    assert exposed_s(sizes, [1, 4, 5], backward_s=0) == 10
    assert (step_s(3, 1), step_s(3, 1, data_s=3.5), step_s(3, 1, data_s=5)) == (4, 4, 5)


class OpenWriter:
    """A writer of checkpoints, each of which is stored when its future is set."""

    def __init__(self) -> None:
        self.begun: list[Future[tuple[str, float]]] = []

    def begin(self, entry: Any, snapshot: Any) -> Future[tuple[str, float]]:
        self.begun.append(Future())
        return self.begun[-1]


def test_the_training_waits_for_no_checkpoint_before() -> None:
    """What the formula says of the loop's reporter."""
    assert (stored_every_s(store_s=2, interval_s=5), stored_every_s(store_s=2, interval_s=0.5)) == (5, 2)
    tracking, settings = SimpleNamespace(position_report_epochs=None), SimpleNamespace(num_workers=1)
    config = SimpleNamespace(run=settings, tracking=tracking, last_epoch=9, has_last_size=lambda epoch: True)
    run, writer = cast(Any, SimpleNamespace(config=config)), OpenWriter()
    reporter = RunReporter(run, Alone(Event()), World(0, 1, CPU), writer=cast(Any, writer))
    for number in range(1, 4):  # returns, while the first is being stored
        metrics = {"epoch": number, "val/acc1": number}
        reporter.epoch(metrics, step=number, snapshot=lambda: cast(Any, object()))
    assert len(writer.begun) == 1
    writer.begun[0].set_result(("checkpoint-epoch-000001", 1.0))
    reporter.checkpoint_stored()
    assert len(writer.begun) == 2


def test_failures_cost_what_a_simulation_says() -> None:
    """Work of 10,000 h with failures at random moments, each of which goes back to the last checkpoint."""
    draws, mtbf_s, restart_s, interval_s = random.Random(0), 100.0, 2.0, 6.0
    lost_s, at_s, work_s = 0.0, 0.0, 200_000.0
    while (at_s := at_s + draws.expovariate(1 / mtbf_s)) < work_s:
        lost_s += restart_s + at_s % interval_s
        at_s -= at_s % interval_s
    share = failure_share(mtbf_s, restart_s, interval_s)
    assert lost_s / work_s == pytest.approx(share, rel=0.1)


def test_the_best_interval_loses_least() -> None:
    stall_s, mtbf_s = 0.5, 10_000.0

    def lost(interval_s: float) -> float:
        return stall_s / interval_s + failure_share(mtbf_s, 60, interval_s)

    best = best_interval_s(stall_s, mtbf_s)
    assert best == 100
    assert all(lost(best) < lost(other) for other in (best / 1.1, best * 1.1))


def test_blocks_of_the_check_sleep_in_both_passes(one_thread: None) -> None:
    setup = Setup(1, 1, depth=2, forward_s=0.2, backward_s=0.3, steps=2)
    found = step_times(build(setup, 1))
    assert len(found) == 2 and min(found) >= 0.5


def test_the_formula_is_still_the_one_that_was_held_against_trainings() -> None:
    """Another formula needs another run of `scaling.py --check`."""
    record = json.loads((scaling.RESULTS / "scaling_2026-11-29_cpu.json").read_text())
    rows = record["sections"]["check"]
    assert [row["name"] for row in rows] == [f"{workers} workers" for workers in scaling.WORKERS]
    for workers, row in zip(scaling.WORKERS, rows, strict=True):
        for name, value in predict(row, workers, backward_s=scaling.SIZE["backward_s"]).items():
            assert row[name] == pytest.approx(value)
        assert row["over"] == pytest.approx(row["step_s"]["median"] / row["predicted_s"])
        assert row["over"] == pytest.approx(1, abs=LIMIT)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_over_a_limited_network_takes_what_the_formula_says() -> None:
    if reason := why_not():
        pytest.skip(reason)
    row = check(Setup(4, **scaling.SIZE, steps=3))
    assert row["exposed_s"] > 0.3 * row["all_reduce_s"]  # so that it counts
    assert row["over"] == pytest.approx(1, abs=LIMIT)
