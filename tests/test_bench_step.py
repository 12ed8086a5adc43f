"""The benchmarks of the training step: what they count, what they refuse, and that every subcommand runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lape_ray import checkpoint
from lape_ray.bench import (
    ceilings,
    clock,
    commands,
    compare,
    counts,
    maths,
    orchestration,
    peers,
    saving,
    suite,
)
from lape_ray.bench import step as step_module
from lape_ray.bench.goals import compare_targets, ray_targets, step_targets
from lape_ray.bench.maths import WrongMathsError, gate
from lape_ray.bench.peers import AGAIN, BASIC, EXPLICIT, LAPE, TIMM, TORCHVISION, Arm, arm_state
from lape_ray.bench.step import Settings
from lape_ray.bench.step_report import checkpoint_report, compare_report, ray_report, step_report
from lape_ray.bench.synthetic import Stepper, synthetic_state, training_config
from lape_ray.bench.targets import judge
from lape_ray.config import ModelConfig, TrainConfig, replace_fields
from lape_ray.model import build_model, resolve
from lape_ray.training.recompute import optimise_blocks

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TOY = Settings(quick=True, compile="off")


def toy(**fields: Any) -> TrainConfig:
    return training_config("toy", join="basic", batch_size=4, **fields)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(variant="deit_tiny", depth=2),
        ModelConfig(variant="deit_tiny_distilled", depth=1, image_size=64),
        training_config("vit_lite", join="basic", batch_size=1, depth=3).model,
    ],
    ids=["deit", "distilled", "vit_lite"],
)
def test_flops_are_those_that_torch_counts(config: ModelConfig) -> None:
    network = optimise_blocks(build_model(config))
    spec = resolve(config)
    # A fused kernel counts what backward computes again.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(torch.rand(2, 3, spec.image_size, spec.image_size)).sum().backward()
    assert counter.get_total_flops() == 2 * ceilings.training_flops(spec)


def test_flops_of_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="convolutions"):
        ceilings.training_flops(resolve(ModelConfig(variant="cct_7_3x1")))


def test_rounds_go_there_and_back() -> None:
    order: list[str] = []
    works = {name: lambda steps, name=name: order.extend([name] * steps) for name in "AB"}  # type: ignore[misc]
    found = clock.interleaved(works, rounds=2, steps=2, device=CPU)
    assert "".join(order) == "AABBBBAA" * 2
    assert {name: len(windows) for name, windows in found.items()} == {"A": 2, "B": 2}


def test_peak_counts_what_is_held_at_once() -> None:
    def run(steps: int) -> None:
        first = torch.zeros(2**20)
        del first
        second, third = torch.zeros(2**19), torch.zeros(2**18)
        assert len(second) > len(third)

    assert counts.peak_bytes(run, CPU, kept=7) == 4 * 2**20 + 7


def test_kept_bytes_are_weights_average_and_moments() -> None:
    stepper = Stepper(synthetic_state(toy(), CPU))
    stepper.run(1)
    parameters = sum(p.numel() for p in stepper.state.network.parameters())
    tensors = len(list(stepper.state.network.parameters()))
    assert step_module.kept_bytes(stepper.state) == 4 * (4 * parameters + tensors)  # a count of steps each


def test_stepper_trains_over_distinct_batches() -> None:
    stepper = Stepper(synthetic_state(toy(), CPU))
    first = [p.detach().clone() for p in stepper.state.network.parameters()]
    stepper.run(3)
    assert stepper.done == 3
    assert 1.5 < stepper.mean_loss() < 3.5  # ln 10
    assert any(not torch.equal(a, b) for a, b in zip(first, stepper.state.network.parameters(), strict=True))
    pairs = stepper.state.train_loader.pairs  # type: ignore[attr-defined]
    assert len({images.sum().item() for images, _ in pairs}) == len(pairs) == 4


def test_all_arms_start_from_the_same_weights() -> None:
    weights = {
        kind: arm_state(Arm(kind), toy(), CPU).network.state_dict()
        for kind in (BASIC, AGAIN, EXPLICIT, TIMM, TORCHVISION)
    }
    for kind, found in weights.items():
        for name, value in weights[BASIC].items():
            assert torch.equal(found[Arm(kind).parameter_name(name)], value), (kind, name)


def test_all_arms_decay_the_same_parameters() -> None:
    sizes = set()
    for kind in (BASIC, TIMM, TORCHVISION):
        groups = arm_state(Arm(kind), toy(), CPU).optimizer.param_groups
        sizes.add(tuple((g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups))
    assert len(sizes) == 1


def test_gate_lets_equals_through() -> None:
    arms = [Arm(kind) for kind in (BASIC, LAPE, TIMM, TORCHVISION, EXPLICIT)]
    rows = gate(arms, toy(), CPU)
    assert [row["name"] for row in rows] == [arm.name for arm in arms]
    assert all(row["logits"] < 1e-5 and row["gradient"] < 1e-4 for row in rows)
    assert {row["parameters"] for row in rows if row["name"] != Arm(LAPE).name} == {
        len(list(build_model(toy().model).parameters()))
    }


def test_gate_refuses_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(config: TrainConfig) -> nn.Module:
        network = peers._ours(config)
        network.blocks[1].norm2.eps = 1e-2
        return network

    monkeypatch.setitem(peers._MAKERS, TIMM, wrong)
    with pytest.raises(WrongMathsError, match=r"timm, eager computes something else.*nothing was timed"):
        gate([Arm(BASIC), Arm(TIMM)], toy(), CPU)


def test_gate_refuses_nan_and_missing_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"name": "x", "logits": float("nan"), "gradient": 0.0, "worst": "head.bias"}
    with pytest.raises(WrongMathsError, match="logits differ by nan"):
        maths._check(row, 1.0, 1.0)

    def frozen(config: TrainConfig) -> nn.Module:
        network = peers._ours(config)
        network.head.bias.requires_grad_(False)
        return network

    monkeypatch.setitem(peers._MAKERS, TIMM, frozen)
    with pytest.raises(WrongMathsError, match=r"head\.bias got no gradient"):
        gate([Arm(TIMM)], toy(), CPU)


def test_a_failing_gate_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths, "TOLERANCE", {"fp32": (0.0, 0.0)})
    monkeypatch.setattr(compare, "timed", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongMathsError):
        compare.run(TOY, lambda text: None)


def test_compare_without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is a row that says so, and a target over it is neither passed nor missed."""
    for name in ("timm", "timm.models", "timm.models.vision_transformer"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(compare.isolated, "call", lambda function, *arguments: function(*arguments))
    saved: list[int] = []
    record = compare.run(TOY, lambda text: None, lambda record: saved.append(len(record["targets"])))
    rows = {row["name"]: row for row in record["sections"]["compare"]}
    assert "not installed" in rows[Arm(TIMM).name]["missing"]
    assert rows[Arm(BASIC).name]["images_per_second"]["median"] > 0
    pairs = {(row["over"], row["under"]): row for row in record["sections"]["ratios"]}
    assert "not installed" in pairs[Arm(BASIC).name, Arm(TIMM).name]["missing"]
    assert pairs[Arm(AGAIN).name, Arm(BASIC).name]["ratio"]["median"] > 0
    memory = {row["name"]: row["over_explicit"] for row in record["sections"]["memory_ratios"]}
    assert memory[Arm(BASIC).name] < 1
    assert all(row["met"] is None for row in record["targets"])
    assert len(saved) == 1 + len(compare.memory_arms(TOY))
    text = compare_report(json.loads(json.dumps(record)))
    assert "not installed: import of timm" in text
    assert "not measured" in text


def test_step_row_and_report() -> None:
    peaks = ceilings.measured_peaks(CPU, rounds=1, quick=True)
    row = step_module.measured(TOY.filled(), step_module.Entry("toy", 4, "off"), peaks)
    assert row["operators"] > 100
    assert row["parameters"] == sum(p.numel() for p in build_model(toy().model).parameters()) + 4 * 32
    assert row["peak_bytes"] > 16 * row["parameters"]
    assert row["images_per_second"]["median"] == pytest.approx(4 / row["step_s"]["median"])
    reached = row["train_flops"] * row["images_per_second"]["median"]
    assert row["mfu_measured"] == pytest.approx(reached / peaks["matmul_flops"]["median"])
    assert row["mfu_datasheet"] is None
    record = step_module.begin("step", dataclasses.asdict(TOY.filled()))
    record["sections"] = {"ceilings": [peaks], "step": [row, {**row, "missing": "not run: over"}]}
    step_module.finish(record)
    assert "not run: over" in step_report(record)


def test_replayed_steps_that_learn_something_else_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(config: TrainConfig, device: torch.device, seed: int = 0) -> Any:
        other = {"run.cuda_graph": False, "run.seed": seed if config.run.cuda_graph else 0}
        found = synthetic_state(replace_fields(config, other), device)
        found.network.load_state_dict(start)
        return found

    start = build_model(replace_fields(toy(), {"model.join": "lape"}).model).state_dict()
    entry = step_module.Entry("toy", 4, "off", cuda_graph=True)
    monkeypatch.setattr(step_module, "synthetic_state", state)
    assert step_module.replayed_from_plain(TOY, entry) == 0
    monkeypatch.setattr(step_module, "synthetic_state", partial(state, seed=1))
    with pytest.raises(RuntimeError, match=r"toy: replayed steps end \d\.\d+ of the way"):
        step_module.replayed_from_plain(TOY, entry)


def test_nothing_is_begun_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module.isolated, "call", lambda *_: pytest.fail("begun"))
    record = step_module.run(dataclasses.replace(TOY, minutes=1e-9), lambda text: None)
    assert [row["missing"] for row in record["sections"]["step"]] == ["not run: 1e-09 minutes were over"]


