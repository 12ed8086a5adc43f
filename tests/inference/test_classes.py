"""Classes meet a checkpoint: they go by name, or are refused; never by their place alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lape_ray.config import DataConfig, ModelConfig, RunConfig, TrainConfig, replace_fields
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import image_folder
from lape_ray.data.sources.names import named
from lape_ray.inference.checkpoints import open_predictor
from lape_ray.inference.evaluate import config_for, evaluate_checkpoint, evaluation
from lape_ray.model import build_model
from lape_ray.report.robustness import measure_robustness
from lape_ray.training import checkpoint
from lape_ray.training.initial import load_initial
from lape_ray.training.loss import load_teacher
from lape_ray.training.preflight import check_other_weights

BIRDS = ("hen", "jay", "kite", "wren")
SHADES = dict(zip(BIRDS, (20, 90, 160, 230), strict=True))
MODEL = ModelConfig(
    embed_dim=32, depth=1, num_heads=2, image_size=16, patch_size=8, num_classes=4, position="none"
)


def folder_of(root: Path, name_of: dict[str, str]) -> Path:
    """Write three images of each bird's shade into the class folder that `name_of` gives the bird."""
    for bird, name in name_of.items():
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 18), (SHADES[bird] + number,) * 3).save(root / name / f"{number}.png")
    return root


def beton(path: Path, names: Sequence[str], birds: Sequence[str] = BIRDS) -> str:
    """Write a file with these birds, whose classes, which are sorted, are called `names`."""
    source = image_folder(folder_of(path.with_suffix(""), dict(zip(birds, names, strict=True))))
    write_beton(source, path, workers=1)
    return str(path)


