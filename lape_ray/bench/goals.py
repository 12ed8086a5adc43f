"""What the training step, orchestration and checkpoints must reach; `targets` has the loader's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lape_ray.bench.peers import BASIC, LAPE, TIMM
from lape_ray.bench.targets import NotMeasuredError, Sections, Target

EAGER, COMPILED = "eager", "compiled"


def _find(sections: Sections, section: str, **wanted: object) -> dict[str, Any]:
    for row in sections.get(section, []):
        if all(row.get(key) == value for key, value in wanted.items()):
            if "missing" in row:
                raise NotMeasuredError(row["missing"])
            return row
    raise NotMeasuredError("not run")


def _value(section: str, key: str, **wanted: object) -> Callable[[Sections], float]:
    def value(sections: Sections) -> float:
        found = _find(sections, section, **wanted)[key]
        return float(found["median"] if isinstance(found, dict) else found)

    return value


def _time_over(model: str, over: str, under: str) -> Callable[[Sections], float]:
    return _value("ratios", "ratio", model=model, over=over, under=under)


def _at_most(name: str, limit: float, value: Callable[[Sections], float], unit: str = "x") -> Target:
    return Target(name, limit, unit, value, at_least=False)


def step_targets(device: str) -> list[Target]:
    """Images per second of the compiled step on one H100; a CPU has no target of its own."""
    if not device.startswith("cuda"):
        return []

    def best(model: str) -> Callable[[Sections], float]:
        def value(sections: Sections) -> float:
            rows = [row for row in sections.get("step", []) if row["model"] == model]
            rates = [row["images_per_second"]["median"] for row in rows if "images_per_second" in row]
            if not rates:
                raise NotMeasuredError(rows[0]["missing"] if rows else "not run")
            return float(max(rates))

        return value

    wanted = (("deit_small", 8_000, "public best"), ("deit_tiny", 24_000, "aim"), ("deit_small", 12_000, "aim"),
              ("deit_base", 3_900, "aim"))  # fmt: skip
    return [
        Target(f"{model}: images/s on one H100, best batch ({why})", limit, "images/s", best(model))
        for model, limit, why in wanted
    ]


def compare_targets(device: str) -> list[Target]:
    """Times over those of peers with the same weights, and memory over that of an explicit softmax."""
    eager, compiled = f", {EAGER}", f", {COMPILED}"
    if device.startswith("cuda"):
        found = [
            _at_most(f"{model}: time, {LAPE} over {TIMM}, compiled (1.3x as fast)", 1 / 1.3,
                     _time_over(model, LAPE + compiled, TIMM + compiled))
            for model in ("deit_tiny", "deit_small")
        ]  # fmt: skip
        return found + [
            _at_most(f"{model}: time, LaPE over basic, compiled", 1.003,
                     _time_over(model, LAPE + compiled, BASIC + compiled))
            for model in ("deit_tiny", "deit_small", "deit_base")
        ]  # fmt: skip
    found = []
    for model in ("deit_tiny", "vit_lite"):
        found += [
            _at_most(f"{model}: time, ours over {TIMM}, eager", 1.0,
                     _time_over(model, BASIC + eager, TIMM + eager)),
            _at_most(f"{model}: time, ours compiled over {TIMM} eager", 0.8,
                     _time_over(model, BASIC + compiled, TIMM + eager)),
            _at_most(f"{model}: time, LaPE over basic, compiled", 1.01,
                     _time_over(model, LAPE + compiled, BASIC + compiled)),
        ]  # fmt: skip
    for mode in (EAGER, COMPILED):
        found.append(
            _at_most(f"deit_tiny: peak memory over an explicit softmax, {mode}", 0.7,
                     _value("memory_ratios", "over_explicit", model="deit_tiny", name=f"{BASIC}, {mode}"))
        )  # fmt: skip
    return found


def ray_targets() -> list[Target]:
    return [_at_most("time of a step, Ray Train over torchrun", 1.02, _value("ratios", "step_s", over="ray"))]