def test_entries_of_a_gpu() -> None:
    found = step_module.entries(Settings(device="cuda").filled())
    assert found[0] == ("deit_small", 256, "default", False)
    assert {("deit_base", 256, "off", False), ("deit_small", 1024, "default", False)} <= set(found)
    assert ("vit_lite", 128, "default", True) in found
    assert ("deit_small", 256, "default", True) not in found  # its kernels are longer than their launches
    assert len(found) == len(set(found)) == 13
    assert not any(entry.cuda_graph for entry in step_module.entries(Settings().filled()))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds=0 must be above 0"):
        Settings(rounds=0)
    with pytest.raises(ValueError, match="device='tpu' is not known"):
        Settings(device="tpu")
    with pytest.raises(ValueError, match="'deit_tiny' has no batch size"):
        commands.parse_models("deit_tiny")
    with pytest.raises(ValueError, match="'deit_huge' is not known; choose from deit_tiny"):
        commands.parse_models("deit_huge:8")
    assert commands.parse_models("deit_tiny:8,toy:2") == (("deit_tiny", 8), ("toy", 2))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):
            step_module.run(Settings(device="cuda"), lambda text: None)


def test_targets_say_pass_and_miss() -> None:
    def row(model: str, over: str, under: str, value: float) -> dict[str, Any]:
        return {"model": model, "over": over, "under": under, "ratio": {"median": value}}

    def compiled(kind: str) -> str:
        return Arm(kind, "default").name

    sections = {"ratios": [row("deit_tiny", Arm(BASIC).name, Arm(TIMM).name, 0.97),
                           row("deit_tiny", compiled(BASIC), Arm(TIMM).name, 0.9),
                           row("deit_tiny", compiled(LAPE), compiled(BASIC), 1.005)]}  # fmt: skip
    met = {found["name"]: found["met"] for found in judge(sections, compare_targets("cpu"))}
    assert [value for name, value in met.items() if "deit_tiny: time" in name] == [True, False, True]
    assert {value for name, value in met.items() if "vit_lite" in name} == {None}
    gpu = {"ratios": [row("deit_small", compiled(LAPE), compiled(TIMM), 0.7)],
           "step": [{"model": "deit_small", "images_per_second": {"median": rate}} for rate in (7e3, 9e3)]}  # fmt: skip
    assert [found["met"] for found in judge(gpu, compare_targets("cuda"))].count(True) == 1
    assert [found["met"] for found in judge(gpu, step_targets("cuda"))] == [True, None, False, None]
    ray = {"ratios": [{"over": "ray", "step_s": {"median": 1.03}}]}
    assert [found["met"] for found in judge(ray, ray_targets())] == [False]


