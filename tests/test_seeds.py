"""Whole trainings with several seeds: what is trained, what is written down, what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import seeds
from common import Record
from seeds import FIRST_SEED, configs, parse, report, shortened

from lape_ray.data.sources import digits, open_source
from lape_ray.recipes import recipe

ROOT = Path(__file__).parent.parent
TINY = {"model.patch_size": 16, "model.embed_dim": 16, "model.depth": 1, "model.num_heads": 1, "data.threads": 1,
        "data.rand_augment": "none", "data.upscale": True}  # fmt: skip


def test_a_shortened_schedule_keeps_its_shares() -> None:
    whole = recipe("vit_lite_7_4_lape")
    short = shortened(whole, 30)
    assert (short.optim.epochs, short.optim.warmup_epochs, short.optim.cooldown_epochs) == (30, 1, 1)
    assert short.data.mix_off_epoch == 18  # of 30, as 175 of 300
    assert shortened(whole, 300) == whole


def test_recipes_are_paired_by_seed(tmp_path: Path) -> None:
    found = configs(parse(["digits", "--seeds=3", "--optim.lr=1e-3"]), tmp_path)
    assert [(config.recipe, config.training.seed) for config in found] == [
        (name, seed) for seed in (121, 122, 123) for name in ("vit_lite_7_4_basic", "vit_lite_7_4_lape")
    ]
    assert {config.optim.lr for config in found} == {1e-3}
    assert {config.data.backend for config in found} == {"resident"}


def test_steps_are_graphs_on_a_gpu_where_they_can_be(tmp_path: Path) -> None:
    def graphs(*words: str) -> list[bool]:
        options = parse(["digits", "--seeds=1", "--recipes=demo,vit_lite_fast", *words])
        return [config.run.cuda_graph for config in configs(options, tmp_path)]

    assert graphs("--device=cuda") == [False, True]  # the demo has two workers
    assert graphs("--device=cuda", "--run.cuda_graph=false") == graphs() == [False, False]


def test_options_that_mean_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="'vit_lite' is not known"):
        parse(["digits", "--recipes=vit_lite"])
    with pytest.raises(SystemExit):
        parse(["digits", "--seeds=0"])
    assert "--seeds: '0' must be a whole number of at least 1" in capsys.readouterr().err


def test_what_is_held_out_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path))
    folder = seeds.write_splits(parse(["digits", "--holdout=200"]))
    held, trained = (open_source(str(folder / f"{split}.beton")) for split in ("val", "train"))
    assert (len(held), len(trained)) == (200, len(digits("train")) - 200)
    images = {
        source: {source.read(index).tobytes() for index in range(len(source))} for source in (held, trained)
    }
    # Some digits were written down twice in the data set itself.
    assert len(images[held] & images[trained]) < 5


def test_the_table_pairs_seeds() -> None:
    """The difference is over the two seeds that both have: 1.0 and 2.0; t(1) is 12.706."""
    record = Record("seeds", vars(parse(["digits"])), path=None)
    accuracies = {"vit_lite_7_4_basic": [90.0, 91.0], "vit_lite_7_4_lape": [91.0, 93.0, 95.0]}
    record.sections["runs"] = [
        {"recipe": name, "seed": FIRST_SEED + index, "acc1": value, "epochs": 300, "seconds": 10.0 + index}
        for name, values in accuracies.items()
        for index, value in enumerate(values)
    ]
    text = report(record)
    basic, lape = text.splitlines()[-2:]
    assert basic.split() == ["vit_lite_7_4_basic", "2", "90.50", "0.71", "10"]
    assert lape.split() == ["vit_lite_7_4_lape", "3", "93.00", "2.00", "+1.50", "-4.85", "to", "+7.85", "11"]
    assert "Top-1 on the split test after the last of 300 epochs" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_record_that_was_cut_off_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two trainings at once, then one seed more, and the first are not trained again."""
    command = [
        "seeds.py",
        "digits",
        "--test=val",
        "--epochs=1",
        "--at-once=2",
        f"--json={tmp_path / 'x.json'}",
    ]
    command += [f"--{name}={value}" for name, value in TINY.items()]
    monkeypatch.setenv("LAPE_RAY_HOME", str(tmp_path))

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", [*command, *words])
        seeds.main()
        return capsys.readouterr().err

    run("--seeds=1")
    before = json.loads((tmp_path / "x.json").read_text())["sections"]["runs"]
    assert [row["seed"] for row in before] == [121, 121]
    assert {row["recipe"] for row in before} == {"vit_lite_7_4_basic", "vit_lite_7_4_lape"}
    assert all(len(row["acc1_by_epoch"]) == 1 for row in before)
    second = run("--seeds=2")
    after = json.loads((tmp_path / "x.json").read_text())["sections"]["runs"]
    assert after[:2] == before
    assert [row["seed"] for row in after[2:]] == [122, 122]
    assert "3 of 4: vit_lite_7_4" in second
    with pytest.raises(ValueError, match="holds trainings with another overrides"):
        run("--seeds=2", "--optim.lr=1")
