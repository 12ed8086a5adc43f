"""The benchmarks: nothing is timed that computes something else, what is missing is said, and records are kept."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import candidates
import common
import gpu
import loader
import numpy as np
import pytest
import torch
import train_step
from common import Column, Record, spread
from helpers.installed import needs_ffcv
from helpers.s3_server import access, gateway
from loader import Job, Stored, WrongPixelsError, check_pixels, compare_pixels, draw_photograph, read_images
from PIL import Image
from torch import nn
from train_step import Run, Stepper, WrongMathsError, check_parity, synthetic_state, training_config

from lape_ray.config import DataConfig, TrainConfig, replace_fields
from lape_ray.data import native
from lape_ray.data.augment import Augment, build_augment
from lape_ray.model import build_model
from lape_ray.storage import objects, s3

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SIDE, BATCH = 32, 8


def quiet(text: str) -> None: ...


# ---- rounds, records, tables


def test_rounds_go_there_and_back_and_say_what_is_missing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    makers = {"one": candidates.writes, "missing": candidates.is_missing, "cannot": candidates.cannot_run,
              "other": candidates.writes}  # fmt: skip
    rows = common.interleaved({name: (make, (name, log)) for name, make in makers.items()}, 2, quiet)
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == list(makers)
    assert by_name["missing"]["missing"] == "not installed: No module named 'peer'"
    assert by_name["cannot"]["missing"] == "cannot run: its buffers take 99 GB"
    for name in ("one", "other"):
        assert by_name[name]["fact"] == 7
        assert len(by_name[name]["images_per_second"]["rounds"]) == 2
    assert log.read_text().split() == ["one:0", "other:0", "one:lead", "one:1", "other:lead", "other:1",
                                       "other:lead", "other:2", "one:lead", "one:2"]  # fmt: skip


def test_a_candidate_that_refuses_stops_all_before_anything_is_timed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    makers = {
        "right": (candidates.writes, ("right", log)),
        "wrong": (candidates.computes_something_else, log),
    }
    with pytest.raises(RuntimeError, match=r"(?s)wrong failed.*its logits differ by design"):
        common.interleaved(makers, 3, quiet)
    assert log.read_text().split() == ["right:0"]  # the warm-up


def test_ratios_are_of_rounds() -> None:
    rows = [
        {"name": "a", "t": spread([3, 8])},
        {"name": "b", "t": spread([1, 4])},
        {"name": "c", "missing": "x"},
    ]
    common.add_ratios(rows, {"a": "b", "b": "c", "c": "a"}, "t")
    assert rows[0]["of"] == "b" and rows[0]["over"]["rounds"] == [3, 2]
    assert "over" not in rows[1] and "over" not in rows[2]
    with pytest.raises(ValueError, match="no rounds"):
        spread([])


def test_a_record_is_on_the_disk_after_each_addition(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "record.json"
    record = Record("x", {"path": path, "n": 1}, path=path)
    for count in (1, 2):
        record.add("rows", [{"name": "a"}])
        kept = json.loads(path.read_text())
        assert len(kept["sections"]["rows"]) == count
    assert {"started", "ended", "machine", "versions", "commit", "load_average"} < set(kept)
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.add("rows", [{"nan": float("nan")}])
    assert len(json.loads(path.read_text())["sections"]["rows"]) == 2


def test_a_table_is_aligned() -> None:
    columns = [Column("name", "name"), Column("value", "value", ".1f", 10), Column("nothing", "nothing")]
    rows = [{"name": "a", "value": spread([1.0, 2.0])}, {"name": "long", "missing": "not installed"},
            {"name": "b", "value": 3}]  # fmt: skip
    assert common.table("Title", columns, rows).splitlines() == [
        "Title",
        "name                value",
        "----  -------------------",
        "a     15.0 (10.0 to 20.0)",
        "long                       not installed",
        "b                    30.0",
    ]


# ---- the training step


def toy(candidate: str = "basic", mode: str = "eager", model: str = "toy") -> Run:
    return Run(model, 4, candidate, mode, "cpu", 1, 1)


def toy_config(**fields: Any) -> TrainConfig:
    return training_config("toy", join="basic", batch_size=4, **fields)


@pytest.mark.parametrize(
    ("model", "candidate"),
    [("toy", name) for name in train_step.CANDIDATES] + [("toy_swin", name) for name in ("timm", "lape")],
)
def test_candidates_compute_the_same_from_the_same_weights(model: str, candidate: str) -> None:
    run, wanted = toy(candidate, model=model), toy(model=model).state(CPU)
    row = check_parity(run, CPU)
    assert row["logits"] < 1e-5 and row["gradient"] < 1e-4
    state = run.state(CPU)
    if candidate != "lape" and candidate not in train_step.EMBEDDINGS:
        found = state.network.state_dict()
        for name, value in run.renamed(wanted.network.state_dict()).items():
            assert torch.equal(found[name], value), name
        sizes = [
            [(g["weight_decay"], sum(p.numel() for p in g["params"])) for g in each.optimizer.param_groups]
            for each in (state, wanted)
        ]
        assert sizes[0] == sizes[1]


def wrong_eps(config: TrainConfig) -> nn.Module:
    network = train_step.ours(config)
    network.blocks[1].norm2.eps = 1e-2
    return network


def frozen(config: TrainConfig) -> nn.Module:
    network = train_step.ours(config)
    network.head.bias.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (wrong_eps, r"timm/eager computes something else.*nothing was timed"),
        (frozen, r"head\.bias got no gradient"),
    ],
)
def test_a_wrong_network_is_refused(network: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` raises, and so nothing is timed: see above."""
    monkeypatch.setitem(train_step.CANDIDATES, "timm", network)
    with pytest.raises(WrongMathsError, match=message):
        train_step.prepare(toy("timm"))


