"""Searches without a cluster: spaces, strategies that are killed and continued, statistics, reports."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import random
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.simulated_tune import KilledError, Simulation, session_of
from ray.tune.experiment import Trial as TuneTrial

from lape_ray.cli import parse
from lape_ray.cluster import resources
from lape_ray.cluster.resources import compared, places
from lape_ray.config import flatten, what_is_learned
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select
from lape_ray.model import build_model
from lape_ray.recipes import TABLE1, command_line, recipe
from lape_ray.report.statistics import Estimate
from lape_ray.search import tuner
from lape_ray.search.cells import SPACES, build_space, check_point, labels
from lape_ray.search.command import listing, plan_of
from lape_ray.search.live import Display
from lape_ray.search.pictures import differences_figure
from lape_ray.search.plan import Plan
from lape_ray.search.record import Epoch, Trial
from lape_ray.search.report import cell_rows, markdown, trial_rows, write_csv, write_report
from lape_ray.search.run import check_points
from lape_ray.search.settings import worker_need
from lape_ray.search.space import Choice, Range, parse_axes
from lape_ray.search.statistics import cells, in_words
from lape_ray.search.strategies import SCHEDULES, HyperBand
from lape_ray.training import preflight
from lape_ray.training.loop import StoppedError

LR = "optim.lr=loguniform(1e-4,1e-2)"

# --- spaces ---------------------------------------------------------------------------------------------------


def test_axes_are_read_with_the_types_of_the_config() -> None:
    texts = [LR, "data.mixup=uniform(0,0.8)", "model.depth=randint(2,6)", "model.join=choice(basic,lape)",
             "data.crop_scale=choice((0.08,1),(0.5,1))", "data.rand_augment=choice(none,rand-m9-mstd0.5-inc1)",
             "optim.clip_norm=choice(none,1)"]  # fmt: skip
    axes = parse_axes(texts, recipe("demo"))
    assert axes == {
        "optim.lr": Range(1e-4, 1e-2, log=True),
        "data.mixup": Range(0, 0.8),
        "model.depth": Range(2, 6, whole=True),
        "model.join": Choice(("basic", "lape")),
        "data.crop_scale": Choice(((0.08, 1.0), (0.5, 1.0))),
        "data.rand_augment": Choice((None, "rand-m9-mstd0.5-inc1")),
        "optim.clip_norm": Choice((None, 1.0)),
    }
    assert [f"{name}={axis}" for name, axis in axes.items()][:3] == [
        "optim.lr=loguniform(0.0001,0.01)", "data.mixup=uniform(0,0.8)", "model.depth=randint(2,6)",
    ]  # fmt: skip


def test_a_range_is_covered_evenly() -> None:
    log = Range(1e-4, 1e-2, log=True)
    assert [log.at(share) for share in (0, 0.5, 1)] == pytest.approx([1e-4, 1e-3, 1e-2])
    whole = Range(2, 6, whole=True)
    assert Counter(whole.at(n / 1000) for n in range(1000)) == dict.fromkeys((2, 3, 4, 5, 6), 200)
    assert [log.moved(1e-3, 0.1), log.moved(1e-3, 0.9), log.moved(1e-2, 0.9)] == [8e-4, 1.2e-3, 1e-2]
    for axis in (log, whole, Range(0, 0.8)):
        values = [axis.at(n / 97) for n in range(98)]
        assert [axis.at(axis.place(value)) for value in values] == values
    some = Choice(("a", "b", "c"))
    assert [some.place(value) for value in some.values] == [0, 0.5, 1]
    assert [some.moved("b", 0.1), some.moved("b", 0.9), some.moved("c", 0.9)] == ["a", "c", "c"]


BAD_AXES = [
    ("optim.lrr=uniform(0,1)", "no such field; did you mean optim.lr"),
    ("optim.lr=0.1", "is not understood; write optim.lr= and one of choice(a,b,...)"),
    ("optim.lr=normal(0,1)", "normal(...) is no kind of axis"),
    ("optim.lr=uniform(1,0)", "is empty: 1 is not below 0; exchange them"),
    ("optim.lr=loguniform(0,1)", "must begin above 0; use uniform to include 0"),
    ("optim.lr=uniform(0,a)", "'a' must be a number"),
    ("optim.lr=choice()", "has no values"),
    ("optim.lr=choice(1e-3,0.001)", "holds a value twice"),
    ("optim.lr=uniform(0,5000)", "lr=5000.0 is out of range; it must be from 0 to 1000"),
    ("model.depth=uniform(2,4)", "does not fit the field's type; use randint(low,high)"),
    ("model.join=uniform(0,1)", "does not fit the field's type; use choice(a,b,...)"),
    ("model.join=choice(lape,glue)", "join='glue' is not known; choose one of basic, share"),
    ("optim.epochs=choice(1,2)", "optim.epochs is the length of every trial"),
    ("training.seed=choice(1,2)", "training.seed is no axis: --seeds N repeats"),
    ("run.num_workers=choice(1,2)", "does not change what is learned, so there is nothing to search; give --run.num"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_AXES, ids=[text for text, _ in BAD_AXES])
def test_a_bad_axis_is_refused_with_the_fix(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_axes([text], recipe("demo"))


def test_named_spaces_hold_what_they_say() -> None:
    base = recipe("demo")
    assert len(SPACES["positions"](base).cells) == 600
    assert [cell["model.join"] for cell in SPACES["joins"](base).cells] == [
        "basic", "share", "unshare", "lape", "lape_shared",
    ]  # fmt: skip
    assert len(SPACES["paper_table7"](base).cells) == 14
    cvt = recipe("cvt_7_4_lape")
    assert len(SPACES["positions"](cvt).cells) == 720
    assert "mpvg" in [cell["model.join"] for cell in SPACES["joins"](cvt).cells]
    swin = recipe("swin_tiny_lape")
    assert len(SPACES["positions"](swin).cells) == 320
    assert [cell["model.join"] for cell in SPACES["joins"](swin).cells] == ["basic", "lape"]
    fixed = build_space("positions", base, {}, ("model.bias", "model.rotary"))
    assert len(fixed.cells) == 15  # 1 without position, 1 of peg, 5 of learnable, 4 of each fixed table
    assert {cell["model.bias"] for cell in fixed.cells} == {"none"}


def test_lape_stands_beside_each_other_embedding_in_pairs() -> None:
    space = build_space("lape_beside", recipe("cvt_7_4_lape"), {})
    assert labels(space.points()) == [
        f"{join}{beside}"
        for beside in ("", " rotary=axial", " rotary=mixed", " rotary=spiral", " relative2d", " alibi2d", " log_cpb",
                       " lookhere", " pape", " irpe_k")
        for join in ("basic", "lape")
    ]  # fmt: skip
    plan = plan_of(
        space="lape_beside",
        recipe="cvt_7_4_lape",
        axes=[],
        overrides={"optim.epochs": 20, "training.seed": 0},
    )
    names = labels(space.points())
    for cell in cells(plan, finished(plan, {name: [50.0] for name in names})):
        wanted = cell.label.replace("lape", "basic", 1) if cell.label.startswith("lape") else None
        assert (cell.reference and cell.reference.label) == wanted


def test_the_papers_table_1_trains_each_row_as_its_recipe() -> None:
    made = plan_of(
        space="paper_table1", recipe="deit_tiny_lape", axes=[], overrides={"optim.teacher": "a teacher"}
    )
    assert made.points == len(made.space.cells) == len(set(labels(made.space.points()))) == 26
    for name, point in zip(TABLE1, made.space.points(), strict=True):
        wanted, found = flatten(recipe(name)), flatten(check_point(made.base, point))
        apart = {each for each, value in wanted.items() if found[each] != value}
        assert apart <= {"recipe", "optim.teacher", "optim.cooldown_epochs"}, name
    assert labels(made.space.points())[6] == "variant=deit_tiny_distilled learnable basic"
    some = plan_of(
        space="paper_table1", recipe="swin_tiny_rpe", axes=[], overrides={"model.variant": "swin_tiny"}
    )
    assert labels(some.space.points()) == [
        "relative2d", "learnable basic", "learnable lape", "learnable lape relative2d",
    ]  # fmt: skip


def test_the_papers_table_8_takes_a_layer_norm_apart() -> None:
    for name in ("deit_tiny_lape", "swin_tiny_lape"):
        cells = build_space("paper_table8", recipe(name), {}).cells
        assert [cell["model.join"] for cell in cells] == [
            "basic", "lape_identity", "lape_scalar", "lape_gamma", "lape_affine", "lape_norm", "lape_scalar_norm",
            "lape_gamma_norm", "lape",
        ]  # fmt: skip


BAD_PLANS: list[tuple[dict[str, object], str]] = [
    ({"space": "everything"}, "space 'everything' is not known; known spaces are positions"),
    ({"space": "free"}, "a single cell, so there is nothing to search: fix fewer fields, or add an axis such as"),
    ({"space": "joins", "overrides": {"model.position": "none"}}, "a single cell"),
    ({"space": "paper_table1", "axes": []}, "goes over recipes and is of one of them, such as deit_tiny_lape; this"),
    ({"space": "paper_table1", "recipe": "deit_tiny_lape", "axes": []}, "needs a teacher: give --optim.teacher"),
    ({"space": "paper_table1", "recipe": "deit_tiny_lape", "axes": [], "overrides": {"data.batch_size": 9}},
     "no cell of the space paper_table1 has --data.batch_size 9; leave out"),
    ({"overrides": {"optim.lr": 1e-3}}, "both fixed by --optim.lr and searched by --space optim.lr; leave out one"),
    ({"space": "joins", "axes": ["model.join=choice(basic,lape)"]}, "goes over model.join itself; leave out --space"),
    ({"axes": ["model.position=choice(none,learnable)", "model.join=choice(basic,lape)"]},
     "contradiction at model.position=none, model.join=lape: position=none has nothing to join"),
    ({"sample": "grid"}, "optim.lr is a range: write optim.lr=choice(...)"),
    ({"trials": 0}, "at least one trial"),
    ({"seeds": 0}, "--seeds 0 trains nothing"),
    ({"eta": 1}, "--eta 1 keeps every trial"),
    ({"schedule": "asha", "grace": 25}, "no epoch to decide at: --grace 25 is all of a trial"),
    ({"metric": "val/acc9"}, "--metric 'val/acc9' is not known; choose one of val/acc1"),
    ({"metric": "val_ema/acc1"}, "needs a moving average: set --optim.ema_decay"),
    ({"schedule": "asha", "overrides": {"run.eval_epochs": 5}}, "set --run.eval_epochs 1"),
    ({"schedule": "pbt", "trials": 4}, "give --seeds 1 and --trials 6 or more"),
    ({"schedule": "pbt", "axes": ["model.depth=randint(2,4)"]}, "pbt cannot change model.depth while a run goes on"),
    ({"schedule": "pbt", "space": "joins", "axes": []}, "use the space `free` with axes such as"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_PLANS, ids=[message[:30] for _, message in BAD_PLANS])
def test_a_bad_plan_is_refused_with_the_fix(changes: dict[str, object], message: str) -> None:
    given = {"space": "free", "recipe": "demo", "axes": [LR]}
    if changes.get("space") == "free":
        given["axes"] = []
    if changes.get("space") in ("joins", "everything"):
        given["axes"] = []
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of(**{**given, **changes})  # type: ignore[arg-type]


def test_the_listing_shows_every_point() -> None:
    text = listing(
        plan_of(space="positions", recipe="demo", overrides={"model.bias": "none", "model.rotary": "none"})
    )
    assert "15 points x 1 seeds of 25 epochs, points by grid" in text
    assert "  no position\n" in text
    assert "  learnable lape_shared\n" in text


def test_every_point_is_checked_at_every_size_and_with_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:10"), tmp_path / f"{split}.beton", workers=1)
    files = {f"data.{split}": str(tmp_path / f"{split}.beton") for split in ("train", "val")}
    schedule = {"optim.epochs": 4, "data.image_size_schedule": "16:0-2,32:2-4"}

    def check(*axes: str, **changes: object) -> None:
        values = {name.replace("__", "."): value for name, value in changes.items()}
        given = {**files, **schedule, **values}
        trials = 4 if LR in axes else None
        check_points(plan_of(space="free", recipe="smoke", axes=axes, overrides=given, trials=trials))

    for axes, message in (
        (["model.image_size=choice(32,64)"], "the cell {'model.image_size': 64} cannot be trained: data.image_size_"),
        (["model.image_size=choice(32,64)", LR], "ends with 32 px, but the model reads 64"),
        (["model.patch_size=choice(8,32)"], "data.image_size_schedule, 16 px: image_size=16 does not divide by patch"),
        (["data.batch_size=choice(32,512)"], "holds 100 images, less than one step of data.batch_size=512"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            check(*axes)
    with pytest.raises(ValueError, match="has images of at most 32 px, but the model reads 64"):
        check("model.image_size=choice(32,64)", data__image_size_schedule=None)
    built = []
    monkeypatch.setattr(preflight, "build_model", lambda model: built.append(model) or build_model(model))
    check("model.join=choice(basic,lape)", "optim.weight_decay=choice(0,0.1,0.2)", LR)
    assert [(model.join, model.image_size) for model in built] == [
        ("basic", 16), ("basic", 32), ("lape", 16), ("lape", 32),
    ]  # fmt: skip


# --- strategies -----------------------------------------------------------------------------------------------


def small(**given: object) -> Plan:
    values = {"space": "free", "recipe": "demo", "axes": [LR], "trials": 9, "overrides": {"optim.epochs": 9}}
    return plan_of(**{**values, **given})  # type: ignore[arg-type]


def accuracy(trial: Trial, epoch: int) -> float:
    """A made-up run: better near lr 1e-3, better with epochs, the seed's noise on top; what PBT inherits counts."""
    gained = 0.0
    for at in range(1, epoch + 1):
        lr = trial.values_before(at)["optim.lr"]
        gained += 6 - 2 * abs(math.log10(lr) + 3)
    return 30 + gained + random.Random(f"{trial.seed}").random()


