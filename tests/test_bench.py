"""The benchmark: that it runs end to end, says what is missing, refuses wrong pixels and judges what it measured."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_works import broken, hidden
from PIL import Image

from lape_ray.bench import decoder, feeding, fresh, inputs, isolated, targets
from lape_ray.bench.contenders import FFCV, OURS, PILLOW, TORCHVISION, Job, works
from lape_ray.bench.gate import WrongPixelsError, compare, decoder_gate, loader_gate
from lape_ray.bench.loader_report import targets_table
from lape_ray.bench.record import ratio, spread
from lape_ray.bench.settings import Settings
from lape_ray.bench.table import middle, table
from lape_ray.data import native
from lape_ray.data.augment import Augment, AugmentSpec, build_augment

ROOT = Path(__file__).resolve().parent.parent
SIDE, BATCH = 32, 8


@pytest.fixture(scope="module")
def files() -> tuple[bytes, ...]:
    return inputs.read_images(None, count=decoder.CHUNK, shrink=0.3).files


@pytest.fixture(scope="module")
def job(files: tuple[bytes, ...], tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("bench")
    marked = [native.add_restart_markers(data) for data in files]
    return Job(inputs.store("few", marked, folder, samples=2 * BATCH), SIDE, BATCH, 2, "cpu")


# ---- images


def test_drawn_photographs_are_the_same_each_time() -> None:
    first, again = (inputs.read_images(None, count=4) for _ in range(2))
    assert first == again
    assert len(set(first.files)) == 4
    assert "drawn" in first.origin and "no photographs" in first.origin


def test_drawn_photographs_cost_what_imagenets_do() -> None:
    """ImageNet's files have 0.5 to 0.6 bytes a pixel and about 0.2 megapixels."""
    drawn = [inputs.draw_photograph(index) for index in range(40)]
    pixels = [int(np.prod(Image.open(io.BytesIO(data)).size)) for data in drawn]
    assert 0.45 < sum(map(len, drawn)) / sum(pixels) < 0.65
    assert 0.15e6 < np.mean(pixels) < 0.25e6


def test_images_of_a_source_are_spread_over_it_and_made_rgb_jpegs(tmp_path: Path) -> None:
    for number in range(9):
        folder = tmp_path / f"class{number}"
        folder.mkdir()
        Image.new(
            "L" if number == 4 else "RGB", (80, 60), 28 * number if number == 4 else (28 * number,) * 3
        ).save(folder / "x.jpg")
    images = inputs.read_images(str(tmp_path), count=3)
    assert "1 of them encoded anew" in images.origin
    levels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean() for data in images.files]
    assert levels == pytest.approx([0, 112, 224], abs=2)
    with pytest.raises(ValueError, match="is not a folder"):
        inputs.read_images(str(tmp_path / "nothing"), count=3)


# ---- the gate


def test_gate_passes_equal_pixels(files: tuple[bytes, ...], job: Job) -> None:
    rows = [*decoder_gate(files, SIDE), loader_gate(job.stored, SIDE, BATCH)]
    assert len(rows) == 5
    assert all(row["max_error"] <= 1 and row["images"] >= BATCH for row in rows)


