"""Checkpoints as other code leaves them: read to the same weights, or refused by one line that says what to give."""

from __future__ import annotations

import argparse
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lape_ray.config import ModelConfig
from lape_ray.model import build_model
from lape_ray.model.convert import load_weights
from lape_ray.training.checkpoint import read_weights
from lape_ray.training.weight_files import CONTAINERS

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 16, "patch_size": 4, "num_classes": 5}
MODEL = ModelConfig(**SIZES)  # type: ignore[arg-type]
State = dict[str, Tensor]


def weights(seed: int = 0, **changes: object) -> State:
    torch.manual_seed(seed)
    model = ModelConfig(**{**SIZES, **changes})  # type: ignore[arg-type]
    return {name: torch.randn_like(value) for name, value in build_model(model).state_dict().items()}


RAW, AVERAGE = weights(0), weights(1)


def named(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def saved(folder: Path, holder: object, name: str = "x.pth", **options: Any) -> Path:
    torch.save(holder, folder / name, **options)
    return folder / name


def loaded(file: Path, *, ema: bool = False, model: ModelConfig = MODEL, new_head: bool = False) -> State:
    network = build_model(model)
    load_weights(network, read_weights(file, ema=ema)[0], new_head=new_head)
    return dict(network.state_dict())


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


EXTRAS = {
    "epoch": 3,
    "arch": "deit_tiny",
    "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
    "args": argparse.Namespace(lr=np.float64(1e-3), seed=np.int64(3), names=[Path("x")]),
    "best": np.float32(71.5),
    "curve": np.arange(3.0),
    "metric": np.str_("top-1"),
}


@pytest.mark.parametrize("entry", CONTAINERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_entry_with_the_weights_is_found(tmp_path: Path, entry: str, zipped: bool) -> None:
    file = saved(tmp_path, {**EXTRAS, entry: RAW}, _use_new_zipfile_serialization=zipped)
    same(loaded(file), RAW)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.module._orig_mod.", "backbone."],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_any_prefix_is_taken_off(tmp_path: Path, prefix: str, ending: str) -> None:
    file = tmp_path / f"x.{ending}"
    beside = {"n_averaged": torch.tensor(3), "criterion.weight": torch.zeros(2)}
    state = named(prefix, RAW) | beside
    save_file(state, file) if ending == "safetensors" else torch.save({"state_dict": state}, file)
    same(loaded(file), RAW)


def test_a_head_behind_a_backbone_is_taken(tmp_path: Path) -> None:
    body = {name: value for name, value in RAW.items() if not name.startswith("head")}
    head = {name: value for name, value in RAW.items() if name.startswith("head")}
    same(loaded(saved(tmp_path, {"state_dict": named("model.backbone.", body) | named("model.", head)})), RAW)


@pytest.mark.parametrize(
    "holder",
    [
        {"model": RAW, "model_ema": AVERAGE},
        {"state_dict": RAW, "state_dict_ema": named("module.", AVERAGE)},
        {"model": RAW, "ema": {"module": AVERAGE, "decay": 0.999}},
        {"state_dict": named("model.", RAW) | named("ema_model.module.", AVERAGE)},
        {"state_dict": named("net.", RAW) | named("ema.", AVERAGE)},
    ],
    ids=["deit", "timm", "nested", "lightning", "prefix"],
)
def test_ema_takes_a_foreign_average(
    tmp_path: Path, holder: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    file = saved(tmp_path, holder)
    same(loaded(file, ema=True), AVERAGE)
    assert not caplog.messages
    same(loaded(file), RAW)
    if "state_dict" not in holder or "state_dict_ema" in holder:
        assert re.search(rf"{file} also holds a moving average, '\w+', which --ema takes", caplog.text)


def test_ema_without_an_average_is_refused(tmp_path: Path) -> None:
    for holder in ({"model": RAW}, RAW, named("module.", RAW)):
        with pytest.raises(ValueError, match=r"x\.pth holds no moving average; leave --ema out$"):
            read_weights(saved(tmp_path, holder), ema=True)


def test_a_file_with_nothing_but_an_average_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = saved(tmp_path, {"model_ema": AVERAGE, "epoch": 3})
    same(loaded(file), AVERAGE)
    assert caplog.messages == [f"{file} holds nothing but a moving average, 'model_ema', which is taken"]


def test_of_dinos_two_networks_the_teacher_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = {name: value for name, value in AVERAGE.items() if not name.startswith("head")}
    projection = {"head.mlp.0.weight": torch.zeros(3, 3), "head.last_layer.weight_v": torch.zeros(3, 3)}
    holder = {"student": named("module.backbone.", RAW), "teacher": named("backbone.", body) | projection}
    found = loaded(saved(tmp_path, holder), new_head=True)
    same({name: found[name] for name in body}, body)
    assert "the teacher is taken, as DINO does" in caplog.text


def test_several_networks_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.pth holds 2 networks, 'a\.', 'b\.'; save one of them alone"):
        read_weights(saved(tmp_path, named("a.", RAW) | named("b.", AVERAGE)))


# --- objects of other packages --------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_configs_of_other_packages_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """Of packages that are gone when the file is read."""
    holder: dict[str, Any] = {"model": RAW}
    with monkeypatch.context() as there:
        for place, name in (
            ("yacs.config", "CfgNode"),
            ("pytorch_lightning.utilities.parsing", "AttributeDict"),
        ):
            kind = type(name, (dict,), {"__module__": place})
            parts = place.split(".")
            for count in range(1, len(parts) + 1):
                module = types.ModuleType(".".join(parts[:count]))
                there.setitem(sys.modules, module.__name__, module)
            setattr(module, name, kind)
            holder[name] = kind(lr=1e-3)
            holder[name].frozen = True
        file = saved(tmp_path, holder, _use_new_zipfile_serialization=zipped)
    assert "yacs" not in sys.modules
    same(loaded(file), RAW)
    assert "yacs" not in sys.modules, "nothing is imported"


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.file}",)


def test_what_could_run_code_is_refused_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path, {"model": RAW, "args": Runs(tmp_path / "ran")})
    with pytest.raises(
        ValueError, match=r"x\.pth holds more than tensors: posix\.system, which could run code"
    ):
        read_weights(file)
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=16, patch_size=4,
                                num_classes=5)  # fmt: skip
    file = saved(tmp_path, network)
    with pytest.raises(
        ValueError, match=r"holds more than tensors: timm\.models\.vision_transformer"
    ) as raised:
        read_weights(file)
    assert "torch.save({'model': MODEL.state_dict()}, 'weights.pth')" in str(raised.value)
    trusted = torch.load(file, weights_only=False)  # the advice
    same(loaded(saved(tmp_path, {"model": trusted.state_dict()}, "weights.pth")), dict(network.state_dict()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(
        ValueError, match=r"x\.pt is a TorchScript program; save its weights alone: "
    ) as raised:
        read_weights(tmp_path / "x.pt")
    advice = str(raised.value).partition("alone: ")[2]
    exec(advice.replace("'weights.pth'", f"'{tmp_path}/weights.pth'"), {"torch": torch})
    assert read_weights(tmp_path / "weights.pth")[0].keys() == {"weight", "bias"}
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    with pytest.raises(
        ValueError, match=r"x\.npz is a \.npz file of another framework; give timm's or PyTorch's"
    ):
        read_weights(tmp_path / "x.npz")


# --- networks of other kinds ----------------------------------------------------------------------------------


def test_a_backbone_without_a_head(tmp_path: Path) -> None:
    """To go on from, and not to evaluate."""
    network = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=16, patch_size=4,
                                num_classes=0)  # fmt: skip
    file = saved(tmp_path, network.state_dict())
    with pytest.raises(
        ValueError, match=r"missing head\.weight.*it has no classifier.*--training\.init_from$"
    ):
        loaded(file)
    model = build_model(MODEL)
    fresh = model.head.weight.detach().clone()
    notes = load_weights(model, read_weights(file)[0], new_head=True)
    assert notes == ["head.weight starts fresh: the checkpoint has none"]
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, network.blocks[1].mlp.fc2.weight)