def knows_shades() -> torch.nn.Module:
    """Return a network that tells the birds, in the order of BIRDS, by their brightness."""
    torch.manual_seed(0)
    network = build_model(MODEL)
    rng = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    data = DataConfig()
    shades = torch.tensor([SHADES[bird] for bird in BIRDS], dtype=torch.float32)
    for _ in range(150):
        label = torch.randint(4, (32,), generator=rng)
        level = (shades[label] + 4 * torch.rand(32, generator=rng)) / 255
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (data.mean, data.std))
        images = (level.view(-1, 1, 1, 1).expand(-1, 3, 16, 16) - mean) / std
        loss = torch.nn.functional.cross_entropy(network(images), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    return network.eval()


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return knows_shades()


def config(val: str = "", train: str = "") -> TrainConfig:
    data = DataConfig(val=val, train=train, batch_size=4, upscale=True)
    return TrainConfig(model=MODEL, data=data, run=RunConfig(device="cpu"))


def ours(folder: Path, network: torch.nn.Module, classes: tuple[str, ...] | None = BIRDS) -> str:
    folder.mkdir()
    facts = checkpoint.Metadata(
        epochs_done=1, steps_done=1, config=config(), metrics={}, world_size=1, classes=classes
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    checkpoint.snapshot(model=network, ema=None, optimizer=optimizer, metadata=facts).save(folder)
    return str(folder)


def foreign(path: Path, network: torch.nn.Module) -> str:
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, path
    )
    return str(path)


# --- evaluate -------------------------------------------------------------------------------------------------

OTHER_ORDER = {"wren": "hen", "kite": "jay", "jay": "kite", "hen": "wren"}


def renamed(path: Path) -> str:
    """Write all birds under their names, in a file whose classes are in the opposite order."""
    source = image_folder(
        folder_of(path.with_suffix(""), dict(zip(BIRDS, ("d", "c", "b", "a"), strict=True)))
    )
    names = path.with_suffix(".txt")
    names.write_text("a wren\nb kite\nc jay\nd hen\n")
    write_beton(named(source, str(names)), path, workers=1)
    return str(path)


def test_another_order_is_matched_by_name(
    tmp_path: Path, network: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    mine = ours(tmp_path / "c", network)
    assert evaluate_checkpoint(mine, config(beton(tmp_path / "same.beton", BIRDS)))["acc1"] == 100
    assert not caplog.messages
    other = renamed(tmp_path / "other.beton")
    result = evaluate_checkpoint(mine, config(other))
    assert (result["acc1"], result["images"]) == (100, 12)
    (line,) = caplog.messages
    assert line == f"{other}: its classes are matched by name with 4 of {mine}, which stand in another order"
    by_place = evaluate_checkpoint(foreign(tmp_path / "x.pth", network), config(other))
    assert by_place["acc1"] == 0, "what matching by place gives"


def test_fewer_classes_are_matched_by_name(
    tmp_path: Path, network: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    few = beton(tmp_path / "few.beton", ("kite", "wren"), ("kite", "wren"))
    mine = ours(tmp_path / "c", network)
    assert evaluate_checkpoint(mine, config(few))["acc1"] == 100
    assert "its classes are matched by name with 2 of the 4 of" in caplog.text


def test_robustness_matches_by_name_too(tmp_path: Path, network: torch.nn.Module) -> None:
    from lape_ray.inference.evaluate import val_places

    mine, made = ours(tmp_path / "c", network), config(renamed(tmp_path / "other.beton"))
    weights, _ = checkpoint.read_weights(mine)
    found = {
        places is None: measure_robustness(
            "x", made, weights, device=torch.device("cpu"), places_K=places
        ).shifts[0]
        for places in (None, val_places(mine, made))
    }
    assert found == {True: 0, False: 100}


def test_another_set_is_refused_by_file_and_name(tmp_path: Path, network: torch.nn.Module) -> None:
    mine, other = ours(tmp_path / "c", network), beton(tmp_path / "x.beton", ("hen", "jay", "kite", "owl"))
    with pytest.raises(ValueError) as raised:
        evaluate_checkpoint(mine, config(other))
    assert str(raised.value).startswith(
        f"{other} has other classes than {mine}: 1 of its 4 classes, such as 'owl', are not among the 4 of the "
        "checkpoint, such as 'hen'; write the .beton from class folders of the checkpoint's names, or with "
        "python jobs/write_beton.py --class-names FILE, lines 'FOLDER NAME'"
    )
    (tmp_path / "names.txt").write_text("hen hen\njay jay\nkite kite\nowl wren\n")  # the advice
    source = named(image_folder(tmp_path / "x"), str(tmp_path / "names.txt"))
    write_beton(source, tmp_path / "mended.beton", workers=1)
    assert evaluate_checkpoint(mine, config(str(tmp_path / "mended.beton")))["acc1"] == 100


NUMBERS = ("0", "1", "10", "2")


def test_numbers_sorted_as_text_are_a_warning_for_other_codes_checkpoints(
    tmp_path: Path, network: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    val = beton(tmp_path / "v2.beton", NUMBERS)
    for spec in (foreign(tmp_path / "x.pth", network), ours(tmp_path / "old", network, None)):
        caplog.clear()
        evaluate_checkpoint(spec, config(val))
        (line,) = caplog.messages
        assert line.startswith(
            f"{val}: its classes are whole numbers sorted as text (0, 1, 10, 2, ...), and {spec} does not name its "
        )
        caplog.clear()
        open_predictor(spec, {f"model.{k}": v for k, v in vars(MODEL).items()} | {"data.val": val})
        assert "whole numbers sorted as text" in caplog.text
    caplog.clear()
    mended = beton(tmp_path / "mended.beton", ("0000", "0001", "0002", "0010"))  # the advice
    evaluate_checkpoint(foreign(tmp_path / "x.pth", network), config(mended))
    assert not caplog.messages


def test_names_next_to_other_codes_weights_are_theirs(tmp_path: Path, network: torch.nn.Module) -> None:
    (tmp_path / "hub").mkdir()
    file = tmp_path / "hub/model.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    said = {"pretrained_cfg": {}, "label_names": list(BIRDS)}
    (tmp_path / "hub/config.json").write_text(json.dumps(said))
    assert evaluate_checkpoint(str(file), config(renamed(tmp_path / "other.beton")))["acc1"] == 100
    with pytest.raises(ValueError, match="has other classes than"):
        evaluate_checkpoint(str(file), config(beton(tmp_path / "x.beton", ("hen", "jay", "kite", "owl"))))


# --- teacher and first weights --------------------------------------------------------------------------------


def logits(model: torch.nn.Module) -> torch.Tensor:
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(images)


def test_a_teacher_answers_in_the_order_of_the_students_classes(
    tmp_path: Path, network: torch.nn.Module
) -> None:
    mine = ours(tmp_path / "c", network)
    sizes = {"num_classes": 4, "image_sizes": (16,)}
    teacher = load_teacher(mine, **sizes, classes=BIRDS[::-1], data=DataConfig())
    torch.testing.assert_close(logits(teacher), logits(network).flip(1))
    torch.testing.assert_close(logits(load_teacher(mine, **sizes, classes=BIRDS)), logits(network))
    with pytest.raises(ValueError, match=r"such as 'owl', are not among the 4 of the checkpoint"):
        load_teacher(mine, **sizes, classes=("hen", "jay", "kite", "owl"))
    with pytest.raises(
        ValueError, match=rf"{mine}'.* give --data\.mean 0\.485,0\.456,0\.406 --data\.std 0\.229"
    ):
        load_teacher(mine, **sizes, classes=BIRDS, data=DataConfig(mean=(0.5, 0.5, 0.5)))


def test_the_head_that_a_run_starts_from_goes_by_name(tmp_path: Path, network: torch.nn.Module) -> None:
    mine, fresh = ours(tmp_path / "c", network), build_model(MODEL)
    assert load_initial(fresh, mine, DataConfig(), BIRDS) == []
    torch.testing.assert_close(logits(fresh.eval()), logits(network))
    notes = load_initial(fresh, mine, DataConfig(), BIRDS[::-1])
    assert notes == ["the rows of its head are taken by the names of the classes"]
    torch.testing.assert_close(logits(fresh.eval()), logits(network).flip(1))
    before = build_model(MODEL)
    own = before.head.weight.detach().clone()
    (note,) = load_initial(before, mine, DataConfig(), ("hen", "jay", "kite", "owl"))
    assert re.match(
        r"its head is left out and starts fresh: the data has other classes .* such as 'owl'", note
    )
    assert torch.equal(before.head.weight, own)
    assert torch.equal(before.norm.weight, network.norm.weight)  # type: ignore[arg-type]
    few = build_model(replace_fields(config(), {"model.num_classes": 2}).model)
    load_initial(few, mine, DataConfig(), ("wren", "jay"))
    torch.testing.assert_close(logits(few.eval()), logits(network)[:, [3, 1]])


def test_they_are_checked_before_a_run_begins(
    tmp_path: Path, network: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    mine = ours(tmp_path / "c", network)
    other = beton(tmp_path / "x.beton", ("hen", "jay", "kite", "owl"))
    made = replace_fields(config(other, other), {"optim.teacher": mine})
    with pytest.raises(ValueError, match="has other classes than the teacher"):
        check_other_weights(made)
    check_other_weights(replace_fields(made, {"data.train": renamed(tmp_path / "other.beton")}))
    assert "are matched by name with 4 of the teacher" in caplog.text
    numbers = beton(tmp_path / "numbers.beton", NUMBERS)
    file = foreign(tmp_path / "x.pth", network)
    (note,) = load_initial(build_model(MODEL), file, DataConfig(train=numbers), NUMBERS)
    assert "whole numbers sorted as text" in note


# --- class names ----------------------------------------------------------------------------------------------


def test_bare_names_go_to_numbers_in_their_order(tmp_path: Path) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    for number in range(12):
        (tmp_path / "f" / str(number)).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "f" / str(number) / "x.png")
    source = image_folder(tmp_path / "f")
    assert source.classes[2] == "10"
    (tmp_path / "names.txt").write_text("\n".join(words))
    found = named(source, str(tmp_path / "names.txt")).classes
    assert {int(folder): name for folder, name in zip(source.classes, found, strict=True)} == dict(
        enumerate(words)
    )
    (tmp_path / "f/1").rename(tmp_path / "f/02")
    with pytest.raises(
        ValueError,
        match=r"names\.txt has bare names, .* are numbers with gaps or repeats, from 0 to 11; give lines",
    ):
        named(image_folder(tmp_path / "f"), str(tmp_path / "names.txt"))


# --- what weights say of their images -------------------------------------------------------------------------


def test_timms_config_is_followed_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.safetensors").touch()
    said = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "crop_pct": 0.9, "interpolation": "bilinear",
            "input_size": [3, 384, 384]}  # fmt: skip
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "x", "num_classes": 10, "pretrained_cfg": said})
    )
    made = config_for(str(tmp_path / "model.safetensors"), "deit_tiny_basic", {"data.eval_crop": 1.0})
    assert (made.data.mean, made.data.std, made.data.interpolation) == (
        (0.5,) * 3,
        (0.25, 0.5, 0.5),
        "bilinear",
    )
    assert (made.data.eval_crop, made.model.image_size, made.model.num_classes) == (1.0, 384, 10)
    (line,) = caplog.messages
    assert (
        "its config.json is followed, as by --model.num_classes 10 --data.mean 0.5,0.5,0.5 --data.std 0.25,"
        in line
    )
    said["crop_mode"] = "border"
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": said}))
    with pytest.raises(
        ValueError, match=r"config\.json: crop_mode is 'border', and only 'center' is known; mend or"
    ):
        config_for(str(tmp_path / "model.safetensors"), None, {})


