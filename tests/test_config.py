"""Configs, recipes and the command line."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest

from lape_ray.cli import ConfigParser, parse
from lape_ray.config import (
    LEARNED,
    SECTIONS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    config_hash,
    dump,
    flatten,
    from_dict,
    parse_value,
    replace_fields,
    to_dict,
    type_name,
    what_is_learned,
)
from lape_ray.recipes import RECIPES, TABLE1, recipe
from lape_ray.training.checkpoint import differences

GOLDEN = Path(__file__).parent / "golden" / "recipes"
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_text_is_as_committed(name: str) -> None:
    """Set UPDATE_GOLDEN=1 to write the files anew, and read the difference before committing it."""
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(dump(recipe(name)))
    assert dump(recipe(name)) == file.read_text()


def test_no_golden_file_without_a_recipe() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_says_its_evidence(name: str) -> None:
    made = recipe(name)
    assert from_dict(TrainConfig, to_dict(made)) == made
    assert made.recipe == name
    assert len(RECIPES[name].__doc__ or "") > 40


def test_lape_recipes_differ_from_basic_in_the_join_alone() -> None:
    for name in RECIPES:
        if name.endswith("_rpe"):  # the paper has no row of a table and a relative bias without LaPE
            continue
        if "_lape" in name:
            lape, basic = recipe(name), recipe(name.replace("_lape", "_basic"))
            assert differences(basic, lape) == ["model.join: 'basic' -> 'lape'"]


def test_the_interval_of_checkpoints_is_minutes_or_auto() -> None:
    kind = typing.get_type_hints(RunConfig)["checkpoint_minutes"]
    for text, value in (("auto", "auto"), ("2.5", 2.5), ("0", 0)):
        assert parse_value(kind, text) == value
        config = replace_fields(recipe("smoke"), {"run.checkpoint_minutes": value})
        assert from_dict(TrainConfig, to_dict(config)) == config
    assert type_name(kind) == "float|auto"
    for wrong in ("soon", -1):
        with pytest.raises(ValueError, match=r"checkpoint_minutes=.*(choose one of auto|must be from 0)"):
            replace_fields(recipe("smoke"), {"run.checkpoint_minutes": wrong})


def test_swins_rows_differ_in_position_alone() -> None:
    for size in ("tiny", "small"):
        basic, lape, both, relative = (
            recipe(f"swin_{size}_{row}") for row in ("basic", "lape", "lape_rpe", "rpe")
        )
        assert differences(lape, both) == ["model.bias: 'none' -> 'relative2d'"]
        wanted = ["model.position: 'learnable' -> 'none'", "model.bias: 'none' -> 'relative2d'"]
        assert differences(basic, relative) == wanted


# Variant, position, join, bias; at epoch 100, at the end, the network's authors, and an independent re-run.
TABLE1_ROWS = """
deit_tiny learnable basic none 58.13 71.54 72.2 72.14
deit_tiny learnable lape none 60.36 73.11 - 72.94
deit_small learnable basic none 68.41 80.00 79.9 79.81
deit_small learnable lape none 69.49 80.54 - 80.39
deit_base learnable basic none 74.16 81.64 81.8 81.85
deit_base learnable lape none 75.43 81.97 - 82.15
t2t_vit_7 sincos1d basic none 65.62 71.69 71.7 71.76
t2t_vit_7 sincos1d lape none 66.43 71.92 - 72.01
deit_tiny_distilled learnable basic none 61.89 74.16 74.5 -
deit_tiny_distilled learnable lape none 63.43 74.97 - -
deit_small_distilled learnable basic none 70.65 80.98 81.2 -
deit_small_distilled learnable lape none 71.84 81.48 - -
deit_base_distilled learnable basic none 76.41 83.05 83.4 -
deit_base_distilled learnable lape none 77.39 83.41 - -
swin_tiny none basic relative2d 73.79 81.12 81.2 -
swin_tiny learnable basic none 72.76 80.92 - -
swin_tiny learnable lape none 73.39 81.25 - -
swin_tiny learnable lape relative2d 74.02 81.49 - 81.48
swin_small none basic relative2d 76.03 83.17 83.2 -
swin_small learnable basic none 75.37 82.81 - -
swin_small learnable lape none 76.50 83.26 - -
swin_small learnable lape relative2d 76.93 83.39 - -
ceit_tiny learnable basic none 66.91 76.52 76.4 76.62
ceit_tiny learnable lape none 67.21 76.87 - 76.89
ceit_small learnable basic none 73.60 81.88 82.0 -
ceit_small learnable lape none 73.87 82.12 - -
"""


def test_table_1_has_a_recipe_for_each_row_with_its_figures() -> None:
    rows = [line.split() for line in TABLE1_ROWS.strip().splitlines()]
    networks = {tuple(row[:4]): row[4:] for row in rows}
    assert len(rows) == len(networks) == len(TABLE1) == 26
    for name in TABLE1:
        model = recipe(name).model
        at_100, end, authors, again = networks.pop((model.variant, model.position, model.join, model.bias))
        text = " ".join(str(RECIPES[name].__doc__).split())
        assert f"Paper: {end}, and {at_100} at epoch 100 (table 1)" in text, name
        assert authors == "-" or re.search(rf"authors(: | have ){authors}\b", text), name
        assert again == "-" or f"independent re-run has {again} (2502.02919)" in text, name
    assert not networks


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="recipe 'deit' is not known; known recipes are deit_tiny_basic, "):
        recipe("deit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ModelConfig(join="lapee"),
            "join='lapee' is not known; choose one of basic, share, unshare, lape",
        ),  # type: ignore[arg-type]
        (lambda: ModelConfig(depth=0), "depth=0 is out of range; it must be from 1 to"),
        (lambda: DataConfig(crop_scale=(0.5, 0.2)), "crop_scale"),
        (lambda: DataConfig(mean=(124.0, 116.0, 104.0)), "mean=.* must be from 0 to 1"),
        (lambda: DataConfig(erase_prob=1.5), "erase_prob=1.5 is out of range"),
        (lambda: DataConfig(color_jitter=-1.0), "color_jitter=-1.0 is out of range"),
        (lambda: DataConfig(interpolation="nearest"), "interpolation='nearest' is not known"),  # type: ignore[arg-type]
        (lambda: DataConfig(rand_augment="rand", three_augment=True), "alternatives"),
        (lambda: DataConfig(std=(0, 1, 1)), "std=.* must be above 0"),
        (lambda: OptimConfig(epochs=3, warmup_epochs=4), "warmup_epochs=4 is out of range"),
        (lambda: OptimConfig(clip_norm=0), "clip_norm=0 must be above 0"),
        (lambda: RunConfig(name="a/b"), "name='a/b' must begin with a letter"),
        (lambda: TrackingConfig(experiment="../../x"), "would keep artifacts in another folder"),
        (lambda: TrackingConfig(experiment="/"), "would keep artifacts in another folder"),
        (lambda: replace_fields(recipe("demo"), {"run.num_workers": 3}), "nearest that do are 63 and 66"),
        (
            lambda: from_dict(ModelConfig, {"jion": "lape"}),
            r"ModelConfig has no field \['jion'\]; it has variant",
        ),
    ],
)
def test_bad_values_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_the_hash_follows_what_is_learned_and_nothing_else() -> None:
    base = recipe("demo")
    moved = replace_fields(base, {"run.num_workers": 1, "run.name": "other", "data.train": "/elsewhere"})
    assert config_hash(moved) == config_hash(base)
    for change in ({"optim.lr": 3e-3}, {"training.seed": 1}, {"model.join": "basic"}, {"data.flip": 0.1}):
        assert config_hash(replace_fields(base, change)) != config_hash(base)


def test_run_and_tracking_never_change_what_is_learned() -> None:
    fields = [name for name in flatten(TrainConfig()) if name not in what_is_learned(TrainConfig())]
    assert {name.partition(".")[0] for name in flatten(TrainConfig())} == {"recipe", *SECTIONS}
    others = [name for name in fields if name.partition(".")[0] in LEARNED]
    assert others == [
        "data.train", "data.val", "data.eval_batch_size", "data.threads", "data.stream", "data.fused",
        "optim.accumulate",
    ]  # fmt: skip
    assert {"run", "tracking", "recipe"} == {name.partition(".")[0] for name in set(fields) - set(others)}


def test_a_record_from_before_the_sections_training_and_tracking_is_read() -> None:
    changes = {
        "training.seed": 7,
        "training.precision": "bf16",
        "tracking.uri": "http://x",
        "tracking.pages": False,
    }
    today = replace_fields(recipe("demo"), {**changes, "run.name": "a"})
    former = to_dict(today)
    training, tracking = former.pop("training"), former.pop("tracking")
    former["run"] |= {**training, "tracking_uri": tracking.pop("uri"), **tracking}
    del former["run"]["tensorboard"]  # is younger
    assert from_dict(TrainConfig, former) == today
    with pytest.raises(ValueError, match="run has no field"):
        from_dict(TrainConfig, {**to_dict(today), "run": {"seed": 1}})


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("demo").model.join = "basic"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig("deit_tiny")  # type: ignore[misc]


# --- command line ---------------------------------------------------------------------------------------------


def test_overrides_are_typed() -> None:
    words = "demo --model.join basic --optim.lr=2e-3 --optim.clip_norm none --data.crop_scale 0.5,1"
    words += " --run.overwrite true"
    made = parse(words.split(), description="")
    assert (made.model.join, made.optim.lr, made.optim.clip_norm) == ("basic", 2e-3, None)
    assert (made.data.crop_scale, made.run.overwrite) == ((0.5, 1.0), True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demoo", "recipe 'demoo' is not known"),
        ("demo --optim.lrr 3", "--optim.lrr is no option; did you mean --optim.lr"),
        (
            "demo --model.join lapee",
            "join='lapee' is not known; choose one of basic, share, unshare, lape, lape_shared",
        ),
        ("demo --optim.epochs 1.5", "'1.5' must be a whole number"),
        ("demo --run.overwrite maybe", "'maybe' must be true or false"),
        ("demo --data.crop_scale 0.5", "must be 2 values with commas between"),
        ("demo --run.num_workers 3", "does not divide by run.num_workers=3"),
        ("", "the following arguments are required: recipe"),
    ],
)
def test_bad_words_end_with_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(words.split(), description="")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_dump_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["demo", "--optim.epochs", "7", "--dump"], description="")
    assert end.value.code == 0
    assert "optim.epochs = 7\n" in capsys.readouterr().out


def test_a_jobs_options_and_the_configs_are_parsed_apart() -> None:
    parser = ConfigParser(usage="")
    parser.add_argument("--top", type=int, default=5)
    assert parser.parse_job(["--optim.epochs", "7"]) == ({"top": 5}, {"optim.epochs": 7})
    assert parser.parse_job(["--top=1"]) == ({"top": 1}, {})


@pytest.mark.parametrize(
    ("before", "code"), [("", 2), ("sys.ps1 = '> '", 0)], ids=["a job", "a person types"]
)
def test_a_job_ends_its_process_with_its_code_where_no_person_types(before: str, code: int) -> None:
    lines = f"import sys\nfrom lape_ray.cli import run_job\n{before}\ntry: run_job(lambda: 2)\nexcept SystemExit: pass"
    assert subprocess.run([sys.executable, "-c", lines]).returncode == code


def test_a_job_within_a_test_leaves_the_tests_their_exit_code() -> None:
    lines = "from helpers.commands import run_here\nassert run_here('jobs/evaluate.py', '--nonsense').returncode == 2"
    where = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    assert subprocess.run([sys.executable, "-c", lines], cwd=ROOT, env=where).returncode == 0


def test_jobs_hold_no_logic() -> None:
    """A job parses, calls and prints; what it calls lies in a room, where tests reach it."""
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "jobs").glob("*.py")}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 40} == {}


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("*.py")))
def test_help_is_instant_and_needs_no_heavy_import(job: str) -> None:
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'ffcv', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "jobs" / job)], capture_output=True, text=True
        )
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout
        if times[-1] < 1:
            return  # once is enough: the machine may have been busy
    raise AssertionError(f"--help took {min(times):.1f} s")
