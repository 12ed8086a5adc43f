"""What other tools get of a checkpoint says what PyTorch says, on real images."""

from __future__ import annotations

import base64
import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from helpers.commands import run_here
from helpers.photographs import write_photographs
from PIL import Image
from safetensors.torch import save_file

from lape_ray.config import DataConfig, ModelConfig, RunConfig, TrackingConfig, TrainConfig
from lape_ray.data.beton import manifest_path, write_beton
from lape_ray.data.sources import image_folder, load_image, to_rgb
from lape_ray.inference import onnx, predict
from lape_ray.inference.checkpoints import class_names, open_predictor
from lape_ray.inference.export import export
from lape_ray.inference.onnx import compare_onnx, export_onnx
from lape_ray.inference.predict import (
    Prediction,
    find_images,
    make_predictor,
    predict_files,
    square,
    to_tensor,
    with_csv,
)
from lape_ray.inference.samples import folder_images, validation_images
from lape_ray.inference.serving import ROOT_VARIABLE, image_from_text, image_to_text
from lape_ray.inference.timm import export_timm
from lape_ray.model import build_model
from lape_ray.training import checkpoint
from lape_ray.training.checkpoint import Metadata

ROOT = Path(__file__).parent.parent.parent
SIZES = {"embed_dim": 64, "depth": 2, "num_heads": 4, "image_size": 64, "patch_size": 16, "num_classes": 6}


def config(
    data: DataConfig | None = None, tracking: TrackingConfig | None = None, **model: object
) -> TrainConfig:
    sized = ModelConfig(**{**SIZES, **model})  # type: ignore[arg-type]
    return TrainConfig(
        model=sized,
        data=data or DataConfig(),
        tracking=tracking or TrackingConfig(),
        run=RunConfig(device="cpu"),
    )


