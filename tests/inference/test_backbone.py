"""The written backbone computes the network's maps without this package, at its size and at others, and trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import SMALL, joins_of
from helpers.networks import perturbed
from safetensors.torch import load_file, save_file

from lape_ray.config import ModelConfig, RunConfig, TrainConfig
from lape_ray.inference import backbone
from lape_ray.inference.backbone import SUPPORTED, TEMPLATE, export_backbone, feature_maps, load_module
from lape_ray.inference.predict import NormalizedModel, Predictor
from lape_ray.inference.timm import export_timm
from lape_ray.model import Network, build_model
from lape_ray.model.convert import load_weights
from lape_ray.model.position import Layout, build_position
from lape_ray.model.vit import VisionTransformer
from lape_ray.training.recompute import optimise_blocks

CELLS: list[tuple[str, dict[str, Any]]] = [
    *(("deit", {"join": join}) for join in joins_of("deit")),
    *(("swin", {"join": join}) for join in joins_of("swin")),
    *((family, {"join": "lape"}) for family in ("distilled", "vit_lite", "cvt")),
    ("deit", {"position": "none", "bias": "relative2d", "bias_join": "lape", "rotary": "mixed"}),
    ("deit", {"position": "sincos1d", "join": "share", "bias": "alibi2d", "rotary": "axial"}),
    ("deit", {"position": "sincos2d", "join": "lape", "rotary": "spiral"}),
    ("deit", {"join": "lape", "pool": "gap"}),
    ("swin", {"position": "sincos2d", "join": "lape", "bias": "relative2d", "rotary": "mixed"}),
]
# Ours where its sizes allow: any grid of a ViT; a Swin is square.
OTHER = dict.fromkeys(SMALL, (48, 24)) | {"swin": (64, 64)}
ALONE = """
import importlib.util, pathlib, sys
sys.modules["lape_ray"] = None
import torch
from safetensors.torch import load_file, save_file

for folder in map(pathlib.Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location("backbone", folder / "backbone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backbone = module.Backbone(out_indices=(0, 1, -1)).eval()
    maps = {}
    for name, images in load_file(folder / "images.safetensors").items():
        maps |= {f"{name}.{index}": map.contiguous() for index, map in enumerate(backbone(images))}
    (maps["own.2"].square().mean() + maps["other.1"].square().mean()).backward()
    silent = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == ["norm.weight", "norm.bias"], silent
    assert backbone.patch_embed.weight.grad.norm() > 0
    save_file({name: map.detach() for name, map in maps.items()}, folder / "maps.safetensors")
"""


def predictor_of(family: str, **fields: Any) -> Predictor:
    """Ready to be exported, as a checkpoint is opened: with optimised blocks."""
    config = TrainConfig(model=ModelConfig(**{**SMALL[family], **fields}), run=RunConfig(device="cpu"))
    model = NormalizedModel(optimise_blocks(perturbed(config.model)), config.data).eval()
    return Predictor(model=model, config=config, classes=tuple("abcde"), device=torch.device("cpu"))


def backbone_of(folder: Path, **options: Any) -> Any:
    return load_module(folder / "backbone.py").Backbone(**options).eval()


def of_another_size(model: ModelConfig, state: dict[str, torch.Tensor], size: tuple[int, int]) -> Network:
    """The network at a size with its own resizing; a ViT's position embeddings are made for any grid."""
    if model.variant.startswith("swin"):
        assert size[0] == size[1]
        network = build_model(ModelConfig(**{**vars(model), "image_size": size[0]}))
    else:
        network = build_model(model)
        assert isinstance(network, VisionTransformer)
        network.grid = (size[0] // 8, size[1] // 8)
        names = {name: getattr(model, name) for name in ("position", "join", "bias", "bias_join", "rotary")}
        layout = Layout(network.grid, network.num_prefix, 3, 2, 32)
        position = build_position(layout, **names, eps=network.norm.eps, std=0.02)  # type: ignore[arg-type]
        network.pos_embed, network.join, network.bias, network.rotary, *_ = position
    load_weights(network, state)
    return network.eval()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "peg"}, "position=peg is not written as a backbone; those that are: none, learnable"),
        ({"join": "mpvg", "pool": "gap"}, "join=mpvg is not written as a backbone"),
        *(({"bias": bias}, f"bias={bias} is not") for bias in ("log_cpb", "lookhere", "pape", "irpe_k")),
    ],
)
def test_what_the_template_has_not_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_backbone(predictor_of("deit", **fields), tmp_path / "backbone")
    assert not (tmp_path / "backbone").exists()