def test_a_whole_mae_is_a_backbone(tmp_path: Path) -> None:
    body = {name: value for name, value in RAW.items() if not name.startswith("head")}
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
    model = build_model(MODEL)
    notes = load_weights(model, read_weights(saved(tmp_path, {"model": body | decoder}))[0], new_head=True)
    assert notes[0] == "mask_token and 1 more left out: they are of its pre-training"
    same({name: model.state_dict()[name] for name in body}, body)


@pytest.mark.parametrize(
    ("state", "model", "words"),
    [
        (weights(variant="deit_tiny_distilled"), {}, "token: choose the --model.variant with _distilled"),
        (RAW, {"variant": "deit_tiny_distilled"}, "it has no distillation token: choose the --model.variant without"),
        (weights(embed_dim=384, depth=12), {"depth": 12}, "12 blocks of width 384: choose --model.variant deit_small"),
        (weights(depth=3), {}, "it has 3 blocks of width 32"),
        (RAW | {"blocks.0.gamma_1": torch.ones(32), "pos_embed": RAW["pos_embed"][:, 1:]}, {}, "LayerScale"),
        (RAW | {"blocks.0.ls1.gamma": torch.ones(32)}, {}, "LayerScale"),
        ({"tokens_to_token.project.weight": torch.ones(2)}, {}, "a T2T-ViT"),
        ({f"layers.{i}.blocks.0.norm1.weight": torch.ones(2) for i in (0, 1)}, {}, "Swin"),
        ({"layer1.0.conv1.weight": torch.ones(2)}, {}, "torchvision:NAME:FILE"),
        ({"vit.embeddings.cls_token": torch.ones(2)}, {}, "Hugging Face"),
        ({"encoder.layers.encoder_layer_0.ln_1.weight": torch.ones(2)}, {}, "torchvision's names"),
    ],
    ids=["distilled", "undistilled", "width", "depth", "deit3", "timm-deit3", "t2t", "swin", "resnet", "hub", "vit"],
)  # fmt: skip
def test_other_networks_are_named(state: State, model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_weights(build_model(ModelConfig(**{**SIZES, **model})), state)  # type: ignore[arg-type]


def test_the_variant_that_is_advised_loads() -> None:
    state = weights(variant="deit_small", embed_dim=384, depth=12, num_heads=6)
    sizes = {name: SIZES[name] for name in ("image_size", "patch_size", "num_classes")}
    with pytest.raises(ValueError, match=r"choose --model\.variant deit_small$"):
        load_weights(build_model(ModelConfig(variant="deit_tiny", **sizes)), state)  # type: ignore[arg-type]
    assert load_weights(build_model(ModelConfig(variant="deit_small", **sizes)), state) == []  # type: ignore[arg-type]


def test_a_folder_of_the_hub_is_told_by_its_file(tmp_path: Path) -> None:
    save_file(RAW, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"no checkpoint of ours: it has no meta\.json; .* give (\S+)$"
    ) as raised:
        read_weights(tmp_path)
    same(loaded(Path(str(raised.value).split()[-1])), RAW)