def simulate(
    plan: Plan, *, lanes: int = 1, order: int = 0, fails: Callable[[Trial], str] = lambda trial: ""
) -> list[Trial]:
    return Simulation(plan, accuracy, lanes=lanes, order=order, fails=fails).run()


STRATEGIES: dict[str, dict[str, object]] = {
    "grid": {"axes": ["optim.lr=choice(1e-4,3e-4,1e-3)"], "trials": None, "seeds": 2},
    "random": {"sample": "random", "trials": 6},
    "tpe": {"sample": "tpe", "trials": 8},
    "asha": {"schedule": "asha"},
    "tpe asha": {"schedule": "asha", "sample": "tpe"},
    "hyperband": {"schedule": "hyperband", "trials": None},
    "pbt": {"schedule": "pbt", "grace": 3},
}


ARRIVAL_DECIDES = ("tpe", "asha", "tpe asha")
"""In these it matters which trial comes first, so that two at a time are another test's."""


@pytest.mark.parametrize(
    ("name", "lanes"),
    [(name, lanes) for name in STRATEGIES for lanes in (1, 2) if lanes == 1 or name not in ARRIVAL_DECIDES],
)
def test_killed_anywhere_and_continued_equals_undisturbed(name: str, lanes: int) -> None:
    """Also where the snapshot is older than the kill; and no epoch is trained twice."""
    plan = small(**STRATEGIES[name])
    undisturbed = simulate(plan)
    reports = sum(trial.done for trial in undisturbed)
    for number, kill_after in enumerate(range(1, reports, max(1, reports // 6))):
        every = (1, 3, 1000)[number % 3]
        killed = Simulation(plan, accuracy, lanes=lanes, every=every)
        with pytest.raises(KilledError):
            killed.run(kill_after=kill_after)
        assert killed.run() == undisturbed, f"killed after {kill_after} reports, snapshots every {every}"
        assert killed.trained == reports


def test_what_asha_decided_by_arrival_is_never_decided_again() -> None:
    """Two at a time: every decision at a rung is in a snapshot before the next report is heard."""
    plan = small(schedule="asha")
    for kill_after in range(2, 40):
        killed = Simulation(plan, accuracy, lanes=2, every=1000, order=kill_after)
        with pytest.raises(KilledError):
            killed.run(kill_after=kill_after)
        *before, _ = killed.decisions.items()  # the last report was heard a moment ago
        killed.order += 1  # others arrive first now
        killed.run()
        for at, decision in before:
            assert killed.decisions.get(at, decision) == decision


@pytest.mark.parametrize("name", ["grid", "random", "hyperband", "pbt"])
def test_the_speed_of_workers_changes_nothing(name: str) -> None:
    """ASHA and TPE decide by what is there, so that theirs may; these wait for what they compare."""
    plan = small(**STRATEGIES[name])
    alone = simulate(plan)
    for order in range(3):
        assert simulate(plan, lanes=4, order=order) == alone


def test_asha_stops_losers_and_saves_most_of_the_work() -> None:
    plan = small(schedule="asha", trials=27)
    trials = simulate(plan, lanes=3)
    states = Counter(trial.state for trial in trials)
    assert states["finished"] + states["stopped"] == 27
    assert states["stopped"] > 14
    assert {trial.done for trial in trials if trial.state == "stopped"} <= {1, 3}
    best = max(trials, key=lambda trial: accuracy(trial, 9))
    assert best.state == "finished"
    assert sum(trial.done for trial in trials) < 0.5 * 27 * 9


def reported(number: int, metric: str, *values: float) -> Trial:
    """A trial that has reported these values, one an epoch."""
    epochs = [Epoch(epoch=at, metrics={metric: value}, seconds=1) for at, value in enumerate(values, 1)]
    return Trial(number=number, point=number, seed=0, label="", first={}, epochs=epochs)


def test_asha_follows_the_metric_whose_less_is_better() -> None:
    asha = SCHEDULES["asha"](small(schedule="asha", metric="val/loss", eta=2, grace=3, trials=2))
    first, second = reported(0, "val/loss", 2.0, 1.9, 1.0), reported(1, "val/loss", 2.0, 1.9, 1.5)
    assert asha.after(first, [first]) == "go"
    assert asha.after(second, [first, second]) == "stop"
    second.epochs.pop()
    assert asha.after(second, [first, second]) == "go", "no rung"


def test_a_metric_that_is_no_number_loses() -> None:
    asha = SCHEDULES["asha"](small(schedule="asha", eta=2))
    first, second = reported(0, "val/acc1", 50.0), reported(1, "val/acc1", math.nan)
    assert asha.after(first, [first, second]) == "go"
    assert asha.after(second, [first, second]) == "stop"


def test_hyperband_has_the_brackets_of_the_paper() -> None:
    """Li et al., 2018, table 1, with R = 81 and eta = 3."""
    brackets = HyperBand(small(schedule="hyperband", trials=None, overrides={"optim.epochs": 81})).brackets()
    assert brackets == [
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        [(34, 3), (11, 9), (3, 27), (1, 81)],
        [(15, 9), (5, 27), (1, 81)],
        [(8, 27), (2, 81)],
        [(5, 81)],
    ]


def test_hyperband_keeps_the_best_of_each_rung() -> None:
    plan = small(schedule="hyperband", trials=None)
    trials = simulate(plan, lanes=2)
    brackets = HyperBand(plan).brackets()
    assert brackets == [[(9, 1), (3, 3), (1, 9)], [(5, 3), (1, 9)], [(3, 9)]]
    assert Counter(trial.done for trial in trials) == {1: 6, 3: 6, 9: 5}
    first = trials[:9]
    kept = {trial.number for trial in first if trial.done >= 3}
    best = sorted(first, key=lambda trial: -accuracy(trial, 1))[:3]
    assert kept == {trial.number for trial in best}


def test_pbt_replaces_the_worst_by_moved_copies_of_the_best() -> None:
    plan = small(schedule="pbt", grace=3, trials=9)
    trials = simulate(plan, lanes=2)
    assert all(trial.state == "finished" for trial in trials)
    for epoch in (3, 6):
        ranked = sorted(trials, key=lambda trial: -(trial.curve("val/acc1").get(epoch, 0)))
        clones = {t.number: c for t in trials for c in t.lineage if c.epoch == epoch}
        assert set(clones) == {trial.number for trial in ranked[-3:]}
        for clone in clones.values():
            assert clone.source in {trial.number for trial in ranked[:3]}
            source = trials[clone.source].values_before(epoch)["optim.lr"]
            assert clone.values["optim.lr"] / source in (
                pytest.approx(0.8, rel=1e-3),
                pytest.approx(1.2, rel=1e-3),
            )


def test_tpe_learns_where_random_does_not() -> None:
    def far(sample: str) -> float:
        late = simulate(small(sample=sample, trials=40, overrides={"optim.epochs": 2}))[20:]
        return sum(abs(math.log10(trial.values["optim.lr"]) + 3) for trial in late) / len(late)

    assert far("tpe") < 0.75 * far("random")


def test_a_failing_trial_does_not_end_the_search() -> None:
    for name in ("grid", "asha", "hyperband", "pbt"):
        plan = small(**STRATEGIES[name])
        trials = simulate(plan, lanes=2, fails=lambda t: "ValueError: no" if t.number == 1 and t.done else "")
        assert trials[1].state == "failed"
        assert trials[1].error == "ValueError: no"
        assert all(trial.over for trial in trials)
        assert sum(trial.state == "finished" for trial in trials) >= 1


def test_a_sampled_contradiction_fails_alone() -> None:
    """It gets no run in MLflow, whose parameters would be those of no config."""
    plan = small(axes=[LR, "data.batch_size=randint(32,64)"], trials=20)  # for two workers
    session = session_of(plan)
    runs = []
    for number in range(plan.trials):
        config = session.next_trial()
        assert config is not None
        assert config["number"] == number
        trial = TuneTrial("LapeTrial", config=config, stub=True)
        session.update(trial)
        runs.append(bool(config["run_id"]))
        if not config["run_id"]:
            with pytest.raises(ValueError, match=r"does not divide by run\.num_workers=2"):
                plan.config(Trial.of(config))
    assert 0 < sum(runs) < 20
    assert session.next_trial() is None


# --- what the cluster has room for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "need", "workers", "expected"),
    [
        ([{"CPU": 2}], {"CPU": 1}, 1, 2),
        ([{"CPU": 2}], {"CPU": 1}, 2, 1),
        ([{"CPU": 3}, {"CPU": 3}], {"CPU": 2}, 1, 2),  # 6 CPUs, but no node has 4
        ([{"CPU": 16, "GPU": 2}], {"CPU": 1, "GPU": 0.25}, 1, 8),
        ([{"CPU": 16, "GPU": 2}], {"CPU": 1, "GPU": 0.4}, 1, 4),  # two on each GPU, none across both
        ([{"CPU": 2, "GPU": 8}], {"CPU": 1, "GPU": 1}, 1, 2),
        ([{"CPU": 8}], {"CPU": 1, "GPU": 1}, 1, 0),
    ],
)  # fmt: skip
def test_places_on_nodes(
    nodes: list[dict[str, float]], need: dict[str, float], workers: int, expected: int
) -> None:
    assert places(nodes, need, workers) == expected


def test_what_a_cluster_lacks_is_said_also_where_its_nodes_are_small() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}]
    assert compared(nodes, {"CPU": 1, "GPU": 0.5}, 2) == "2 CPU, 1 GPU, but the cluster has 4 CPU, 0 GPU"
    assert compared(nodes, {"CPU": 3}, 1) == (
        "3 CPU, but the cluster has 4 CPU, though not 3 CPU on one node for each worker"
    )