def test_maps_alone_equal_the_networks(tmp_path: Path) -> None:
    """In an interpreter that cannot import this package; every parameter but the last norm's gets a gradient."""
    folders, expected = [], []
    for number, (family, fields) in enumerate(CELLS):
        predictor, folder = predictor_of(family, **fields), tmp_path / str(number)
        export_backbone(predictor, folder)
        state, model = predictor.model.network.state_dict(), predictor.config.model
        images = {"own": torch.randn(2, 3, 32, 32), "other": torch.randn(2, 3, *OTHER[family])}
        save_file(images, folder / "images.safetensors")
        ours = {}
        for name, batch in images.items():
            network = of_another_size(model, state, tuple(batch.shape[-2:]))
            with torch.inference_mode():
                maps = feature_maps(network, batch)
            ours |= {f"{name}.{place}": maps[index] for place, index in enumerate((0, 1, -1))}
        folders.append(str(folder))
        expected.append(ours)
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, (family, fields), ours in zip(folders, CELLS, expected, strict=True):
        theirs = load_file(Path(folder) / "maps.safetensors")
        assert theirs.keys() == ours.keys()
        for name, ours_map in ours.items():
            # relative to the map, for these random weights make some large
            error = (theirs[name] - ours_map).abs().max() / ours_map.abs().max()
            assert error < 1e-5, f"{family} {fields} {name}: {error:.1e}"


def test_maps_are_timms(tmp_path: Path) -> None:
    """Of a ViT and of a Swin, whose grids are no squares."""
    timm = pytest.importorskip("timm")
    for family, size, fields in (
        ("deit", (32, 32), {}),
        ("swin", (64, 96), {"position": "none", "bias": "relative2d", "window_size": 2}),
        # no window shifts here, and 18 x 26 tokens are padded to windows and to pairs
        (
            "swin",
            (36, 52),
            {"position": "none", "bias": "relative2d", "window_size": 2, "depths": (1, 1, 1, 1)},
        ),
    ):
        folder = tmp_path / f"{family}-{size[0]}"
        predictor = predictor_of(family, **fields)
        export_timm(predictor, folder / "timm")
        export_backbone(predictor, folder / "backbone")
        chosen = {"features_only": True, "out_indices": (0, 1, 2), "img_size": size}
        theirs = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True, **chosen).eval()
        ours, images = backbone_of(folder / "backbone", out_indices=(0, 1, 2)), torch.randn(2, 3, *size)
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert ours.feature_info.reduction() == theirs.feature_info.reduction()
        with torch.inference_mode():
            for our_map, their_map in zip(ours(images), theirs(images), strict=True):
                their_map = their_map.permute(0, 3, 1, 2) if family == "swin" else their_map
                torch.testing.assert_close(our_map, their_map, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["deit", "swin"])