def test_no_number_is_refused() -> None:
    row = {"precision": "fp32", "logits": float("nan"), "gradient": 0.0, "worst": "head.bias"}
    with pytest.raises(WrongMathsError, match="logits differ by nan"):
        train_step.refuse_wrong("x", row)


def test_replayed_steps_that_learn_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(config: TrainConfig, device: torch.device, seed: int = 0) -> Any:
        other = {"run.cuda_graph": False, "training.seed": seed if config.run.cuda_graph else 0}
        found = synthetic_state(replace_fields(config, other), device)
        found.network.load_state_dict(start)
        return found

    start = build_model(toy_config().model).state_dict()
    monkeypatch.setattr(train_step, "synthetic_state", state)
    assert train_step.check_replays(toy_config(), CPU) == 0
    monkeypatch.setattr(train_step, "synthetic_state", partial(state, seed=1))
    with pytest.raises(WrongMathsError, match=r"replayed steps end \d\.\d+ of the way"):
        train_step.check_replays(toy_config(), CPU)


def test_what_is_known_of_a_run_before_it_is_timed() -> None:
    made = train_step.prepare(toy("lape"))
    assert made.work(1) == 4
    assert made.facts["candidate"] == "lape" and made.facts["precision"] == "fp32"
    parameters = sum(p.numel() for p in build_model(toy_config().model).parameters())
    assert made.facts["step_bytes"] > 4 * parameters  # the gradients
    assert made.facts["train_flops"] > 6 * parameters and made.facts["first_step_s"] > 0


def test_operations_are_those_of_deit_tiny() -> None:
    """7.46 G with all tokens in the last block, of which ours computes the class token's: 6 % less."""
    config = training_config("deit_tiny", join="basic", batch_size=1)
    assert train_step.training_flops(train_step.ours(config), 224) == pytest.approx(7.04e9, rel=0.01)
    assert train_step.training_flops(train_step.timm(config), 224) == pytest.approx(7.46e9, rel=0.01)


def block_products(tokens: int, width: int, mlp: float, keys: int, queries: int | None = None) -> float:
    """Multiply-adds of a block's matrix products; keys, and values, are of all tokens."""
    queries = queries or tokens
    attention = 3 * tokens * width**2 + 2 * queries * keys * width + queries * width**2
    return attention + 2 * mlp * queries * width**2


def performer_products(tokens: int, given: int) -> tuple[float, float]:
    """Multiply-adds of a performer of width 64 with 32 features; those of its features are apart."""
    features = 2 * 64 * 32
    return tokens * (given * 3 * 64 + 2 * 32 * 64 + 32 + 3 * 64**2), tokens * features