def test_checkpoint_comes_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = saving.Settings().quick()
    record = saving.run(settings, lambda text: None)
    row = record["sections"]["checkpoint"][0]
    parameters = sum(p.numel() for p in build_model(toy().model).parameters())
    assert row["bytes"] > 16 * parameters
    assert row["save_s"]["median"] >= row["copy_s"]["median"] > 0
    assert "toy" in checkpoint_report(record)
    monkeypatch.setattr(checkpoint, "restore", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="came back from the checkpoint with other values"):
        saving.run(settings, lambda text: None)


def test_unequal_launchers_are_refused() -> None:
    same = {"threads": 1, "workers": 2, "loss": 2.5}
    orchestration._check_equal({"torchrun": [same], "ray": [same]})
    with pytest.raises(RuntimeError, match="ran different things: threads"):
        orchestration._check_equal({"torchrun": [same], "ray": [same | {"threads": 2}]})


def test_torchrun_says_what_went_wrong() -> None:
    settings = dataclasses.replace(orchestration.Settings().quick(), model="nothing", workers=1)
    with pytest.raises(RuntimeError, match="model='nothing' is not known"):
        orchestration.torchrun(settings, {})


def test_gpu_suite_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "jobs" / "benchmark.py"
    script.parent.mkdir()
    script.write_text(
        "import sys, time\nprint(*sys.argv[1:])\n"
        "sys.exit(3) if sys.argv[1] == 'compare' else time.sleep(60 if sys.argv[1] == 'step' else 0)\n"
    )
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "GRACE_S", 0.1)
    monkeypatch.setattr(suite, "SHARE", {"compare": 0.9, "step": 0.05})
    parts = ("compare", "step", "checkpoint")
    found = suite.run(tmp_path / "out", parts=parts, minutes=1, device="cuda", options=["--quick"])
    assert [outcome.code for outcome in found] == [3, suite.CUT_OFF, 0]
    assert "compare: failed with code 3" in found[0].text
    assert "step: cut off" in found[1].text
    told = (tmp_path / "out" / "compare.txt").read_text().split()
    assert told[:3] == ["compare", "--device", "cuda"]
    assert told[-3] == "--quick" and told[-2] == "--minutes"
    assert suite.run_all(tmp_path / "out", "checkpoint", 1, "cuda", quick=False) == 0
    assert suite.run_all(tmp_path / "out", "compare", 1, "cuda", quick=False) == 1
    with pytest.raises(ValueError, match="--only speed is not known"):
        suite.run_all(tmp_path / "out", "speed", 1, "cuda", quick=False)