def test_tables_of_a_chosen_size(family: str, tmp_path: Path) -> None:
    """They are parameters of that size, for fine-tuning, and give the maps that resizing gives."""
    export_backbone(predictor_of(family, join="lape", bias="relative2d", bias_join="lape"), tmp_path)
    resizing, stored = (backbone_of(tmp_path, img_size=size) for size in (None, [64, 96]))
    patch = SMALL[family]["patch_size"]
    assert stored.pos_embed.shape[1] == (64 // patch) * (96 // patch) + (family == "deit")
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        for one, other in zip(resizing(images), stored(images), strict=True):
            torch.testing.assert_close(one, other)
    assert {p.requires_grad for p in stored.parameters()} == {True}


def test_norm_and_default_maps(tmp_path: Path) -> None:
    export_backbone(predictor_of("deit"), tmp_path / "vit")
    plain, normed = (backbone_of(tmp_path / "vit", norm=norm) for norm in (False, True))
    assert plain.outputs == [0, 1, 2]
    images = torch.randn(1, 3, 32, 32)
    tokens = plain(images)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(normed(images)[-1].flatten(2).transpose(1, 2), plain.norm(tokens))
    export_backbone(predictor_of("swin"), tmp_path / "swin")
    swin = backbone_of(tmp_path / "swin")
    assert swin.outputs == [0, 1, 2, 3]
    assert [tuple(each.shape[1:]) for each in swin(images)] == [
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
    ]


def test_stochastic_depth_is_of_training(tmp_path: Path) -> None:
    export_backbone(predictor_of("deit"), tmp_path)
    dropping, images = backbone_of(tmp_path, drop_path_rate=0.5), torch.randn(8, 3, 32, 32)
    assert torch.equal(dropping(images)[-1], backbone_of(tmp_path)(images)[-1])
    torch.manual_seed(0)
    first, *_, last = zip(dropping(images), dropping.train()(images), strict=True)
    assert torch.equal(*first)
    assert not torch.equal(*last)


def test_timm_builds_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    export_backbone(predictor_of("deit", join="lape"), tmp_path)
    module = load_module(tmp_path / "backbone.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.register("lape_test")
    theirs = timm.create_model("lape_test", pretrained=True, features_only=True, out_indices=(1, 2)).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(theirs(images)[0], backbone_of(tmp_path, out_indices=(1,))(images)[0])
    assert theirs.feature_info.channels() == [32, 32]
    with pytest.raises(ValueError, match="lape_test has no classifier; give features_only=True"):
        timm.create_model("lape_test", features_only=False)


@pytest.mark.parametrize("family", ["cct", "t2t", "ceit"])
def test_other_families_are_refused(family: str, tmp_path: Path) -> None:
    assert {"deit_tiny", "deit_base_distilled", "cvt_7_4", "swin_tiny"} < set(SUPPORTED)
    with pytest.raises(
        ValueError, match=r"is not written as a backbone.* those that are: deit_tiny, .*swin_base"
    ):
        export_backbone(predictor_of(family), tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"share": [w] * depth, ', "", "KeyError: 'share'"),
        ("bias=qkv_bias", "bias=False", r'Unexpected key.*"stages\.0\.blocks\.0\.attn\.qkv\.bias"'),
        ("[w] * depth", "[w] + [None] * (depth - 1)", r"its maps differ by \d.* of their largest value"),
    ],
    ids=["unknown", "other-weights", "other-values"],
)
def test_what_a_backbone_does_not_compute_is_refused(
    old: str, new: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written folder is compared with the network, whatever a network may learn to do."""
    text = TEMPLATE.read_text()
    assert text.count(old) == 1
    (tmp_path / "template.py").write_text(text.replace(old, new))
    monkeypatch.setattr(backbone, "TEMPLATE", tmp_path / "template.py")
    with pytest.raises(ValueError, match=rf"backbone\.py does not compute this network: .*{reason}"):
        export_backbone(predictor_of("deit", join="share"), tmp_path / "out")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    export_backbone(predictor_of("deit"), tmp_path)
    with pytest.raises(ValueError, match="30 x 32 pixels does not divide by patches of 8; pad it"):
        backbone_of(tmp_path)(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"out_indices=\(0, 3\): 3 is none of the 3 maps"):
        backbone_of(tmp_path, out_indices=(0, 3))
