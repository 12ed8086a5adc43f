"""Robustness: inputs are what they are called, own inputs give what `evaluate` gives, and what cannot be is said."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lape_ray.config import DataConfig, ModelConfig, TrainConfig
from lape_ray.data.batch import Batch
from lape_ray.data.beton import write_beton
from lape_ray.data.loader import build_loader
from lape_ray.data.normalize import Normalize
from lape_ray.data.ready import Normalized
from lape_ray.data.sources import digits
from lape_ray.inference.evaluate import evaluation_loader
from lape_ray.inference.samples import evenly_spaced
from lape_ray.model import Network, build_model, resolve
from lape_ray.model.position import ABSOLUTES, BIASES, ROTARIES, resize_absolute
from lape_ray.report import robustness
from lape_ray.report.build import build_position_report
from lape_ray.report.page import Page
from lape_ray.report.robustness import (
    Few,
    Part,
    Robustness,
    Shifted,
    measure_robustness,
    ratios_for,
    relative_area,
    shifts_for,
    sizes_for,
)
from lape_ray.report.robustness_page import (
    CSV,
    robustness_figure,
    robustness_table,
    rule,
    write_robustness,
)
from lape_ray.training.loop import evaluate

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 1,
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 16,
}
GREY = DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3)
SWIN: dict[str, Any] = {
    "variant": "swin_tiny", "image_size": 32, "patch_size": 2, "window_size": 4, "depths": (1, 1, 1, 1),
    "embed_dim": 16, "num_heads": 2, "num_classes": 10,
}  # fmt: skip
OTHERS: dict[str, Any] = {"image_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


def config_of(**model: Any) -> TrainConfig:
    return TrainConfig(model=ModelConfig(**{**TINY, **model}), data=GREY)


class MemoryLoader:
    """Images (B, 3, S, S) in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def epoch(self, epoch: int) -> Any:
        yield Batch(self.images, self.labels, np.arange(len(self.labels)))


def bright_patches(size: int) -> MemoryLoader:
    """Images whose class is the place of their one bright sixteenth."""
    images = torch.zeros(16, 3, size, size, dtype=torch.uint8)
    for i in range(16):
        row, column = i // 4 * size // 4, i % 4 * size // 4
        images[i, :, row : row + size // 4, column : column + size // 4] = 255
    return MemoryLoader(images, torch.arange(16))


def noise(size: int, count: int = 16) -> MemoryLoader:
    images = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(size))
    return MemoryLoader(images.byte(), torch.zeros(count, dtype=torch.long))


def serve(patch: pytest.MonkeyPatch, make: Any) -> None:
    patch.setattr(robustness, "evaluation_loader", lambda config, device, *, image_size: make(image_size))


def few_inputs(patch: pytest.MonkeyPatch) -> None:
    """Leave the smallest, the own and the largest size, a part, a shift by a token, and one ratio."""
    patch.setattr(robustness, "SIZES_OF_224", (128, 224, 1024))
    patch.setattr(robustness, "CROPS", (1, 1 / 2))
    patch.setattr(robustness, "SHIFTS", (0, 1))
    patch.setattr(robustness, "RATIOS", {1: "1:1", 4: "4:1"})


