"""Read what weights of other code say of themselves in timm's config.json: mean, std, crop, filter, size, classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lape_ray.config import DataConfig
from lape_ray.training.classes import timm_config


def timm_fields(file: Path) -> dict[str, Any]:
    """Return the fields of a config that timm's config.json next to a file of weights sets; empty: there is none.

    Raises:
        ValueError: it says what this package cannot do, or is damaged; names the file.
    """
    whole = timm_config(file)
    said = whole.get("pretrained_cfg")
    if not isinstance(said, Mapping):
        return {}
    place, fields = file.parent / "config.json", dict[str, Any]()
    try:
        if classes := int(whole.get("num_classes", said.get("num_classes", 0))):  # type: ignore[call-overload]
            fields["model.num_classes"] = classes
        for name in ("mean", "std"):
            if name in said:
                red, green, blue = map(float, said[name])
                fields[f"data.{name}"] = (red, green, blue)
        if "crop_pct" in said:
            fields["data.eval_crop"] = float(said["crop_pct"])
        if said.get("interpolation") in ("bicubic", "bilinear"):
            fields["data.interpolation"] = said["interpolation"]
        if "input_size" in said:
            _, height, width = map(int, said["input_size"])
            if height != width:
                raise ValueError(f"input_size is {height} x {width}, and only squares are read")
            fields["model.image_size"] = height
        if said.get("crop_mode", "center") != "center":
            raise ValueError(f"crop_mode is {said['crop_mode']!r}, and only 'center' is known")
        if said.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
            raise ValueError(
                f"interpolation is {said['interpolation']!r}, and only bicubic and bilinear are known"
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}; mend or remove it, and give --data.* options") from None
    return fields


def of_checkpoint(path: Path) -> DataConfig | None:
    """Return the normalisation that a file of weights was trained with, as far as it is known."""
    fields = {
        name.partition(".")[2]: value for name, value in timm_fields(path).items() if name.startswith("data.")
    }
    return replace(DataConfig(), **fields) if {"mean", "std"} <= fields.keys() else None


def differs(there: DataConfig, here: DataConfig) -> list[str]:
    """Say that weights were trained on images normalised otherwise, in a line; empty: they were not."""
    if (there.mean, there.std) == (here.mean, here.std):
        return []
    return [
        f"it was trained on images of mean {there.mean} and std {there.std}, and this run's have {here.mean} and "
        f"{here.std}; to keep its own give --data.mean {_text(there.mean)} --data.std {_text(there.std)}"
    ]


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
