"""Every family with every join goes where a checkpoint goes: predict, evaluate, timm's layout, official names, ONNX."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import SMALL, joins_of
from helpers.networks import perturbed
from PIL import Image

from lape_ray.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import image_folder
from lape_ray.inference import onnx, serving
from lape_ray.inference.classify import classify_folder
from lape_ray.inference.evaluate import evaluation
from lape_ray.inference.export import write_pyfunc
from lape_ray.inference.official import export_official, official_state
from lape_ray.inference.predict import NormalizedModel, Predictor, make_predictor
from lape_ray.inference.timm import export_timm
from lape_ray.model import build_model, resolve
from lape_ray.training import checkpoint
from lape_ray.training.architecture import network_of
from lape_ray.training.checkpoint import Metadata
from lape_ray.training.initial import load_initial
from lape_ray.training.recompute import optimise_blocks

CELLS = [(family, join) for family in SMALL for join in joins_of(family)]
PUBLISHED = [cell for cell in CELLS if cell[0] not in ("vit_lite", "cvt", "cct")]


def made(family: str, **fields: Any) -> TrainConfig:
    return TrainConfig(model=ModelConfig(**{**SMALL[family], **fields}), run=RunConfig(device="cpu"))


def predictor_of(config: TrainConfig) -> Predictor:
    model = NormalizedModel(optimise_blocks(perturbed(config.model)), config.data).eval()
    return Predictor(model=model, config=config, classes=tuple("abcde"), device=torch.device("cpu"))


def images(count: int = 3) -> torch.Tensor:
    return torch.randint(
        256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten coloured rectangles in five class folders."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(10):
        (root / "abcde"[index % 5]).mkdir(exist_ok=True)
        colours = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((48, 40)).save(root / "abcde"[index % 5] / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def beton(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "val.beton"
    write_beton(image_folder(pictures), str(path), workers=1)
    return path


@pytest.mark.parametrize("family", SMALL)
def test_evaluation_and_prediction_agree(family: str, pictures: Path, beton: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=made(family, join="lape", bias="relative2d").model,
        data=DataConfig(val=str(beton), eval_crop=1.0),
        run=RunConfig(device="cpu"),
    )
    facts = Metadata(
        epochs_done=1, steps_done=1, config=config, metrics={}, world_size=1, classes=tuple("abcde")
    )
    network = perturbed(config.model)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    (tmp_path / "checkpoint").mkdir()
    snapshot = checkpoint.snapshot(model=network, ema=None, optimizer=optimizer, metadata=facts)
    snapshot.save(tmp_path / "checkpoint")
    folder = str(tmp_path / "checkpoint")
    told = classify_folder(folder, str(pictures), overrides={}, csv=str(tmp_path / "out.csv"), top=1)
    assert (told.images, told.skipped) == (10, 0)
    with (tmp_path / "out.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    right = sum(row["class_1"] == Path(row["image"]).parent.name for row in rows)
    line = evaluation(folder, overrides={})
    assert line.startswith(f"10 images  top-1 {10 * right:.3f}  top-5 100.000"), line
    assert len({row["probability_1"] for row in rows}) == 10, "every picture has its own answer"


@pytest.mark.parametrize(("family", "join"), CELLS)
def test_weights_come_back(family: str, join: str, tmp_path: Path) -> None:
    """From timm's layout, and as MLflow serves them."""
    config = made(family, join=join)
    predictor = predictor_of(config)
    expected = predictor.model(images())
    export_timm(predictor, tmp_path / "timm")
    again = make_predictor(str(tmp_path / "timm/model.safetensors"), config)
    assert torch.equal(again.model(images()), expected)
    served = serving._load_pyfunc(str(write_pyfunc(predictor, tmp_path / "served")))
    assert torch.equal(served.predictor.model(images()), expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize("family", ["deit", "distilled", "swin"])
def test_no_position_comes_back_from_timms_zeros(family: str, tmp_path: Path) -> None:
    config = made(family, position="none")
    predictor = predictor_of(config)
    assert export_timm(predictor, tmp_path).startswith("timm.create_model")
    again = make_predictor(str(tmp_path / "model.safetensors"), config)
    assert torch.equal(again.model(images()), predictor.model(images()))


# --- timm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["relative2d", "none"])
def test_timm_loads_a_swin(bias: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    predictor = predictor_of(made("swin", position="none", bias=bias, window_size=4))
    line = export_timm(predictor, tmp_path)
    assert line == f'timm.create_model("local-dir:{tmp_path}", pretrained=True)'
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert theirs.pretrained_cfg["architecture"] == "swin_tiny_patch4_window7_224"
    with torch.inference_mode():
        expected = predictor.model(images())
        torch.testing.assert_close(
            theirs(predictor.model.normalize(images())), expected, atol=1e-5, rtol=1e-5
        )
        assert expected.std() > 0.1
    found = network_of(tmp_path / "model.safetensors")
    assert found is not None
    assert resolve(found) == resolve(predictor.config.model)
    assert (found.position, found.bias) == ("none", bias)
    another = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert another(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("swin", {}, "timm's Swin has no position=learnable"),
        ("swin", {"position": "none", "bias": "alibi2d"}, "timm's Swin has no bias=alibi2d"),
        (
            "swin",
            {"position": "none", "bias": "relative2d", "bias_join": "lape"},
            "timm has no bias_join=lape",
        ),
        ("swin", {"position": "none", "rotary": "axial"}, "timm's Swin has no rotary=axial"),
        ("t2t", {}, "timm has no t2t_vit_7"),
    ],
)
def test_what_timm_has_not(family: str, fields: dict[str, str], reason: str, tmp_path: Path) -> None:
    assert export_timm(predictor_of(made(family, **fields)), tmp_path).endswith(reason)


# --- official names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize(("family", "join"), PUBLISHED)
def test_official_names_come_back(family: str, join: str, ending: str, tmp_path: Path) -> None:
    config = made(family, join=join, bias="relative2d", bias_join="lape")
    predictor = predictor_of(config)
    export_official(predictor, tmp_path / f"w{ending}")
    network = build_model(config.model)
    assert load_initial(network, str(tmp_path / f"w{ending}"), config.data, None) == []
    again = NormalizedModel(network, config.data).eval()
    torch.testing.assert_close(again(images()), predictor.model(images()), atol=1e-5, rtol=1e-5)


NAMES = {
    "deit": """patch_embed.proj.weight pos_embed cls_token blocks.2.pe_norm.bias blocks.0.mlp.fc1.weight head.bias""",
    "distilled": """dist_token head_dist.weight blocks.1.pe_norm.weight""",
    "t2t": """tokens_to_token.attention1.kqv.weight tokens_to_token.attention2.w tokens_to_token.project.bias pos_embed
        blocks.0.attn.qkv.weight blocks.2.pe_norm.weight norm.weight""",
    "ceit": """i2t.backbone.conv.weight i2t.backbone.bn.running_var i2t.proj.bias pos_layer_embed
        blocks.0.leff.conv2.bias blocks.1.leff.bn3.num_batches_tracked blocks.0.pe_norm.weight
        lca.feedforward.fc1.weight lca.attn.proj.bias""",
    "swin": """absolute_pos_embed patch_embed.norm.bias head.weight layers.0.downsample.reduction.weight
        layers.2.downsample.norm.bias layers.1.blocks.1.pe_norm.bias
        layers.0.blocks.1.attn.relative_position_bias_table""",
}


@pytest.mark.parametrize("family", NAMES)
def test_official_names(family: str) -> None:
    """Those of the published code, and none of this package's own."""
    bias = "relative2d" if family == "swin" else "none"
    found = official_state(build_model(made(family, join="lape", bias=bias).model))
    assert set(NAMES[family].split()) <= found.keys()
    assert not [name for name in found if re.search(r"join|bias\.|table_LRH|norms", name)]


def test_official_tables_of_the_papers_code() -> None:
    """One for each layer under its number; LaPE's DeiT keeps its 1-D table without the dimension of the batch."""
    unshared = official_state(build_model(made("deit", join="unshare").model))
    assert [tuple(unshared[f"pos_embed{layer}"].shape) for layer in range(3)] == [(1, 17, 32)] * 3
    assert "pos_embed" not in unshared


@pytest.mark.parametrize(("family", "shape"), [("deit", (17, 32)), ("t2t", (1, 5, 32))])
def test_official_fixed_tables(family: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    config = made(family, position="sincos1d", join="lape")
    export_official(predictor_of(config), tmp_path / "w.pth")
    holder = torch.load(tmp_path / "w.pth")
    assert list(holder) == ["state_dict" if family == "t2t" else "model"]
    (state,) = holder.values()
    assert state["pos_embed"].shape == shape
    assert load_initial(build_model(config.model), str(tmp_path / "w.pth"), config.data, None) == []


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("cct", {}, "the Compact Transformers' code builds its networks of other parts"),
        ("deit", {"rotary": "axial"}, "no published code of these families has rotary=axial"),
        ("swin", {"bias": "alibi2d"}, "no published code of these families has bias=alibi2d"),
    ],
)
def test_what_has_no_official_names(family: str, fields: dict[str, str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        export_official(predictor_of(made(family, **fields)), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"its name must end with \.safetensors or \.pth"):
        export_official(predictor_of(made("deit")), tmp_path / "w.bin")


# --- ONNX -----------------------------------------------------------------------------------------------------

MISSING = [name for name in onnx.PACKAGES if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("deit", {"bias": "relative2d"}),  # trained, and without a rotation
        ("t2t", {"join": "lape"}),  # whose phi vanish beside the 1e-8 that they are divided by
        ("ceit", {"join": "lape"}),
        ("swin", {"join": "lape", "bias": "relative2d"}),
    ],
    ids=["deit", "t2t", "ceit", "swin"],
)
def test_onnx(family: str, fields: dict[str, str], tmp_path: Path) -> None:
    predictor = predictor_of(made(family, depths=(1, 2, 1, 1) if family == "swin" else None, **fields))
    assert onnx.export_onnx(predictor, tmp_path / "m.onnx", images()) <= 1e-4
    assert onnx.compare_onnx(predictor, tmp_path / "m.onnx", images(1)) <= 1e-4