def place_network() -> Network:
    """Tells the bright patch's place by nothing but its position embedding."""
    model = build_model(ModelConfig(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.norm, model.blocks[0].norm1, model.blocks[0].norm2):
            norm.weight.fill_(1)
        model.patch_embed.proj.weight[31] = 1.0  # channel 31: brightness
        model.pos_embed[0, 1:, :16] = torch.eye(16)  # channels 0..15: place
        block = model.blocks[0]
        block.attn.qkv.bias[:32] = torch.eye(32)[31] * 100  # the query asks for brightness
        block.attn.qkv.weight[32:64] = torch.eye(32)
        block.attn.qkv.weight[64:] = torch.eye(32)
        block.attn.proj.weight.copy_(torch.eye(32))
        model.head.weight[:, :16] = torch.eye(16)
    return model


# --- inputs ---------------------------------------------------------------------------------------------------


def test_inputs_are_in_proportion_to_the_trained_size() -> None:
    deit, lite, cct = (
        resolve(ModelConfig(variant=name)) for name in ("deit_tiny", "vit_lite_7_4", "cct_7_3x1")
    )
    assert sizes_for(deit) == [128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert sizes_for(lite) == [20, 24, 28, 32, 36, 44, 56, 64, 72, 92, 108, 128, 148]
    assert sizes_for(cct)[::12] == [18, 146]
    assert shifts_for(deit) == [0, 4, 8, 12, 16, 24, 32, 48, 64, 112]
    assert shifts_for(lite) == [0, 1, 2, 3, 4, 6, 8, 12, 16]
    assert shifts_for(cct) == [0, 1, 2, 3, 4, 6, 8, 16]
    grids = [(28, 7), (20, 10), (17, 11), (14, 14), (11, 17), (10, 20), (7, 28)]
    assert list(ratios_for(deit).values()) == grids
    assert list(ratios_for(dataclasses.replace(deit, image_size=32))) == [
        1 / 4,
        1 / 2,
        1,
        2,
        4,
    ]  # 2 x 2 tokens


def test_sizes_of_several_stages_are_whole_tokens_of_the_last() -> None:
    assert sizes_for(resolve(ModelConfig(variant="swin_tiny")))[::12] == [128, 1024]
    assert sizes_for(resolve(ModelConfig(**SWIN))) == [32, 48, 64, 80, 96, 112, 128, 144]


def test_a_shift_moves_every_image_and_wraps() -> None:
    loader = bright_patches(16)
    images, labels, _ = next(iter(Shifted(loader=loader, pixels=4).epoch(0)))
    assert labels.tolist() == list(range(16))
    torch.testing.assert_close(images[0], loader.images[5])
    torch.testing.assert_close(images[15], loader.images[0])


def test_parts_are_cut_at_nine_places_or_at_the_centre() -> None:
    image = torch.arange(8 * 8, dtype=torch.uint8).view(1, 8, 8).expand(3, 8, 8)
    loader = MemoryLoader(image.expand(10, 3, 8, 8), torch.zeros(10, dtype=torch.long))
    (parts, *_), *_ = Part(loader=loader, size=(4, 4), spread=True).epoch(0)
    corners = [divmod(int(part[0, 0, 0]), 8) for part in parts]
    assert corners == [(row, column) for row in (0, 2, 4) for column in (0, 2, 4)] + [(0, 0)]
    (parts, *_), *_ = Part(loader=loader, size=(2, 8), spread=False).epoch(0)
    torch.testing.assert_close(parts, image[:, 3:5].expand(10, 3, 2, 8))


def test_places_of_parts_go_on_from_batch_to_batch() -> None:
    images = torch.arange(8 * 8, dtype=torch.uint8).view(1, 1, 8, 8).expand(12, 3, 8, 8)

    class Batches:
        def epoch(self, epoch: int) -> Any:
            for part in images.split(5):
                yield Batch(part, torch.zeros(len(part)), np.arange(len(part)))

    one = Part(loader=MemoryLoader(images, torch.zeros(12)), size=(4, 4), spread=True)
    several = Part(loader=Batches(), size=(4, 4), spread=True)
    found = [torch.cat([batch.images for batch in each.epoch(0)]) for each in (one, several)]
    torch.testing.assert_close(*found)


def test_few_images_are_spread_over_the_file_with_their_own_labels(tmp_path: Path) -> None:
    path = tmp_path / "digits.beton"
    write_beton(digits("val"), path, workers=1)
    loader = build_loader(DataConfig(val=str(path)), "val", image_size=8, batch_size=16)
    every = list(loader.epoch(0))
    images, labels = (torch.cat(parts) for parts in list(zip(*every, strict=True))[:2])
    few = list(Few(loader=loader, count=40).epoch(0))
    index = evenly_spaced(len(labels), 40)
    torch.testing.assert_close(torch.cat([batch.images for batch in few]), images[index])
    torch.testing.assert_close(torch.cat([batch.labels for batch in few]), labels[index])


def test_the_largest_images_come_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, tuple[int, str]] = {}

    def loader(config: TrainConfig, device: torch.device, *, image_size: int) -> MemoryLoader:
        seen[image_size] = config.data.eval_batch_size, config.data.backend
        return noise(16)

    monkeypatch.setattr(robustness, "evaluation_loader", loader)
    config = dataclasses.replace(config_of(), data=dataclasses.replace(GREY, backend="resident"))
    measure = robustness._Measurement(config, {}, CPU, None, None)
    for size in (32, 224, 1024, 4096):
        measure.loader(size)
    assert seen == {32: (256, "native"), 224: (83, "native"), 1024: (4, "native"), 4096: (1, "native")}


# --- measurements ---------------------------------------------------------------------------------------------


def test_a_network_that_reads_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is right on images as they are, and wrong on those that are shifted by whole patches."""
    serve(monkeypatch, bright_patches)
    model, said = place_network(), []
    assert model(Normalize(GREY)(bright_patches(16).images)).argmax(1).tolist() == list(range(16))
    result = measure_robustness("place", config_of(), model.state_dict(), device=CPU, progress=said.append)
    assert result.sizes[16] == result.crops[1] == result.shifts[0] == result.ratios[1] == 100
    assert list(result.sizes) == [8, 12, 16, 20, 24, 28, 32, 36, 44, 56, 64, 72]
    assert result.shifts[4] == result.shifts[8] == 0
    assert max(result.crops[1 / 2], result.ratios[1 / 4], result.ratios[4]) < 50
    assert not result.refused
    assert result.images == 16
    assert said[:2] == ["place: 16 px", "place: 8 px (1 of 29)"]
    assert said[-1] == "place: width to height 4:1 (29 of 29)"


def test_whole_tokens_do_not_move_a_network_that_knows_no_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its labels are what the networks say of the images as they are, so that top-1 is agreement with that."""
    torch.manual_seed(0)
    shifts = {}
    for position in ("none", "sincos2d"):
        config = config_of(position=position, depth=2)
        model = build_model(config.model).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        images = noise(16, 64).images
        labels = model(Normalize(GREY)(images)).argmax(1)
        assert len(labels.unique()) > 2
        with monkeypatch.context() as patch:
            few_inputs(patch)
            patch.setattr(robustness, "SHIFTS", (0, 1 / 2, 1))
            serve(patch, lambda size, labels=labels: MemoryLoader(noise(size, 64).images, labels))
            shifts[position] = measure_robustness("x", config, model.state_dict(), device=CPU).shifts
    assert shifts["none"][4] == shifts["none"][8] == 100
    assert max(shifts["none"][2], shifts["sincos2d"][4], shifts["sincos2d"][8]) < 95


def test_the_own_size_gives_what_evaluation_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_inputs(monkeypatch)
    path = tmp_path / "digits.beton"
    write_beton(digits("val"), path, workers=1)
    config = dataclasses.replace(config_of(), data=DataConfig(val=str(path), upscale=True))
    torch.manual_seed(1)
    model = build_model(config.model)
    expected = evaluate(model, Normalized(evaluation_loader(config, CPU), config.data, CPU))
    found = measure_robustness("x", config, model.state_dict(), device=CPU)
    assert 0 < found.sizes[16] == expected["acc1"] < 100


@pytest.mark.parametrize(
    ("field", "name"),
    [(field, name) for field, names in (("position", ABSOLUTES), ("bias", BIASES), ("rotary", ROTARIES))
     for name in names],
)  # fmt: skip
def test_every_position_is_measured_or_refused_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, field: str, name: str
) -> None:
    few_inputs(monkeypatch)
    serve(monkeypatch, lambda size: noise(size, 2))
    config = config_of(**{"position": "none", field: name})
    weights = build_model(config.model).state_dict()
    found = measure_robustness(name, config, weights, device=CPU)
    for kind, planned in (
        ("sizes", {8, 16, 72}),
        ("ratios", {1, 4}),
        ("shifts", {0, 4, 8}),
        ("crops", {1, 0.5}),
    ):
        reasons = {value: why for (of, value), why in found.refused.items() if of == kind}
        assert set(getattr(found, kind)) | set(reasons) == planned
        assert all(reasons.values())