def weights_file(path: Path, made: TrainConfig) -> Path:
    """A file of random weights, norms and biases among them."""
    torch.manual_seed(0)
    network = build_model(made.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs in class folders."""
    return write_photographs(tmp_path_factory.mktemp("photographs"), count=6)


@pytest.fixture(scope="module")
def beton(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "val.beton"
    write_beton(image_folder(photographs), str(path), workers=1)
    return path


def test_prediction_sees_the_pixels_of_evaluation(photographs: Path, beton: Path) -> None:
    """Resizing and cropping one file at a time gives what the loader gives."""
    made = config(DataConfig(val=str(beton), eval_crop=0.875))
    ours = folder_images(photographs, made, 6).int()
    loaders = validation_images(made, 6).int()
    assert ours.shape == loaders.shape == (6, 3, 64, 64)
    assert torch.equal(ours, loaders)


def test_a_sample_leaves_out_what_cannot_be_read(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, images = config(), tmp_path / "images"
    images.mkdir()
    (images / "aaa.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"none of the images of {images} that were tried can be read"):
        folder_images(images, made, 4)
    caplog.clear()
    shutil.copytree(photographs, images, dirs_exist_ok=True)
    assert torch.equal(folder_images(images, made, 7), folder_images(photographs, made, 6))
    (warning,) = caplog.messages
    assert warning.startswith(f"skipped: {images}/aaa.jpg cannot be read")


# --- timm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"variant": "deit_tiny_distilled"},
        {"position": "sincos2d"},
        {"position": "none"},
        {"variant": "deit3_small"},
        {"variant": "deit3_small", "position": "none", "layer_scale": 0.0},
    ],
    ids=["learnable", "distilled", "sincos2d", "none", "deit3", "deit3-none"],
)
def test_timm_loads_the_folder_and_gives_the_same_logits(
    photographs: Path, tmp_path: Path, model: dict[str, str]
) -> None:
    made = config(**model)
    predictor = make_predictor(str(weights_file(tmp_path / "w.safetensors", made)), made)
    line = export_timm(predictor, tmp_path / "timm")
    assert line == f'timm.create_model("local-dir:{tmp_path / "timm"}", pretrained=True)'
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = folder_images(photographs, made, 6)
    with torch.no_grad():
        expected = predictor.model(images)
        torch.testing.assert_close(theirs(predictor.model.normalize(images)), expected, atol=1e-4, rtol=0)
        assert expected.std() > 0.1
    assert theirs.pretrained_cfg["crop_pct"] == 0.875
    assert theirs.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"join": "lape"}, "timm has no join=lape"),
        ({"variant": "cvt_7_4", "image_size": 32, "patch_size": 4}, "timm has no cvt_7_4"),
        ({"bias": "alibi2d"}, "timm's DeiT has no bias=alibi2d"),
    ],
)
def test_what_timm_cannot_load_is_said(tmp_path: Path, model: dict[str, object], reason: str) -> None:
    made = config(**model)
    predictor = make_predictor(str(weights_file(tmp_path / "w.safetensors", made)), made)
    assert export_timm(predictor, tmp_path / "out").endswith(f"timm cannot load it, for {reason}")
    again = make_predictor(str(tmp_path / "out/model.safetensors"), made)
    images = torch.randint(256, (2, 3, again.size, again.size), dtype=torch.uint8)
    torch.testing.assert_close(again.model(images), predictor.model(images))


# --- ONNX -----------------------------------------------------------------------------------------------------

MISSING = [name for name in onnx.PACKAGES if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize(
    "model",
    [
        {"join": "lape"},
        {"bias": "relative2d", "bias_join": "lape", "rotary": "mixed"},
        {"variant": "deit_tiny_distilled"},
        {"variant": "cct_7_3x1", "image_size": 32, "patch_size": None, "depth": 2, "join": "lape"},
    ],
    ids=["lape", "bias-rotary", "distilled", "cct"],
)
def test_onnx_gives_the_logits_of_pytorch(
    photographs: Path, tmp_path: Path, model: dict[str, object]
) -> None:
    made = config(**model)
    predictor = make_predictor(str(weights_file(tmp_path / "w.safetensors", made)), made)
    images = folder_images(photographs, made, 6)
    assert export_onnx(predictor, tmp_path / "m.onnx", images) <= 1e-4
    for batch in (1, 3):
        assert compare_onnx(predictor, tmp_path / "m.onnx", images[:batch]) <= 1e-4
    with torch.no_grad():  # the comparison sees a model that is not the file's
        predictor.model.network.head.bias.add_(1.0)
    assert compare_onnx(predictor, tmp_path / "m.onnx", images) > 0.5


def test_missing_onnx_packages_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx_that_is_not_there", "numpy", "nor_this"))
    with pytest.raises(
        ValueError,
        match=r"needs onnx_that_is_not_there, nor_this, which are not installed: pip install onnx_that_is_not_there",
    ):
        onnx.require_packages()


# --- MLflow ---------------------------------------------------------------------------------------------------


def saved_checkpoint(
    folder: Path, made: TrainConfig, run_id: str | None = None, classes: tuple[str, ...] | None = None
) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    network = build_model(made.model)
    facts = Metadata(
        epochs_done=1,
        steps_done=1,
        config=made,
        metrics={},
        world_size=1,
        classes=classes,
        mlflow_run_id=run_id,
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    checkpoint.snapshot(model=network, ema=None, optimizer=optimizer, metadata=facts).save(folder)
    return folder


def test_mlflow_serves_what_pytorch_says(
    photographs: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = config(DataConfig(val=str(beton)), TrackingConfig(uri=uri), join="lape")
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    folder = saved_checkpoint(tmp_path / "checkpoint", made, run_id)
    (line,) = export(str(folder), overrides={}, mlflow=True, register="digits")
    assert line.endswith(f"logged to MLflow run {run_id}, registered as digits")
    mlflow.set_registry_uri(uri)
    monkeypatch.setenv(ROOT_VARIABLE, str(photographs))
    model = mlflow.pyfunc.load_model("models:/digits/1")
    assert [column.name for column in model.metadata.get_input_schema().inputs] == ["image"]
    names = [column.name for column in model.metadata.signature.outputs.inputs]
    assert names == ["class", "probability", "probabilities"]
    paths = find_images(photographs)
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    predictor = make_predictor(str(folder), made, classes=class_names(made), device=torch.device("cpu"))
    expected = predictor.probabilities([to_rgb(load_image(p.read_bytes(), p.name), p.name) for p in paths])
    for texts in ([f"file:{path.relative_to(photographs)}" for path in paths], encoded):
        answer = model.predict(pd.DataFrame({"image": texts}))
        np.testing.assert_allclose(np.stack(answer["probabilities"]), expected, atol=1e-4)
        assert answer["class"].tolist() == [predictor.classes[k] for k in expected.argmax(1)]
    example = model.input_example
    assert example["image"][0].startswith("data:image/png;base64,")
    assert client.get_run(run_id).info.status == "RUNNING", "logging a model leaves the run's status alone"


def test_the_example_of_a_request_holds_the_image() -> None:
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    np.testing.assert_array_equal(
        np.asarray(image_from_text(image_to_text(image))), image.permute(1, 2, 0).numpy()
    )


def test_exports_that_cannot_be_are_refused(tmp_path: Path) -> None:
    made = config()
    file = weights_file(tmp_path / "w.safetensors", made)
    overrides = {f"model.{name}": value for name, value in SIZES.items()}
    with pytest.raises(ValueError, match="does not know its MLflow run: give the run's id instead"):
        list(export(str(file), overrides=overrides, mlflow=True))
    with pytest.raises(ValueError, match="--register name needs --mlflow"):
        list(export("is never opened", overrides={}, timm=tmp_path / "t", register="name"))
    with pytest.raises(ValueError, match=r"2 names of classes were given, but .* has 6 classes"):
        make_predictor(str(file), made, classes=("a", "b"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("export.py", "nowhere", "--timm", "t", "--register", "name"), "--register name needs --mlflow"),
        (("predict.py", "nowhere", "f", "--batch", "0"), "--batch: '0' must be a whole number of at least 1"),
        (("predict.py", "nowhere", "f", "--top=-1"), "--top: '-1' must be a whole number of at least 1"),
    ],
    ids=["register", "batch", "top"],
)
def test_options_are_refused_before_anything_is_opened(words: tuple[str, ...], reason: str) -> None:
    job, *options = words
    done = run_here(f"jobs/{job}", *options)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.endswith("(--help lists everything)\n")
    assert done.stderr.count("\n") == 1


# --- names of classes -----------------------------------------------------------------------------------------

ANIMALS = ("tench", "cock", "hen", "ostrich", "jay", "magpie")


def test_names_come_from_the_checkpoint_then_from_the_manifest(
    beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = config(DataConfig(val=str(tmp_path / "gone.beton"), train=str(tmp_path / "gone_too.beton")))
    named = saved_checkpoint(tmp_path / "named", gone, classes=ANIMALS)
    assert open_predictor(str(named), {})[0].classes == ANIMALS
    nameless = str(saved_checkpoint(tmp_path / "nameless", gone))
    wnids = open_predictor(nameless, {"data.val": str(beton)})[0].classes
    assert wnids[0].startswith("n0")
    shutil.copy(manifest_path(beton), tmp_path / "gone_too.beton.json")  # without its images
    assert open_predictor(nameless, {})[0].classes == wnids
    assert not caplog.messages
    (tmp_path / "gone_too.beton.json").unlink()
    assert open_predictor(nameless, {})[0].classes == ("0", "1", "2", "3", "4", "5")
    (warning,) = caplog.messages
    assert warning.startswith(f"{nameless}: classes are named by their number")
    assert "give --data.val" in warning


def test_names_come_from_the_manifests_of_a_set(photographs: Path, tmp_path: Path) -> None:
    source = image_folder(photographs)
    write_beton(source, tmp_path / "val.beton", shards=2, workers=1)
    assert class_names(config(DataConfig(val=str(tmp_path / "val.beton")))) == source.classes


# --- predict --------------------------------------------------------------------------------------------------


def test_predict_names_a_corrupt_image_and_goes_on(photographs: Path, beton: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(photographs, images)
    torn = images / "aaa_torn.jpg"
    torn.write_bytes(find_images(photographs)[0].read_bytes()[:2000])
    (images / "notes.txt").write_text("not an image")
    made = config(DataConfig(val=str(beton)))
    folder = saved_checkpoint(tmp_path / "checkpoint", made)
    done = run_here("jobs/predict.py", folder, images, f"--csv={tmp_path}/out.csv", "--batch=2")
    assert done.returncode == 1, done.stderr
    assert f"skipped: {torn} cannot be read" in done.stderr
    assert "6 images classified, 1 skipped" in done.stdout
    header, skipped, *rows = read_csv(tmp_path / "out.csv")
    assert header == [
        "image", *(f"{what}_{rank}" for rank in range(1, 6) for what in ("class", "probability")), "error"
    ]  # fmt: skip
    assert skipped[:-1] == [str(torn), *[""] * 10]
    assert skipped[-1].startswith(f"{torn} cannot be read")
    assert [row[0] for row in rows] == [str(path) for path in find_images(images)[1:]]
    predictor = make_predictor(str(folder), made, classes=class_names(made), device=torch.device("cpu"))
    first = find_images(images)[1]
    with torch.no_grad():
        image = Image.open(first).convert("RGB")
        expected = predictor.model(to_tensor([square(image, size=64, data=made.data)])).softmax(-1)[0]
    best = expected.topk(5)
    assert rows[0][1:-1:2] == [predictor.classes[k] for k in best.indices]
    np.testing.assert_allclose([float(p) for p in rows[0][2:-1:2]], best.values.numpy(), atol=1e-4)
    assert rows[0][-1] == "", "no error"
    assert rows[0][1].startswith("n0"), "the manifest's names"


def test_a_killed_predict_leaves_the_rows_so_far(photographs: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(photographs, images)
    os.mkfifo(images / "zzz.jpg")  # waits for its reader for ever
    folder = saved_checkpoint(tmp_path / "checkpoint", config(), classes=ANIMALS)
    command = [sys.executable, ROOT / "jobs/predict.py", folder, images, "--csv", tmp_path / "out.csv"]
    with subprocess.Popen([*command, "--batch=2"], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "out.csv").exists() and len(read_csv(tmp_path / "out.csv")) == 7:
                break
            time.sleep(0.1)
        process.kill()
    _, *rows = read_csv(tmp_path / "out.csv")
    assert [row[0] for row in rows] == [str(path) for path in find_images(photographs.parent / images)[:6]]
    assert {row[1] for row in rows} <= set(ANIMALS)


def test_a_row_is_in_the_file_before_the_next_prediction_is_made(tmp_path: Path) -> None:
    seen = []
    odd = os.fsdecode(b"caf\xe9.png")  # a name that is not UTF-8

    def predictions() -> Iterator[Prediction]:
        for name in ("a.png", odd):
            seen.append([row[0] for row in read_csv(tmp_path / "out.csv")])
            yield Prediction(Path(name), (("cat", 0.75),))

    assert len(list(with_csv(predictions(), tmp_path / "out.csv", top=1))) == 2
    assert seen == [["image"], ["image", "a.png"]]
    assert b"caf\xe9.png,cat,0.750000," in (tmp_path / "out.csv").read_bytes()


def read_csv(file: Path) -> list[list[str]]:
    return list(csv.reader(file.read_text().splitlines()))


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no image; known endings are \.jpg"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        find_images(tmp_path / "nowhere")


def test_only_the_corrupt_image_of_a_batch_is_lost(photographs: Path, tmp_path: Path) -> None:
    made = config()
    predictor = make_predictor(str(weights_file(tmp_path / "w.safetensors", made)), made)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    paths = [find_images(photographs)[0], tmp_path / "torn.png", find_images(photographs)[1]]
    first, torn, last = predict_files(predictor, paths, top=2)
    assert (len(first.top), torn.top, len(last.top)) == (2, (), 2)
    assert "torn.png cannot be read" in str(torn.error)


def test_predict_holds_one_whole_image_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config()
    predictor = make_predictor(str(weights_file(tmp_path / "w.safetensors", made)), made)
    alive: list[str] = []

    read = predict.read_image

    def counting(path: Path) -> Image.Image:
        image = read(path)
        alive.append("an image")
        weakref.finalize(image, alive.pop)
        assert len(alive) == 1
        return image

    monkeypatch.setattr(predict, "read_image", counting)
    for number in range(5):
        Image.new("RGB", (90, 70), (number * 40,) * 3).save(tmp_path / f"{number}.png")
    found = list(predict_files(predictor, find_images(tmp_path), batch_size=5))
    assert [len(one.top) for one in found] == [5] * 5


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x.tif").open("wb") as file:
        file.truncate(predict.BYTES + 1)
    with pytest.raises(
        ValueError, match=r"x\.tif cannot be read: it has more than 536,870,912 bytes; give a smaller copy"
    ):
        predict.read_image(tmp_path / "x.tif")


@pytest.mark.slow
def test_a_strip_is_classified_in_little_memory(tmp_path: Path) -> None:
    """Its resized whole would take gigabytes: in the process of a user, with the address space limited."""
    made = config(DataConfig(eval_crop=0.875))
    file = weights_file(tmp_path / "w.safetensors", made)
    (tmp_path / "images").mkdir()
    for name, sides in (("thin.jpg", (1, 60_000)), ("wide.jpg", (60_000, 1))):
        Image.new("RGB", sides, (90, 30, 60)).save(tmp_path / "images" / name)
    options = [f"--model.{name}={value}" for name, value in SIZES.items()]
    code = "import resource, runpy, sys; sys.argv[0] = 'jobs/predict.py'; "
    code += "\ntry: runpy.run_path(sys.argv[0], run_name='__main__')"
    code += "\nfinally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(tmp_path / "images"), *options],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert "2 images classified, 0 skipped" in done.stdout, done.stderr
    peak_kb = int(done.stdout.split("peak ")[1])
    assert peak_kb < 1_500_000, "of these torch takes most"