def products_by_hand(model: str) -> float:
    """Multiply-adds of a forward and a backward pass, which takes twice the forward's where all gets a gradient."""
    if model == "swin_tiny":
        stages = [(3136 >> 2 * stage, 96 << stage, depth) for stage, depth in enumerate((2, 2, 6, 2))]
        blocks = sum(depth * block_products(tokens, width, 4, 49) for tokens, width, depth in stages)
        merging = sum(tokens / 4 * 8 * width**2 for tokens, width, _ in stages[:3])
        return 2 * 3136 * 48 * 96 + 3 * (blocks + merging + 768 * 1000)
    if model == "t2t_vit_7":
        blocks = 6 * block_products(197, 256, 2, 197) + block_products(197, 256, 2, 197, queries=1)
        (first, first_w), (second, second_w) = performer_products(3136, 147), performer_products(784, 576)
        trained = first + second + 196 * 576 * 256 + blocks + 256 * 1000
        return 3 * trained + 2 * (first_w + second_w)
    assert model == "ceit_tiny"
    stem, patches = 112**2 * 147 * 64, 196 * 16 * 64 * 192
    leff = 196 * (2 * 4 * 192**2 + 9 * 4 * 192)
    layers = block_products(12, 192, 4, 12, queries=1)
    blocks = 12 * (block_products(197, 192, 0, 197) + leff)
    return 2 * stem + 3 * (patches + blocks + layers + 192 * 1000)


@pytest.mark.parametrize("join", ["basic", "lape"])
@pytest.mark.parametrize("model", ["swin_tiny", "t2t_vit_7", "ceit_tiny"])
def test_operations_are_those_counted_by_hand(model: str, join: str) -> None:
    """Depthwise convolutions too; what LaPE computes once for a batch is of no image."""
    config = training_config(model, join=join, batch_size=2)
    found = train_step.training_flops(train_step.ours(config), 224)
    assert found == pytest.approx(2 * products_by_hand(model), rel=1e-3)


TINY: dict[str, dict[str, Any]] = {
    "cct": {"image_size": 16, "depth": 2, "embed_dim": 32},
    "t2t_vit_7": {"image_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "ceit_tiny": {"image_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "swin_tiny": {
        "image_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "depths": (2, 1, 1, 1),
        "embed_dim": 16,
        "num_heads": 2,
    },
}


@pytest.mark.parametrize("model", TINY)
def test_every_family_is_checked_and_timed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.MODELS, model, {**train_step.MODELS[model], **TINY[model]})
    for candidate in ("basic", "lape"):
        made = train_step.prepare(Run(model, 2, candidate, "eager", "cpu", 1, 1))
        assert made.work(1) == 2
        assert made.facts["logits"] < 1e-4 and made.facts["train_flops"] > 0 and made.facts["step_bytes"] > 0
    for peer in ("timm", "torchvision"):
        with pytest.raises(
            common.CannotRunError, match=r"only DeiT's network is built of it|timm's Swin has"
        ):
            train_step.prepare(Run(model, 2, peer, "eager", "cpu", 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_every_family_is_one_graph(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.MODELS, model, {**train_step.MODELS[model], **TINY[model]})
    assert train_step.prepare(Run(model, 2, "lape", "compiled", "cpu", 1, 1)).work(1) == 2


def test_memory_of_a_step_is_what_is_held_at_once() -> None:
    def run(steps: int) -> None:
        first = torch.zeros(2**20)
        del first
        second, third = torch.zeros(2**19), torch.zeros(2**18)
        assert len(second) > len(third)

    assert train_step.step_bytes(run, CPU) == 4 * 2**20


def test_steps_train_over_distinct_batches() -> None:
    stepper = Stepper(synthetic_state(toy_config(), CPU))
    first = [p.detach().clone() for p in stepper.state.network.parameters()]
    stepper.run(3)
    assert 1.5 < stepper.mean_loss() < 3.5  # ln 10
    assert any(not torch.equal(a, b) for a, b in zip(first, stepper.state.network.parameters(), strict=True))
    pairs = stepper.state.train_loader.loader.batches  # type: ignore[attr-defined]
    assert len({images.sum().item() for images, *_ in pairs}) == 4


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (train_step.parse_models, "deit_tiny"),
        (train_step.parse_models, "deit_huge:8"),
        (train_step.parse_candidates, "lape"),
        (train_step.parse_candidates, "timm/graph"),
        (train_step.check_device, "tpu"),
    ],
)
def test_options_that_mean_nothing_are_refused(parse: Any, text: str) -> None:
    with pytest.raises(ValueError, match=rf"--\w+ {text}"):
        parse(text)


# ---- the loader


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    files, _ = read_images(None, count=8)
    folder = tmp_path_factory.mktemp("bench")
    return loader.store(files, folder / "few", samples=2 * BATCH, kinds=("marked", "plain"))