def test_the_rule_names_what_was_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    few_inputs(monkeypatch)
    serve(monkeypatch, lambda size: noise(size, 2))

    def rule_of(**model: Any) -> str:
        config = config_of(**model)
        weights = build_model(config.model).state_dict()
        return rule(measure_robustness("x", config, weights, device=CPU))

    assert rule_of(bias="relative2d", bias_join="lape") == (
        "resized for other sizes: pos_embed, bias.table.table_LRH, bias.norms.*.weight, bias.norms.*.bias; "
        "all other position is computed for the grid"
    )
    assert rule_of(position="sincos2d", bias="alibi2d", rotary="axial") == (
        "resized for other sizes: nothing; all other position is computed for the grid"
    )


def test_a_grid_that_is_no_square_has_rows_and_columns_in_their_places() -> None:
    config = ModelConfig(**TINY)
    wide = build_model(config, grid=(2, 8)).eval()
    images = torch.zeros(1, 3, 8, 32)
    images[..., 4:8, 20:24] = 1  # row 1, column 5
    tokens = wide.patch_embed(images) - wide.patch_embed(torch.zeros_like(images))
    assert tokens[0].abs().sum(-1).nonzero().flatten().tolist() == [1 * 8 + 5]
    table = wide.resizers()["pos_embed"](torch.randn(1, 17, 32))
    assert table.shape == wide.pos_embed.shape == (1, 17, 32)
    trained = torch.randn(1, 17, 32)
    torch.testing.assert_close(wide.resizers()["pos_embed"](trained), resize_absolute(trained, (2, 8), 1))
    fixed = build_model(dataclasses.replace(config, position="sincos2d"), grid=(2, 8)).pos_embed[0, 1:]
    rows = fixed.unflatten(0, (2, 8))
    torch.testing.assert_close(rows[:, 5, :16], rows[:1, 5, :16].expand(2, -1))  # the column
    torch.testing.assert_close(rows[1, :, 16:], rows[1, :1, 16:].expand(8, -1))  # the row


