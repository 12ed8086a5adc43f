"""From a command line's values to a record and its tables, for the subcommands about training steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lape_ray.bench.record import save

Values = Mapping[str, Any]
COMMON = ("device", "rounds", "threads")


def run(command: str, options: Values, note: Callable[[str], None]) -> str:
    """Run the subcommand, write its record where `options` asks for it, and return its tables.

    Raises:
        ValueError: an option has no meaning.
    """
    path: Path | None = options["json"]

    def keep(record: Mapping[str, Any]) -> None:
        if path is not None:
            save(record, path)

    return _COMMANDS[command](options, note, keep)


def parse_models(text: str | None) -> tuple[tuple[str, int], ...] | None:
    """`deit_tiny:8,vit_lite:64` as pairs of a name and a batch size; None for None."""
    if text is None:
        return None
    pairs = []
    for part in text.split(","):
        name, _, size = part.partition(":")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--models {part!r} has no batch size; write NAME:IMAGES, such as deit_tiny:8")
        pairs.append((name, int(size)))
    _check_names(tuple(name for name, _ in pairs))
    return tuple(pairs)


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """`deit_tiny,deit_small` as names; None for None."""
    if text is None:
        return None
    names = tuple(text.split(","))
    _check_names(names)
    return names


def _check_names(names: tuple[str, ...]) -> None:
    from lape_ray.bench.synthetic import MODELS

    for name in names:
        if name not in MODELS:
            raise ValueError(f"--models {name!r} is not known; choose from {', '.join(MODELS)}")


def _given(options: Values, *names: str) -> dict[str, Any]:
    """The options that were set; the settings' own defaults stand for the others."""
    return {name: options[name] for name in names if options.get(name) is not None}


def _step(options: Values, note: Callable[[str], None], keep: Callable[[Values], None]) -> str:
    from lape_ray.bench import step
    from lape_ray.bench.step_report import step_report

    return step_report(step.run(_stepping(options), note, keep))


def _compare(options: Values, note: Callable[[str], None], keep: Callable[[Values], None]) -> str:
    from lape_ray.bench import compare
    from lape_ray.bench.step_report import compare_report

    return compare_report(compare.run(_stepping(options), note, keep))


def _stepping(options: Values) -> Any:
    from lape_ray.bench.step import Settings

    given = _given(options, *COMMON, "compile", "steps", "minutes")
    return Settings(**given, models=parse_models(options["models"]), quick=options["quick"])


def _ray(options: Values, note: Callable[[str], None], keep: Callable[[Values], None]) -> str:
    from lape_ray.bench.orchestration import Settings, run
    from lape_ray.bench.step_report import ray_report

    chosen = parse_models(options["models"]) or ()
    if len(chosen) > 1:
        raise ValueError("--models of ray takes one model; run it again for another")
    given: dict[str, Any] = {
        key: value for pair in chosen for key, value in zip(("model", "batch_size"), pair, strict=True)
    }
    settings = Settings(**_given(options, *COMMON), **given)
    return ray_report(run(settings.quick() if options["quick"] else settings, note, keep))


def _checkpoint(options: Values, note: Callable[[str], None], keep: Callable[[Values], None]) -> str:
    from lape_ray.bench.saving import Settings, run
    from lape_ray.bench.step_report import checkpoint_report

    settings = Settings(**_given(options, *COMMON), models=parse_names(options["models"]))
    return checkpoint_report(run(settings.quick() if options["quick"] else settings, note, keep))


def _seeds(options: Values, note: Callable[[str], None], keep: Callable[[Values], None]) -> str:
    """Trains what the record of an earlier call does not hold yet."""
    from lape_ray.bench import seeds
    from lape_ray.bench.seeds_report import report

    given = _given(options, "seeds", "epochs", "holdout", "per_class", "at_once", "threads", "device")
    if options["recipes"]:
        given["recipes"] = tuple(options["recipes"].split(","))
    settings = seeds.Settings(
        source=options["source"], splits=("train", options["test"]), overrides=options["overrides"], **given
    )
    path: Path | None = options["json"]
    earlier = json.loads(path.read_text()) if path is not None and path.exists() else None
    return report(seeds.run(settings, note, keep, earlier))


_COMMANDS = {
    "step": _step, "compare": _compare, "ray": _ray, "checkpoint": _checkpoint, "seeds": _seeds,
}  # fmt: skip