def job(candidate: str, stored: Stored) -> Job:
    return Job(candidate, stored, SIDE, BATCH, 2, "cpu", "deit_tiny", 1)


def test_images_are_drawn_alike_or_spread_over_a_source(tmp_path: Path) -> None:
    assert draw_photograph(1) == draw_photograph(1) != draw_photograph(2)
    for number in range(9):
        folder = tmp_path / f"class{number}"
        folder.mkdir()
        level = 28 * number
        image = Image.new("L", (80, 60), level) if number == 4 else Image.new("RGB", (80, 60), (level,) * 3)
        image.save(folder / "x.jpg")
    files, origin = read_images(str(tmp_path), count=3)
    assert "1 encoded as RGB JPEG" in origin
    levels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean() for data in files]
    assert levels == pytest.approx([0, 112, 224], abs=2)


def test_pixels_are_compared_with_pillows(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    row = check_pixels(stored, SIDE, BATCH, "few")
    assert row["max_error"] <= 1 and row["images"] == BATCH
    right = native.Decoder.decode_batch

    def wrong(self: native.Decoder, *arguments: Any, **options: Any) -> Any:
        statuses_B = right(self, *arguments, **options)
        out_BHW3 = arguments[8]
        out_BHW3[-1] = out_BHW3[-1, ::-1].copy()  # one image upside down
        return statuses_B

    monkeypatch.setattr(native.Decoder, "decode_batch", wrong)
    with pytest.raises(WrongPixelsError, match=r"few: our pixels are not Pillow's.*nothing was timed"):
        check_pixels(stored, SIDE, BATCH, "few")


def test_a_single_wrong_pixel_is_refused_and_rounding_is_not() -> None:
    ours, theirs = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    ours[0, 0, 0, 0] = 1
    assert compare_pixels(ours, theirs, "x")["max_error"] == 1
    ours[0, 0, 0, 0] = 5
    with pytest.raises(WrongPixelsError, match=r"largest 5 of 255, worst image 0 of 2"):
        compare_pixels(ours, theirs, "x")


@pytest.mark.parametrize(
    "candidate", ["ours", "ours, no markers", "ours, one thread", "torchvision.io", "Pillow"]
)
def test_candidates_deliver_whole_epochs(candidate: str, stored: Stored) -> None:
    made = loader.prepare(job(candidate, stored))
    assert [made.work(number) for number in range(2)] == [2 * BATCH] * 2
    assert made.facts["threads"] == (1 if "one" in candidate else 2)


@needs_ffcv
def test_ffcvs_missing_loader_is_an_import_error(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(ImportError, match="ffcv"):
        loader.prepare(job("ffcv", stored))


def test_augmentations_that_differ_are_refused() -> None:
    def augment(seed: int) -> Augment:
        data = DataConfig(rand_augment="rand-m9-mstd0.5-inc1", mean=(0.5,) * 3, std=(0.25,) * 3)
        return build_augment(data, image_size=32, seed=seed)

    images = torch.arange(16 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(16, 3, 32, 32)
    loader.refuse_other_images(augment(0), augment(0), images)
    with pytest.raises(WrongPixelsError, match="of the fused augmentation are not the operators'"):
        loader.refuse_other_images(augment(0), augment(1), images)


def test_augmentation_on_the_cpu(stored: Stored) -> None:
    made = loader.prepare_augmentation(job("operators", stored))
    assert made.work(1) == loader.CALLS * BATCH


# ---- the command for a GPU


def test_the_plan_for_a_gpu_fits_into_nine_minutes() -> None:
    assert sum(part.expected_s for part in gpu.PARTS.values()) <= 60 * gpu.MINUTES <= 9 * 60 - gpu.GRACE_S
    assert next(iter(gpu.PARTS)) == "checks" and "--rounds 0" in gpu.PARTS["checks"].command
    for part in gpu.PARTS.values():
        script, *words = part.command.split()
        assert script in ("train_step.py", "loader.py")
        if script == "train_step.py":
            options = dict(zip(words[::2], words[1::2], strict=True))
            assert set(options) <= {"--rounds", "--models", "--candidates", "--steps"}
            train_step.parse_models(options["--models"])
            train_step.parse_candidates(options["--candidates"])


PART = """
import json, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
whole = Path({whole!r})
before = len(json.loads(whole.read_text())["sections"]["parts"]) if whole.exists() else 0
Path(options["--json"]).write_text(json.dumps({{"sections": {{"parts before": before}}}}))
time.sleep(60 if {slow} else 0)
sys.exit({code})
"""


def test_each_part_is_written_as_soon_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails or is cut off keeps none from running, and loses nothing that it had written."""
    whole = tmp_path / "gpu.json"
    (tmp_path / "benchmarks").mkdir()
    for name, (slow, code) in {"fails": (False, 3), "slow": (True, 0), "right": (False, 0)}.items():
        (tmp_path / "benchmarks" / f"{name}.py").write_text(
            PART.format(whole=str(whole), slow=slow, code=code)
        )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "GRACE_S", 0.1)
    monkeypatch.setattr(gpu, "MINUTES", 1)
    seconds = {"fails": 29, "slow": 4, "right": 29}
    parts = {name: gpu.Part(f"{name}.py", expected_s) for name, expected_s in seconds.items()}
    monkeypatch.setattr(gpu, "PARTS", parts)
    record = Record("gpu", {}, path=whole)
    assert not gpu.run_parts(list(parts), ["--device", "cpu"], 1, record)
    rows = json.loads(whole.read_text())["sections"]["parts"]
    assert [row["outcome"][:8] for row in rows] == ["failed w", "cut off ", "done"]
    assert [row["sections"]["parts before"] for row in rows] == [0, 1, 2]
    again = Record("gpu", {}, path=whole)
    assert gpu.run_parts(["right"], ["--device", "cpu"], 1, again)
    assert not gpu.run_parts(["right"], ["--device", "cpu"], 0, again)
    assert again.sections["parts"][-1]["outcome"] == "not begun: the time was over"


def test_a_gpu_machine_may_have_neither_ray_nor_ffcv() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'ffcv', 'boto3', 'joblib', 'pyarrow', 'numba', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import common, gpu, loader, seeds, train_step\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def smoke(script: str, *words: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--smoke", "--json", str(path), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smoke_of_the_training_step(tmp_path: Path) -> None:
    record = smoke(
        "train_step.py", "--candidates=basic/eager,timm/eager,lape/compiled", path=tmp_path / "x.json"
    )
    basic, timm, compiled = record["sections"]["train_step"]
    assert compiled["logits"] < 1e-5 and compiled["images_per_second"]["median"] > 0
    assert basic["of"] == "timm/eager" and basic["over"]["median"] > 0
    assert basic["step_bytes"] > 0 and basic["logits"] < 1e-5
    reached = timm["train_flops"] * timm["images_per_second"]["median"]
    assert timm["share"] == pytest.approx(reached / record["sections"]["matmul"][0]["flops"])


@needs_ffcv
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smoke_of_the_loader(tmp_path: Path) -> None:
    record = smoke("loader.py", "--threads=2", path=tmp_path / "x.json")
    rows = {row["name"]: row for row in record["sections"]["loaders"]}
    assert list(rows) == list(loader.CANDIDATES)
    assert all(row["cpu_ms"]["median"] > 0 for row in rows.values())


@pytest.mark.slow
def test_smoke_of_reading_from_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3").mkdir()
    with gateway(tmp_path / "s3") as server:
        for name, value in access(server.port, tmp_path).items():
            monkeypatch.setenv(name, value)
        s3.client().create_bucket(Bucket="lape")
        objects.put("s3://lape/large", os.urandom(3_000_000))
        record = smoke("s3_read.py", "s3://lape/large", path=tmp_path / "x.json")
    rows = {row["name"]: row for row in record["sections"]["s3_read"]}
    assert list(rows) == ["lape_ray", "boto3", "boto3[crt]", "lape_ray again"]
    assert all(row["images_per_second"]["median"] > 0 for row in rows.values() if "missing" not in row)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smoke_of_the_command_for_a_gpu(tmp_path: Path) -> None:
    record = smoke("gpu.py", "--device=cpu", "--minutes=60", path=tmp_path / "x.json")
    rows = {row["name"]: row for row in record["sections"]["parts"]}
    assert list(rows) == list(gpu.PARTS)
    assert all("images_per_second" not in row for row in rows["checks"]["sections"]["train_step"])
    assert all("images_per_second" in row for row in rows["deit_small"]["sections"]["train_step"])
    assert rows["data"]["sections"]["training"][2]["of"] == "one batch"