def test_a_share_of_a_gpu_is_for_single_workers() -> None:
    run = recipe("demo").run  # two workers
    with pytest.raises(ValueError, match=r"NCCL refuses: set --run\.num_workers 1"):
        worker_need(run, use_gpu=True, gpus_per_worker=0.5)
    with pytest.raises(ValueError, match="trials run on CPUs; leave it out"):
        worker_need(run, use_gpu=False, gpus_per_worker=0.5)
    assert worker_need(run, use_gpu=True, gpus_per_worker=None) == {"CPU": 1, "GPU": 1.0}


def test_the_request_to_end_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer comes when the search is to end: the supervisor has room for a thousand calls that wait."""
    asked = []

    class Request:
        def __init__(self, supervisor: object) -> None:
            asked.append(supervisor)

        def __bool__(self) -> bool:
            return False

    monkeypatch.setattr(tuner, "StopRequest", Request)
    session = session_of(small())
    watch, trial = tuner.Watch(session), TuneTrial("LapeTrial", config=session.next_trial(), stub=True)
    trial.set_status(TuneTrial.RUNNING)
    for _ in range(3):
        watch.on_step_end(trials=[trial])
    assert len(asked) == 1


def test_without_machines_a_search_waits_and_ends_to_be_continued(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it does at once where it is asked to end."""

    class Request:
        asked = False

        def __init__(self, supervisor: object) -> None:
            pass

        def __bool__(self) -> bool:
            return self.asked

    monkeypatch.setattr(resources, "_nodes", list)
    monkeypatch.setattr(tuner, "StopRequest", Request)
    watch = tuner.Watch(session_of(small(overrides={"run.wait_s": 1})))
    with pytest.raises(tuner.ResourcesGoneError, match=r"has 0 CPU: lower .*; the same command continues"):
        watch.on_step_end(trials=[])
    assert "waiting up to 1 s for nodes: a trial needs 2 CPU, but" in capsys.readouterr().out
    Request.asked = True
    with pytest.raises(StoppedError):
        watch.on_step_end(trials=[])
    assert not capsys.readouterr().out