def test_a_table_that_is_resized_is_said(
    tmp_path: Path, network: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    sizes = {f"model.{name}": value for name, value in vars(MODEL).items()} | {"model.position": "learnable"}
    small = build_model(replace_fields(config(), sizes).model)
    file = foreign(tmp_path / "x.pth", small)
    val = beton(tmp_path / "val.beton", BIRDS)
    larger = sizes | {"model.image_size": 32}
    evaluate_checkpoint(file, replace_fields(config(val), larger))
    open_predictor(file, larger | {"data.val": val})
    line = f"{file}: pos_embed resized from (1, 5, 32) to (1, 17, 32)"
    assert caplog.messages == [line, line]


def test_the_line_of_a_result_says_what_was_seen(
    tmp_path: Path, network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a relative path, too, and one with a ~."""
    ours(tmp_path / "c", network)
    beton(tmp_path / "val.beton", BIRDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    line = evaluation("c", overrides={"data.val": "val.beton"})
    assert line.startswith("12 images  top-1 100.000  top-5 100.000  loss ")
    assert line.endswith("  (16 px, crop 0.875 of the shorter side, bicubic)")
    other = evaluation("~/c", overrides={"data.val": "~/val.beton", "data.eval_crop": 1.0})
    assert other.endswith("  (16 px, crop 1 of the shorter side, bicubic)")
