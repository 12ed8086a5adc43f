"""`jobs/benchmark.py compare`: our training step beside its peers', with the same weights, batches and loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from lape_ray.bench import isolated
from lape_ray.bench.clock import first_step_s, interleaved
from lape_ray.bench.goals import compare_targets
from lape_ray.bench.maths import gate
from lape_ray.bench.peers import AGAIN, BASIC, EXPLICIT, LAPE, TIMM, TORCHVISION, Arm, arm_state
from lape_ray.bench.record import begin, finish, ratio, spread
from lape_ray.bench.step import Deadline, Note, Row, Save, Settings, peak_bytes, prepared
from lape_ray.bench.synthetic import Stepper, training_config
from lape_ray.bench.targets import judge
from lape_ray.config import Compile, TrainConfig

# What is divided by what, time by time: below 1, the first is faster.
PAIRS = (
    ((AGAIN, "off"), (BASIC, "off")),
    ((BASIC, "off"), (TIMM, "off")),
    ((BASIC, "off"), (TORCHVISION, "off")),
    ((LAPE, "off"), (BASIC, "off")),
    ((BASIC, "on"), (BASIC, "off")),
    ((BASIC, "on"), (TIMM, "off")),
    ((BASIC, "on"), (TIMM, "on")),
    ((LAPE, "on"), (TIMM, "on")),
    ((LAPE, "on"), (BASIC, "on")),
)


def arms(settings: Settings) -> list[Arm]:
    """Who is timed: everybody eager and compiled, ours twice; torchvision compiled on a GPU only, where it is quick."""
    found = [Arm(kind) for kind in (BASIC, AGAIN, LAPE, TIMM, TORCHVISION)]
    if settings.compile != "off":
        peers: tuple[str, ...] = () if settings.quick else (TIMM,)
        peers += (TORCHVISION,) if settings.device.startswith("cuda") else ()
        found += [Arm(kind, settings.compile) for kind in (BASIC, LAPE, *peers)]
    return found


def run(settings: Settings, note: Note, save: Save = lambda record: None) -> Row:
    """The record of a whole run; `save` gets it after each model and each row of memory.

    Raises:
        WrongMathsError: a contender computes something else; nothing was timed.
    """
    settings = settings.filled()
    device = prepared(settings.device, settings.threads)
    record = begin("compare", dataclasses.asdict(settings), device=settings.device)
    deadline = Deadline(settings.minutes)
    sections: dict[str, list[Row]] = {
        "gate": [],
        "compare": [],
        "ratios": [],
        "memory": [],
        "memory_ratios": [],
    }
    record["sections"] = sections

    def keep() -> None:
        record["targets"] = judge(sections, compare_targets(settings.device))
        finish(record)
        save(record)

    assert settings.models is not None
    for model, batch_size in settings.models:  # all of it before anything is timed
        note(f"{model}: comparing logits and gradients")
        base = training_config(model, join="basic", batch_size=batch_size)
        checked = [arm for arm in arms(settings) if arm.kind != AGAIN] + [Arm(EXPLICIT)]
        sections["gate"] += [{"model": model, **row} for row in gate(checked, base, device)]
        torch.compiler.reset()
    for model, batch_size in settings.models:
        if missing := deadline.over():
            sections["compare"].append({"model": model, "name": "all", "missing": missing})
        else:
            base = training_config(model, join="basic", batch_size=batch_size)
            rows = timed(settings, model, base, device, note)
            sections["compare"] += rows
            sections["ratios"] += ratios(settings, model, rows)
        keep()
    # The widest first: there attention's share is smallest, so that the first model tells most.
    model, batch_size = settings.models[0]
    for arm in memory_arms(settings):
        note(f"{model}: memory of {arm.name}")
        missing = deadline.over()
        sections["memory"].append(
            {"model": model, "name": arm.name, "missing": missing}
            if missing
            else isolated.call(memory, settings, model, batch_size, arm)
        )
        sections["memory_ratios"] = memory_ratios(sections["memory"])
        keep()
    return record


def timed(settings: Settings, model: str, base: TrainConfig, device: torch.device, note: Note) -> list[Row]:
    """A row for each arm: interleaved rounds in this process, so that clocks and caches are the same for all."""
    steppers: dict[str, Stepper] = {}
    rows: dict[str, Row] = {}
    for arm in arms(settings):
        note(f"{model}: {arm.name}: first step")
        rows[arm.name] = {"model": model, "name": arm.name, "batch_size": base.data.batch_size}
        try:
            stepper = Stepper(arm_state(arm, base, device))
        except ImportError as error:
            rows[arm.name]["missing"] = f"not installed: {error}"
            continue
        rows[arm.name]["first_step_s"] = first_step_s(stepper.run, device)
        assert settings.warmup_steps is not None and settings.steps is not None
        stepper.run(settings.warmup_steps)
        steppers[arm.name] = stepper
    works: dict[str, Callable[[int], None]] = {name: stepper.run for name, stepper in steppers.items()}
    windows = interleaved(
        works, rounds=settings.rounds, steps=settings.steps or 1, device=device,
        note=lambda text: note(f"{model}: {text}"),
    )  # fmt: skip
    for name, found in windows.items():
        rows[name] |= {
            "step_s": spread([each.step_s for each in found]),
            "cpu_s": spread([each.cpu_s for each in found]),
            "images_per_second": spread([base.data.batch_size / each.step_s for each in found]),
            "loss": steppers[name].mean_loss(),
        }
    torch.compiler.reset()
    return list(rows.values())


def measure(settings: Settings) -> str:
    """What ratios are taken of. One thread's CPU time is not disturbed by who else is on the machine."""
    return "cpu_s" if not settings.device.startswith("cuda") and settings.threads == 1 else "step_s"