# --- statistics and reports -----------------------------------------------------------------------------------


def test_estimates_are_those_of_the_textbook() -> None:
    found = Estimate.of([1.0, 2.0, 4.0])
    assert (found.n, found.mean) == (3, pytest.approx(7 / 3))
    assert found.sd == pytest.approx(math.sqrt(7 / 3))
    assert found.interval is not None
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)  # Student's t of 2 degrees of freedom
    assert found.interval == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-6)
    assert Estimate.of([5.0]) == Estimate(1, 5.0, None, None)


def finished(plan: Plan, values: dict[str, list[float]]) -> list[Trial]:
    """A grid whose cells came to the given values, by seed."""

    def came_to(trial: Trial, epoch: int) -> float:
        return values[trial.label][trial.seed] - (plan.epochs - epoch)

    trials = Simulation(plan, came_to).run()
    for trial in trials:
        trial.epochs = [dataclasses.replace(one, seconds=2.0) for one in trial.epochs]
    return trials


JOINS = {
    "basic": [80.0, 82.0, 81.0],
    "share": [80.5, 81.0, 82.5],
    "unshare": [70.1, 72.0, 71.1],
    "lape": [84.0, 86.1, 84.9],
    "lape_shared": [83.0, 80.0, 85.0],
}


@pytest.fixture
def result() -> tuple[Plan, list[Trial]]:
    plan = plan_of(space="joins", recipe="demo", seeds=3, overrides={"optim.epochs": 3})
    return plan, finished(plan, JOINS)


