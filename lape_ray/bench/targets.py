"""What the input pipeline must reach, and whether a record says that it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lape_ray.bench.contenders import FFCV, OURS, PILLOW, TORCHVISION
from lape_ray.bench.inputs import ORIGINAL, RAW, SMALL_JPEG

Sections = Mapping[str, list[dict[str, Any]]]
GIGABYTE = 10**9
FLAT_BYTES = 50 * 10**6  # growth that counts as none: an allocator's arenas settle late


class NotMeasuredError(LookupError):
    """The record has no value for a target; says why."""


@dataclass(frozen=True)
class Target:
    """`value` of a record's sections must be at least (or at most) `limit`."""

    name: str
    limit: float
    unit: str
    value: Callable[[Sections], float]
    at_least: bool = True


def _row(sections: Sections, section: str, **wanted: str | int) -> dict[str, Any]:
    for row in sections.get(section, []):
        if all(row.get(key) == value for key, value in wanted.items()):
            if "missing" in row:
                raise NotMeasuredError(row["missing"])
            return row
    raise NotMeasuredError("not run")


def _over_ours(peer: str, name: str) -> Callable[[Sections], float]:
    def value(sections: Sections) -> float:
        return float(_row(sections, "loader", name=peer, input=name)["cpu_over_ours"]["median"])

    return value


def _of(section: str, key: str, scale: float = 1.0, **wanted: str | int) -> Callable[[Sections], float]:
    def value(sections: Sections) -> float:
        found = _row(sections, section, **wanted)[key]
        return float(found["median"] if isinstance(found, dict) else found) / scale

    return value


TARGETS = (
    Target(f"{SMALL_JPEG}: CPU time of stock {FFCV} over ours", 1.8, "x", _over_ours(FFCV, SMALL_JPEG)),
    Target(f"{SMALL_JPEG}: CPU time of {TORCHVISION} over ours", 1.6, "x", _over_ours(TORCHVISION, SMALL_JPEG)),
    Target(f"{SMALL_JPEG}: CPU time of {PILLOW} over ours", 2.4, "x", _over_ours(PILLOW, SMALL_JPEG)),
    Target(f"{ORIGINAL}: CPU time of {TORCHVISION} over ours", 1.7, "x", _over_ours(TORCHVISION, ORIGINAL)),
    Target(f"{ORIGINAL}: CPU time of {PILLOW} over ours", 2.5, "x", _over_ours(PILLOW, ORIGINAL)),
    Target(f"{RAW}: CPU time of stock {FFCV} over ours", 1.0, "x", _over_ours(FFCV, RAW)),
    Target("images/s of 2 threads over 1", 1.9, "x", _of("scaling", "over_one", threads=2)),
    Target("peak memory beyond files", 1.0, "GB", _of("memory", "peak_bytes", GIGABYTE), at_least=False),
    Target("memory growth over epochs", FLAT_BYTES / 1e6, "MB", _of("memory", "epochs_growth_bytes", 1e6),
           at_least=False),
    Target("memory growth over early exits", FLAT_BYTES / 1e6, "MB", _of("memory", "exits_growth_bytes", 1e6),
           at_least=False),
    Target("threads left behind", 0, "", _of("memory", "threads_left"), at_least=False),
    Target("start of a process to first batch", 3.0, "s", _of("startup", "total_s", name=OURS), at_least=False),
)  # fmt: skip
DEVICE_TARGETS = (
    Target("augmentation on the device", 2.0, "us/image", _of("augmentation", "device_us"), at_least=False),
    Target("deit_small: fed over synthetic steps", 0.97, "x",
           _of("training", "fed_over_synthetic", name="deit_small_lape")),
    Target("deit_base: fed over synthetic steps", 0.97, "x",
           _of("training", "fed_over_synthetic", name="deit_base_lape")),
)  # fmt: skip


def judge(sections: Sections, targets: Iterable[Target]) -> list[dict[str, Any]]:
    """A row for each target: name, limit, at_least, unit, value and met; where there is no value, `missing` says why.

    `met` is None for what was not measured: that is neither a pass nor a miss.
    """
    rows = []
    for target in targets:
        row: dict[str, Any] = {
            "name": target.name,
            "limit": target.limit,
            "at_least": target.at_least,
            "unit": target.unit,
        }
        try:
            value = target.value(sections)
            row["value"] = value
            row["met"] = value >= target.limit if target.at_least else value <= target.limit
        except NotMeasuredError as error:
            row |= {"value": None, "met": None, "missing": str(error)}
        rows.append(row)
    return rows