def test_gpu_suite_begins_nothing_without_time(tmp_path: Path) -> None:
    found = suite.run(tmp_path, parts=suite.PARTS, minutes=0.01, device="cuda", options=[])
    assert [outcome.code for outcome in found] == [None] * len(suite.PARTS)


def test_a_step_needs_torch_alone() -> None:
    """A GPU machine may have neither Ray nor what the data path wants."""
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'ffcv', 'boto3', 'joblib', 'pyarrow', 'psutil', 'numba', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import lape_ray.train, lape_ray.bench.step, lape_ray.bench.compare, lape_ray.bench.saving\n"
        "import lape_ray.bench.step_report, lape_ray.bench.commands\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["step", "compare", "ray", "checkpoint", "gpu"])
def test_help_is_instant(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "jobs" / "benchmark.py"), command, "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--device" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "numpy", "timm"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["step", "compare", "ray", "checkpoint"])
def test_quick_run(command: str, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, "jobs/benchmark.py", command, "--quick", "--json", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["benchmark"] == command and record["sections"]
    assert "commit" in done.stdout


def test_report_of_ray() -> None:
    found = {"threads": 1, "workers": 2, "loss": 2.5, "steps_s": [0.1, 0.2], "cpu_s": 0.1, "startup_s": 3.0}
    record: dict[str, Any] = step_module.begin("ray", dataclasses.asdict(orchestration.Settings()))
    rows = [orchestration._row(name, [found]) for name in ("torchrun", "ray")]
    one = orchestration.ratio(rows[1]["step_s"], rows[0]["step_s"])
    record["sections"] = {
        "steps": rows,
        "ratios": [{"over": "ray", "under": "torchrun", "step_s": one, "cpu_s": one}],
        "report": [{"name": "ray", "calls": 2, "report_ms": orchestration.spread([1.0, 2.0])}],
    }
    record["targets"] = judge(record["sections"], ray_targets())
    step_module.finish(record)
    assert "pass" in ray_report(record)
    assert SimpleNamespace(**rows[0]).step_s["median"] == pytest.approx(0.15)