def test_differences_are_paired_by_seed_and_said_in_words(result: tuple[Plan, list[Trial]]) -> None:
    plan, trials = result
    found = cells(plan, trials)
    assert [cell.label for cell in found] == ["lape", "lape_shared", "share", "basic", "unshare"]
    assert found[0].difference == Estimate.of([4.0, 82.0 * 0 + 86.1 - 82.0, 84.9 - 81.0])
    assert [cell.difference.clear if cell.difference else None for cell in found] == [
        True,
        False,
        False,
        None,
        True,
    ]
    words = in_words(plan, found)
    assert words[0].startswith(
        "lape came out best: 85.00 % over 3 seeds. Its lead over the next, lape_shared, is not"
    )
    assert words[1].startswith(
        "lape: better than basic by more than the noise, +4.00 points (95% interval +3.75"
    )
    assert words[3].startswith("share: cannot be told from basic, as the noise is larger, +0.33 points")
    assert words[4].startswith("unshare: worse than basic by more than the noise, -9.93 points")
    assert words[5].startswith("4 differences were looked at: where there is none at all, about 0.2")


def test_a_join_of_several_cells_is_judged_over_all_of_them() -> None:
    plan = plan_of(
        space="free", recipe="demo", seeds=3,
        axes=["model.rotary=choice(none,axial)", "model.join=choice(basic,lape)"],
    )  # fmt: skip
    scores = {
        "basic": [80.0, 82.0, 81.0], "lape": [82.0, 84.0, 83.0],
        "rotary=axial basic": [85.0, 85.0, 85.0], "rotary=axial lape": [84.0, 86.0, 85.0],
    }  # fmt: skip
    found = cells(plan, finished(plan, scores))
    words = in_words(plan, found)
    mean = Estimate.of([(2 - 1) / 2, (2 + 1) / 2, (2 + 0) / 2])  # by seed, over the two pairs
    low, high = mean.interval or (0.0, 0.0)
    assert words[1] == (
        f"join lape against basic, over all 2 cells that have both: +1.00 points on average (95% interval {low:+.2f} "
        f"to {high:+.2f} points, 3 seeds), not more than the noise; better in 1 of 2."
    )
    assert not any("over all" in line for line in in_words(plan, found[:1]))
    figure = differences_figure(plan, found)
    assert figure is not None
    drawn = sorted(tuple(line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 3)
    assert drawn == [(-1.0, 1.0, 0.0), (2.0, 2.0, 2.0)]
    assert differences_figure(plan, found[:1]) is None


def test_one_seed_says_nothing_of_noise() -> None:
    plan = plan_of(space="joins", recipe="demo", overrides={"optim.epochs": 3})
    words = in_words(plan, cells(plan, finished(plan, JOINS)))
    assert "With one seed nothing says how much of its lead over lape_shared is noise." in words[0]
    assert (
        words[1] == "lape: +4.00 points against basic, from one seed; nothing says how much of that is noise."
    )


def read_csv(folder: Path, rows: list[dict[str, object]]) -> list[dict[str, str]]:
    """What another program reads of these rows."""
    write_csv(folder / "rows.csv", rows)
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def test_the_tables_hold_every_number(result: tuple[Plan, list[Trial]], tmp_path: Path) -> None:
    plan, trials = result
    found = cells(plan, trials)
    assert "| lape | 3 | 85.00 | 1.05 | +4.00 | +3.75 to +4.25 | 3 | 0:00:18 | finished |" in markdown(
        plan, found
    )
    table = read_csv(tmp_path, cell_rows(found))
    assert [row["cell"] for row in table] == [cell.label for cell in found]
    assert float(table[0]["mean"]) == pytest.approx(85.0)
    assert float(table[0]["difference_low95"]) == pytest.approx(3.7516, abs=1e-3)
    lines = read_csv(tmp_path, trial_rows(plan, trials))
    assert [int(line["trial"]) for line in lines] == list(range(15))
    assert (lines[5]["cell"], lines[5]["seed"], lines[5]["last val/acc1"]) == ("basic", "1", "82.0")


def test_no_cell_of_the_tables_is_a_formula(tmp_path: Path) -> None:
    plan = plan_of(space="joins", recipe="demo", overrides={"optim.epochs": 3})
    trials = finished(plan, JOINS)
    for trial in trials:
        trial.label, trial.error = f"=1+{trial.number}", "@SUM(A1)\rx,=2\nmore"
    found = cells(plan, trials)
    labels = [f"'=1+{trial.number}" for trial in trials]
    rows = read_csv(tmp_path, cell_rows(found))
    assert sorted(row["cell"] for row in rows) == sorted(labels)
    assert any(float(row["difference"]) < 0 for row in rows if row["difference"]), "numbers stay"
    rows = read_csv(tmp_path, trial_rows(plan, trials))
    assert [(row["cell"], row["error"]) for row in rows] == [(label, "'@SUM(A1)") for label in labels]


def test_the_best_command_trains_the_best_config(result: tuple[Plan, list[Trial]]) -> None:
    plan, trials = result
    wild = plan_of(
        space="free", recipe="demo",
        axes=["data.rand_augment=choice(rand-m9-mstd0.5-inc1)", "data.crop_scale=choice((0.3,1),(0.5,1))",
              "optim.clip_norm=choice(none,2)", "optim.lr=choice(1.23456e-3,1)", "data.upscale=choice(true,false)"],
    )  # fmt: skip
    other = Trial(number=0, point=0, seed=3, label="", first=wild.space.points()[0])
    for of, trial in ((plan, trials[3]), (wild, other)):
        config = of.config(trial)
        words = shlex.split(command_line(config))
        assert words[:2] == ["python", "jobs/imagenet_deit.py"]
        assert what_is_learned(parse(words[2:], description="")) == what_is_learned(config)


def test_the_page_stands_alone_and_shows_failures(result: tuple[Plan, list[Trial]], tmp_path: Path) -> None:
    plan, trials = result
    trials[7].state, trials[7].error = "failed", "RuntimeError: <b>broken</b>\nwhere it broke"
    found = cells(plan, trials)
    page = write_report(
        plan,
        found,
        tmp_path / "report",
        command="python jobs/x.py",
        best_command="python jobs/y.py",
        cost="it took",
    )
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "<script" not in text
    assert "lape came out best" in text
    assert "RuntimeError: &lt;b&gt;broken&lt;/b&gt;" in text
    assert "where it broke" in text
    names = {path.name for path in page.parent.iterdir()}
    assert names == {
        "search.html", "table.md", "cells.csv", "trials.csv", "cells.svg", "cells.png", "curves.svg", "curves.png",
        "differences.svg", "differences.png",
    }  # fmt: skip


def test_hyper_parameters_are_drawn_side_by_side(tmp_path: Path) -> None:
    plan = small(axes=[LR, "data.mixup=uniform(0,0.8)", "model.depth=choice(2,4)"], schedule="asha")
    write_report(plan, cells(plan, simulate(plan)), tmp_path, command="", best_command="", cost="")
    drawing = (tmp_path / "parallel.svg").read_text()
    assert all(f"<!-- {name} -->" in drawing for name in ("lr", "mixup", "depth", "val/acc1"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_on_a_terminal_and_lines_in_a_log(
    result: tuple[Plan, list[Trial]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, trials = result
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "30")
    trials[2].state, trials[2].error = "failed", "ValueError: no\ntrace"
    terminal, log = Terminal(), io.StringIO()
    for out in (terminal, log):
        display = Display(plan, out)
        trials[14].state = "running"
        display.draw(trials)
        display.reported(trials[14], trials, "")
        trials[14].state = "finished"
        display.ended(trials[2], trials)
        display.ended(trials[14], trials)
    assert log.getvalue().splitlines() == [
        "trial 0014  lape_shared seed 2  epoch 3/3  val/acc1 85.00  ETA 0:00:00",
        "trial 0002  unshare seed 0  FAILED: ValueError: no",
        "trial 0014  lape_shared seed 2  finished after 0:00:06: val/acc1 85.00  (15 of 15 trials)",
    ]
    drawn = terminal.getvalue()
    assert "\x1b[" in drawn
    assert "   14  lape_shared     2        3/3         85.00   0:00:06  training" in drawn
    assert "failed: ValueError: no" in drawn
    assert all(len(line) < 100 for line in display.table(trials, 100, 12))
    assert len(display.table(trials, 100, 12)) <= 12