def ratios(settings: Settings, model: str, rows: list[Row]) -> list[Row]:
    """The pairs' times over one another, round by round; a pair without one of its times says why."""
    by_name = {row["name"]: row for row in rows}
    found = []
    for over, under in PAIRS:
        names = [_arm(settings, *each).name for each in (over, under)]
        pair = [by_name.get(name, {"missing": "not run"}) for name in names]
        row: Row = {"model": model, "over": names[0], "under": names[1], "of": measure(settings)}
        missing = next((each["missing"] for each in pair if "missing" in each), None)
        if missing is None:
            row["ratio"] = ratio(pair[0][row["of"]], pair[1][row["of"]])
        else:
            row["missing"] = missing
        found.append(row)
    return found


def _arm(settings: Settings, kind: str, mode: str) -> Arm:
    on: Compile = settings.compile if settings.compile != "off" else "default"
    return Arm(kind, on if mode == "on" else "off")


def memory_arms(settings: Settings) -> list[Arm]:
    found = [Arm(EXPLICIT), Arm(BASIC), Arm(LAPE), Arm(TIMM)]
    compiles = settings.compile != "off" and not settings.quick
    return found + ([Arm(BASIC, settings.compile)] if compiles else [])


def memory(settings: Settings, model: str, batch_size: int, arm: Arm) -> Row:
    """The most memory that tensors hold in the third step of a process, in bytes; batches are not counted on a CPU."""
    device = prepared(settings.device, settings.threads)
    row: Row = {"model": model, "name": arm.name, "batch_size": batch_size}
    try:
        stepper = Stepper(arm_state(arm, training_config(model, join="basic", batch_size=batch_size), device))
    except ImportError as error:
        return row | {"missing": f"not installed: {error}"}
    stepper.run(2)
    return row | {"peak_bytes": peak_bytes(stepper, device)}


def memory_ratios(rows: list[Row]) -> list[Row]:
    """Peaks over that of the explicit softmax."""
    peaks = {row["name"]: row["peak_bytes"] for row in rows if "peak_bytes" in row}
    explicit = peaks.get(Arm(EXPLICIT).name)
    if explicit is None:
        return []
    return [
        {"model": rows[0]["model"], "name": name, "over_explicit": peak / explicit}
        for name, peak in peaks.items()
        if name != Arm(EXPLICIT).name
    ]