@pytest.mark.parametrize(
    "model", [SWIN, {"variant": "ceit_tiny", **OTHERS}, {"variant": "t2t_vit_7", **OTHERS}]
)
def test_networks_that_take_squares_only_say_so(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]
) -> None:
    few_inputs(monkeypatch)
    serve(monkeypatch, lambda size: noise(size, 2))
    config = TrainConfig(model=ModelConfig(**model), data=GREY)
    weights = build_model(config.model).state_dict()
    found = measure_robustness("x", config, weights, device=CPU)
    assert list(found.ratios) == [1]
    assert f"{model['variant']} takes square images only" in found.refused["ratios", 4]


def test_sizes_that_windows_do_not_fill_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "SHIFTS", (0, 1))
    serve(monkeypatch, lambda size: noise(size, 2))
    config = TrainConfig(model=ModelConfig(**SWIN, join="lape", bias="relative2d"), data=GREY)
    weights = build_model(config.model).state_dict()
    found = measure_robustness("s", config, weights, device=CPU)
    assert list(found.sizes) == [32, 64, 128]
    refused = [value for kind, value in found.refused if kind == "sizes"]
    assert refused == [48, 80, 96, 112, 144]
    assert "which windows of 4 do not fill" in found.refused["sizes", 48]
    _, rows = robustness_table([found])
    assert rows[:2] == [("32 px", f"{found.sizes[32]:.2f}"), ("48 px", "×")]


def test_a_bias_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    few_inputs(monkeypatch)
    serve(monkeypatch, lambda size: noise(size, 2))
    config = config_of(position="none", bias="alibi2d")
    weights = build_model(config.model).state_dict()
    own = 17 * 17 * 4  # bytes of its one layer and head
    free = SimpleNamespace(available=4 * own * 4.5**4 - 1)
    monkeypatch.setattr(robustness.psutil, "virtual_memory", lambda: free)
    found = measure_robustness("x", config, weights, device=CPU)
    assert list(found.sizes) == [8, 16]
    assert found.refused["sizes", 72].startswith("the bias of a layer takes about 0.0 GB of memory")
    free.available += 1
    assert not measure_robustness("x", config, weights, device=CPU).refused


def test_a_report_has_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_inputs(monkeypatch)
    write_beton(digits("val"), tmp_path / "digits.beton", workers=1)
    model = {**TINY, "num_classes": 10}
    torch.save({"model": build_model(ModelConfig(**model)).state_dict()}, tmp_path / "tiny.pth")
    overrides = {f"model.{name}": value for name, value in model.items()}
    overrides |= {"data.val": str(tmp_path / "digits.beton"), "data.upscale": True}
    page, _ = build_position_report(
        [f"{tmp_path}/tiny.pth@deit_tiny_basic"], tmp_path / "out", overrides=overrides, count=2,
        robustness=True, robustness_images=8,
    )  # fmt: skip
    assert ": 8 images; resized for other sizes: pos_embed; all other" in Path(page).read_text()
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"robustness.png", "robustness.svg", "robustness.csv"} < made