def test_gate_refuses_wrong_pixels(
    files: tuple[bytes, ...], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = native.Decoder.decode_batch

    def wrong(self: native.Decoder, *arguments: Any, **options: Any) -> Any:
        statuses_B = right(self, *arguments, **options)
        out_BHW3 = arguments[8]
        out_BHW3[-1] = out_BHW3[-1, ::-1].copy()  # one image upside down
        return statuses_B

    monkeypatch.setattr(native.Decoder, "decode_batch", wrong)
    with pytest.raises(WrongPixelsError, match=r"decoder, original: our pixels are not Pillow's"):
        decoder_gate(files, SIDE)
    with pytest.raises(WrongPixelsError, match=r"loader, few.*nothing was timed"):
        loader_gate(job.stored, SIDE, BATCH)


def test_gate_refuses_a_single_wrong_pixel_and_allows_rounding() -> None:
    ours, theirs = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    ours[0, 0, 0, 0] = 1
    assert compare(ours, theirs, "x")["max_error"] == 1
    ours[0, 0, 0, 0] = 5
    with pytest.raises(WrongPixelsError, match=r"largest 5 of 255, worst image 0 of 2"):
        compare(ours, theirs, "x")


# ---- measuring


def test_decoder_rows(files: tuple[bytes, ...]) -> None:
    """Every decoder runs on every input it is meant for."""
    pytest.importorskip("ffcv")
    rows = decoder.decoder_benchmark(files, side=SIDE, rounds=2, threads=2)
    assert {row["name"] for row in rows} == set(decoder.DECODERS)
    assert len(rows) == 4 * 2 + 2 * (len(decoder.DECODERS) - 2)
    for row in rows:
        assert 0 < row["cpu_ms_quiet"] <= row["cpu_ms"]["low"] <= row["cpu_ms"]["median"]
        assert row["images_per_second"]["low"] > 0 and row["bytes"] > 0
    with pytest.raises(ValueError, match="3 files"):
        decoder.decoder_benchmark(files[:3])


def test_a_missing_decoder_is_said(files: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv.libffcv", None)
    rows = decoder.decoder_benchmark(files, side=SIDE, rounds=1, threads=1)
    (missing,) = [row for row in rows if row["name"] == "ffcv core"]
    assert "ffcv" in missing["missing"]


def test_processes_tell_samples_and_what_is_missing() -> None:
    found = isolated.rounds_of({"group": (hidden, None)}, 2, lambda text: None)
    samples = found["works"]
    assert not isinstance(samples, str)
    assert [sample.images for sample in samples] == [11, 12]
    assert all(sample.cpu_s >= 0 and sample.wall_s > 0 for sample in samples)
    assert found["missing"] == "not installed: No module named 'peer'"
    assert found["cannot"] == "cannot run: its buffers take 99 GB"


def test_a_failure_in_a_process_is_raised_here() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)group failed.*by design"):
        isolated.rounds_of({"group": (broken, None)}, 1, lambda text: None)


@pytest.mark.parametrize("contender", [OURS, TORCHVISION, PILLOW])
def test_contenders_deliver_whole_epochs(contender: str, job: Job) -> None:
    (work,) = works({"x": (contender, job)}).values()
    assert [work(number) for number in range(2)] == [2 * BATCH] * 2


def test_ffcvs_missing_loader_is_an_import_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    (work,) = works({"x": (FFCV, job)}).values()
    with pytest.raises(ImportError, match="ffcv"):
        work(0)
    assert fresh._first_batch(FFCV, job, 0.0) == pytest.approx("not installed: import of ffcv.loader halted; "
                                                               "None in sys.modules")  # fmt: skip


def test_augmentations_that_differ_are_not_timed() -> None:
    def augment(seed: int) -> Augment:
        spec = AugmentSpec(rand_augment="rand-m9-mstd0.5-inc1")
        return build_augment(spec, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, seed=seed)

    images = torch.arange(16 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(16, 3, 32, 32)
    feeding._refuse_other_images({True: augment(0), False: augment(0)}, images)
    with pytest.raises(RuntimeError, match="of the fused augmentation are not those of the operators"):
        feeding._refuse_other_images({True: augment(0), False: augment(1)}, images)


def test_augmentation_and_fed_training_on_the_cpu(job: Job) -> None:
    """The code that a GPU runs, at sizes of a CPU; only how time is taken differs there."""
    from lape_ray.config import replace_fields

    row = feeding.augmentation(job.stored, side=SIDE, batch_size=BATCH, device="cpu", rounds=2)
    assert row["device_us"]["low"] > 0 and row["host_us"]["low"] > 0
    config = feeding.training_config("deit_tiny", job.stored, side=SIDE, batch_size=BATCH, threads=1)
    assert config.data.rand_augment and config.data.mixup and config.data.train == job.stored.beton
    small = {"model.embed_dim": 24, "model.num_heads": 3, "model.depth": 1, "optim.epochs": 10}
    trained = feeding.fed_training(
        replace_fields(config, small), device="cpu", rounds=2, round_s=0.1, note=lambda text: None
    )
    assert trained["name"] == "deit_tiny_lape" and trained["batch_size"] == BATCH
    assert trained["fed_over_synthetic"]["rounds"] == pytest.approx(
        [a / b for a, b in zip(trained["fed"]["rounds"], trained["synthetic"]["rounds"], strict=True)]
    )


# ---- values, tables and targets


def test_spread_and_ratio() -> None:
    assert spread([3, 1, 8]) == {"median": 3, "low": 1, "high": 8, "rounds": [3, 1, 8]}
    assert ratio(spread([3, 8]), spread([1, 4]))["rounds"] == [3, 2]
    with pytest.raises(ValueError, match="no rounds"):
        spread([])


def test_table_is_aligned() -> None:
    text = table("Title", ["name", "value"], [["a", middle(spread([1.0, 2.0]))], ["500px", None], ["b", 12]])
    assert text.splitlines() == [
        "Title",
        "name                 value",
        "-----  -------------------",
        "a      1.50 (1.00 to 2.00)",
        "500px",
        "b                       12",
    ]
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table("Title", ["name", "value"], [["a"]])


def test_targets_are_judged_from_the_rows() -> None:
    name = inputs.SMALL_JPEG
    sections: dict[str, list[dict[str, Any]]] = {
        "loader": [
            {"name": FFCV, "input": name, "cpu_over_ours": spread([1.7, 1.81, 2.0])},
            {"name": TORCHVISION, "input": name, "cpu_over_ours": spread([1.59])},
            {"name": PILLOW, "input": name, "missing": "not installed: PIL"},
        ],
        "memory": [{"peak_bytes": 999 * 10**6, "epochs_growth_bytes": 51 * 10**6, "exits_growth_bytes": -5,
                    "threads_left": 1}],
        "scaling": [{"threads": 1, "over_one": spread([1.0])}, {"threads": 2, "over_one": spread([1.95])}],
    }  # fmt: skip
    met = {row["name"]: row["met"] for row in targets.judge(sections, targets.TARGETS)}
    assert list(met.values()) == [True, False, None, None, None, None, True, True, False, True, False, None]
    text = targets_table(targets.judge(sections, targets.TARGETS))
    assert f"{name}: CPU time of stock ffcv over ours" in text and "1.81  pass" in text
    assert "not measured (not installed: PIL)" in text and "not measured (not run)" in text
    assert text.count("miss") == 3


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds=0 must be 1 or more"):
        Settings(rounds=0)


# ---- the job


@pytest.fixture(scope="module")
def without_ffcv(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which ffcv cannot be imported."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "ffcv.py").write_text("raise ImportError('ffcv is hidden')\n")
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


def benchmark(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "benchmark.py"), "loader", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def check_record(record: dict[str, Any], *, missing: set[str]) -> None:
    assert record["schema"] == 1 and record["benchmark"] == "loader"
    assert {"started", "ended", "machine", "versions", "commit", "load_average", "settings"} < set(record)
    assert len(record["load_average"]["start"]) == len(record["load_average"]["end"]) == 3
    assert "drawn" in record["images"]["origin"]
    sections = record["sections"]
    assert {name for name, rows in sections.items() if rows} == {
        "gate", "decoder", "loader", "scaling", "memory", "startup", "augmentation",
    }  # fmt: skip
    names = [row["name"] for row in sections["loader"]]
    assert names == [OURS, f"{OURS}, again", f"{OURS}, no markers", FFCV, TORCHVISION, PILLOW]
    assert {row["name"] for row in sections["loader"] if "missing" in row} == missing
    assert [row["threads"] for row in sections["scaling"]] == [1, 2]
    assert {row["name"] for row in record["targets"]} == {target.name for target in targets.TARGETS}


@pytest.mark.slow
def test_quick_run_without_ffcv(tmp_path: Path, without_ffcv: dict[str, str]) -> None:
    done = benchmark(
        "--quick", "--threads", "2", "--json", str(tmp_path / "x.json"), environment=without_ffcv
    )
    assert done.returncode == 0, done.stderr
    check_record(json.loads((tmp_path / "x.json").read_text()), missing={FFCV})
    assert done.stdout.count("not installed: ffcv is hidden") >= 3  # decoder, loader, start-up
    assert done.stdout.splitlines()[-1].startswith("start of a process")


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    done = benchmark(
        "--quick", "--threads", "2", "--json", str(tmp_path / "x.json"), environment=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    check_record(json.loads((tmp_path / "x.json").read_text()), missing=set())


def test_bad_input_is_one_line(without_ffcv: dict[str, str]) -> None:
    done = benchmark("--rounds", "0", environment=without_ffcv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: rounds=0 must be 1 or more\n"