# --- the figure, the table and the file -----------------------------------------------------------------------

A = Robustness(
    label="a", trained_size=32, patch=8, images=1234, sizes={16: 45.0, 32: 90.125, 64: 45.0625, 128: 0.0},
    crops={1: 90.125, 0.5: 10.0}, shifts={0: 90.125, 4: 12.5}, ratios={1: 90.125, 4: 50.0},
)  # fmt: skip
B = Robustness(
    label="b", trained_size=32, patch=8, images=1234, sizes={32: 80.0, 64: 60.0}, crops={1: 80.0},
    shifts={0: 80.0, 8: 70.0}, ratios={1: 80.0},
    refused={("sizes", 16): "a window of 16 is too small", ("sizes", 128): "a window of 128 is too small",
             ("ratios", 4): "squares only"},
)  # fmt: skip


def test_the_area_is_relative_to_the_own_size_and_over_octaves() -> None:
    assert relative_area(A, upwards=True) == pytest.approx(100 * ((1 + 0.5) / 2 + (0.5 + 0) / 2) / 2)
    assert relative_area(A, upwards=False) == pytest.approx(100 * (45 / 90.125 + 1) / 2)
    assert relative_area(B, upwards=True) is relative_area(B, upwards=False) is None
    flat = dataclasses.replace(A, sizes=dict.fromkeys((20, 32, 60), 7.0))
    assert relative_area(flat, upwards=True) == pytest.approx(100)
    uneven = dataclasses.replace(A, sizes={32: 100.0, 64: 100.0, 256: 0.0})
    assert relative_area(uneven, upwards=True) == pytest.approx(100 * (1 + 2 * 0.5) / 3)
    assert relative_area(dataclasses.replace(A, sizes={32: 0.0, 64: 1.0}), upwards=True) is None


def test_figure_and_table_hold_the_numbers() -> None:
    sizes, crops, shifts, ratios = robustness_figure([A, B]).axes
    assert [line.get_xydata().tolist() for line in sizes.lines[:3]] == [
        [[16, 45], [32, 90.125], [64, 45.0625], [128, 0]], [[32, 80], [64, 60]], [[16, 0], [128, 0]],
    ]  # fmt: skip
    assert crops.lines[0].get_xydata().tolist() == [[100, 90.125], [50, 10]]
    assert shifts.lines[1].get_xydata().tolist() == [[0, 80], [1, 70]]
    assert ratios.lines[2].get_xydata().tolist() == [[4, 0]]
    assert ratios.lines[2].get_marker() == "x"
    header, rows = robustness_table([A, B])
    assert header == ("top-1, %", "a", "b")
    assert rows == [
        ("16 px", "45.00", "×"), ("32 px", "90.12", "80.00"), ("64 px", "45.06", "60.00"), ("128 px", "0.00", "×"),
        ("area, smallest to own size", "75.0", "–"), ("area, own to largest size", "50.0", "–"),
        ("part of 100 % of the side", "90.12", "80.00"), ("part of 50 % of the side", "10.00", "–"),
        ("shift by 0 px", "90.12", "80.00"), ("shift by 4 px", "12.50", "–"), ("shift by 8 px", "–", "70.00"),
        ("width to height 1:1", "90.12", "80.00"), ("width to height 4:1", "50.00", "×"),
    ]  # fmt: skip


def test_the_page_says_what_is_left_out_and_the_file_has_every_number(tmp_path: Path) -> None:
    page = Page("x")
    write_robustness(page, [A, B], tmp_path)
    text = page.html()
    assert "a: 1,234 images; resized for other sizes: nothing" in text
    assert "b, 16, 128 px: such as a window of 16 is too small" in text
    assert "b, width to height 4:1: squares only" in text
    with (tmp_path / CSV).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 10 + 9
    by_input = {(row["network"], row["input"]): row for row in rows}
    wide = by_input["a", "width to height 4:1"]
    assert (wide["height"], wide["width"], wide["top-1, %"], wide["of own, %"]) == (
        "16",
        "64",
        "50.0",
        "55.479",
    )
    assert by_input["b", "128 px"]["left out because"] == "a window of 128 is too small"
    assert math.isclose(float(by_input["a", "64 px"]["of own, %"]), 50)
    assert (tmp_path / "robustness.png").exists()
