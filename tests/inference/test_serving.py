"""What the served model reads and refuses, directly and over HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import signal
import struct
import subprocess
import time
import urllib.error
import urllib.request
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lape_ray.cluster.local import executable, free_ports
from lape_ray.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lape_ray.inference import serving
from lape_ray.inference.export import log_to_mlflow, write_pyfunc
from lape_ray.inference.predict import NormalizedModel, Predictor, center_crop
from lape_ray.inference.serving import (
    BYTES,
    IMAGES,
    PIXELS,
    REFUSED_FILE,
    ROOT_VARIABLE,
    PyfuncModel,
    image_from_text,
)
from lape_ray.model import build_model

SIDE = 32
CLASSES = ("hen", "jay", "magpie")
RNG = np.random.default_rng(0)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def announced(width: int, height: int) -> bytes:
    """A PNG whose header says these sides, with no pixels: decoding it is an error other than its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    model = ModelConfig(embed_dim=64, depth=1, num_heads=2, image_size=SIDE, patch_size=16, num_classes=3)
    config = TrainConfig(model=model, run=RunConfig(device="cpu"))
    torch.manual_seed(0)
    network = NormalizedModel(build_model(model), config.data).eval()
    return Predictor(model=network, config=config, classes=CLASSES, device=torch.device("cpu"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that requests may read, with files in it and next to it that they may not."""
    inside, beside = tmp_path / "root", tmp_path / "root-secret"
    (inside / "birds").mkdir(parents=True)
    beside.mkdir()
    noise(8, 8).save(inside / "birds/jay.png")
    noise(8, 8).save(beside / "secret.png")
    (inside / "notes.txt").write_text("no image")
    (inside / "empty.png").touch()
    (inside / "huge.png").write_bytes(announced(PIXELS // 1000, 1001))
    with (inside / "long.png").open("wb") as file:
        file.truncate(BYTES + 1)
    (inside / "link.png").symlink_to(inside / "birds/jay.png")
    (inside / "leaves.png").symlink_to(beside / "secret.png")
    (inside / "folder").symlink_to(beside)
    (inside / "loop").symlink_to(inside / "loop")
    os.mkfifo(inside / "pipe.png")
    Image.new("F", (8, 8)).save(inside / "float.tif")
    return inside


# --- bytes ----------------------------------------------------------------------------------------------------


def test_every_small_png_passes_as_bare_base64() -> None:
    """Once their text was tried as the name of a file first: an OSError where no slash came for 255 letters."""
    for _ in range(600):
        image = noise(*RNG.integers(8, 32, 2))
        np.testing.assert_array_equal(np.asarray(image_from_text(text(encoded(image)))), np.asarray(image))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_bytes_are_decoded_bare_and_as_an_address(format: str) -> None:
    data = encoded(noise(9, 7), format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for cell in (text(data), f"data:image/any;base64,{text(data)}"):
        np.testing.assert_array_equal(np.asarray(image_from_text(cell)), expected)


@pytest.mark.parametrize("cell", [None, float("nan"), 3, 2.5, True, b"aGk=", ["aGk="], "", pd.NA])
def test_a_cell_without_text_is_refused(cell: object) -> None:
    with pytest.raises(ValueError, match=r"^the cell holds no text; send an image file \(JPEG, PNG"):
        image_from_text(cell)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("/usr/bin/env", "bytes are not a whole image"),  # which is base64
        ("/etc/hosts.png", "not base64"),
        ("birds/jay.png", "not base64"),
        ("data:image/png,abc", "bytes are not a whole image"),
        ("data:image/png;base64,", "bytes are not a whole image"),
        ("bl\u00e4h", "not base64"),
        ("a" * 5, "not base64"),
        ("aGk=\n", "not base64"),
        (text(b"no image"), "bytes are not a whole image"),
        (text(encoded(noise(40, 40))[:900]), "bytes are not a whole image"),
        (text(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"), "bytes are not a whole image"),
        (text(encoded(Image.new("F", (8, 8)), "TIFF")), "pixels of mode 'F', whose white is not defined"),
    ],
)  # fmt: skip
def test_text_that_is_no_image_is_refused(cell: str, reason: str, root: Path) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        image_from_text(cell, root)
    assert len(str(caught.value).splitlines()) == 1
    assert str(root) not in str(caught.value)
    assert "0x" not in str(caught.value), "no address of memory"


def test_what_is_too_large_is_refused_before_it_is_decoded() -> None:
    whole = encoded(noise(8, 8))
    padded = whole + bytes(BYTES - len(whole))  # behind the image's end
    assert image_from_text(text(padded)).size == (8, 8)
    for cell in (text(padded + b"0"), "A" * (2 * BYTES)):
        with pytest.raises(ValueError, match=r"larger than 20,971,520 bytes; send a smaller one"):
            image_from_text(cell)
    with pytest.raises(ValueError, match="bytes are not a whole image"):
        image_from_text(text(announced(PIXELS // 1000, 1000)))
    for sides in (
        (PIXELS // 1000, 1001),
        (1, PIXELS + 1),
        (100_000, 100_000),
    ):  # Pillow refuses the last itself
        with pytest.raises(ValueError, match=r"more than 50,000,000 pixels; send a smaller one"):
            image_from_text(text(announced(*sides)))


@pytest.mark.parametrize("sides", [(1, 60_000), (60_000, 1), (3, 20_000)])
def test_a_thin_image_takes_no_memory(
    predictor: Predictor, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its resized whole would have 32 x 1,920,000 pixels and more; only the square is made."""
    image = noise(*sides)
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], *words: object, **options: object) -> Image.Image:
        made.append(size)
        return resize(self, size, *words, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    (row_K,) = predictor.probabilities([image])
    assert made == [(SIDE, SIDE)]
    assert row_K.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sides", [(40, 90), (90, 40), (3, 300), (300, 3), (200, 333)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_square_is_that_of_the_whole_resized_image(sides: tuple[int, int], interpolation: str) -> None:
    image, data = noise(*sides), DataConfig(interpolation=interpolation, eval_crop=0.875)
    side = int(SIDE / 0.875)
    width, height = (side * length // min(image.size) for length in image.size)
    kind = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    whole = image.resize((width, height), kind).crop((left, top, left + SIDE, top + SIDE))
    difference = np.abs(
        np.asarray(whole, dtype=int) - np.asarray(center_crop(image, size=SIDE, data=data), dtype=int)
    )
    assert difference.mean() < 1
    assert np.quantile(difference, 0.99) <= 3


# --- files ----------------------------------------------------------------------------------------------------


def test_files_below_the_root_are_read(root: Path) -> None:
    for name in ("birds/jay.png", "link.png", "birds/../birds/jay.png", "./link.png"):
        assert image_from_text(f"file:{name}", root).size == (8, 8)


@pytest.mark.parametrize(
    "name",
    [
        "absent.png", "birds", "", ".", "..", "../root-secret/secret.png", "../root-secret/absent.png", "leaves.png",
        "folder/secret.png", "loop", "loop/a.png", "pipe.png", "notes.txt", "empty.png", "huge.png", "long.png",
        "float.tif", "/etc/passwd", "///etc/passwd", "//localhost/etc/passwd", "a" * 5000,
        "nul\0.png", "\ud800.png", "~/a.png", "birds\\jay.png", "birds/jay.png\n", "INSIDE", "SECRET",
    ],
)  # fmt: skip
def test_every_other_file_is_refused_in_the_same_words(name: str, root: Path) -> None:
    secret = root.parent / "root-secret/secret.png"
    name = {"INSIDE": str(root / "absent.png"), "SECRET": str(secret)}.get(name, name)
    for folder in (root, None):
        with pytest.raises(ValueError) as caught:
            image_from_text(f"file:{name}", folder)
        assert str(caught.value) == REFUSED_FILE
    assert str(root) not in REFUSED_FILE


def test_without_a_root_no_file_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predictor: Predictor
) -> None:
    with pytest.raises(ValueError, match="reads no image of that name"):
        image_from_text("file:birds/jay.png")
    folder = write_pyfunc(predictor, tmp_path / "model")
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    assert serving._load_pyfunc(str(folder)).root is None
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    assert serving._load_pyfunc(str(folder)).root == root
    monkeypatch.setenv(ROOT_VARIABLE, str(root / "notes.txt"))
    with pytest.raises(
        ValueError, match=rf"{ROOT_VARIABLE}=\S+notes.txt is not a folder; name one, or unset it"
    ):
        serving._load_pyfunc(str(folder))


# --- requests -------------------------------------------------------------------------------------------------


def test_a_request_holds_one_whole_image_at_a_time(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[str] = []

    def counting(cell: object, root: Path | None) -> Image.Image:
        image = image_from_text(cell, root)
        alive.append("an image")
        weakref.finalize(image, alive.pop)
        assert len(alive) <= 2, "the one before goes when this one takes its name"
        return image

    monkeypatch.setattr(serving, "image_from_text", counting)
    cells = [text(encoded(noise(40, 50))) for _ in range(70)]
    answer = PyfuncModel(predictor).predict(pd.DataFrame({"image": cells}))
    assert answer.columns.tolist() == ["class", "probability", "probabilities"]
    assert len(answer) == 70
    expected = predictor.probabilities(map(image_from_text, cells))
    np.testing.assert_allclose(np.stack(answer["probabilities"]), expected, atol=1e-5)
    assert answer["class"].tolist() == [CLASSES[k] for k in expected.argmax(1)]


def test_a_refused_request_is_a_400_that_names_the_row(predictor: Predictor) -> None:
    good = text(encoded(noise(8, 8)))
    for table, line in (
        ({"image": [good, None]}, "row 1: the cell holds no text; send"),
        ({"image": [good] * 65 + ["file:a"]}, f"row 65: {REFUSED_FILE}"),
        ({"image": [""] * (IMAGES + 1)}, "a request has 1,024 images at most, this one 1,025; send several"),
        ({"picture": [good]}, "a request needs the column 'image'"),
    ):
        with pytest.raises(mlflow.MlflowException) as caught:
            PyfuncModel(predictor).predict(table)
        assert str(caught.value).startswith(line)
        assert caught.value.get_http_status_code() == 400
        assert caught.value.json_kwargs == {}, "no traceback"


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_what_breaks_inside_is_logged_and_not_told(
    kind: type[Exception],
    predictor: Predictor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(self: Predictor, images: object) -> np.ndarray:
        raise kind("/srv/secret/place")

    monkeypatch.setattr(Predictor, "probabilities", broken)
    with pytest.raises(
        mlflow.MlflowException, match=r"^the model failed; the server's log says why$"
    ) as caught:
        PyfuncModel(predictor).predict({"image": [text(encoded(noise(8, 8)))]})
    assert caught.value.get_http_status_code() == 500
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "/srv/secret/place" in str(record.exc_info)


# --- over HTTP ------------------------------------------------------------------------------------------------


class Address:
    """Of a server's `/invocations`."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"

    def post(self, body: dict[str, object]) -> tuple[int, dict[str, object]]:
        """Status and body of the answer to a request."""
        request = urllib.request.Request(
            f"{self.base}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def images(self, *cells: object) -> tuple[int, dict[str, object]]:
        return self.post({"dataframe_split": {"columns": ["image"], "data": [[cell] for cell in cells]}})

    def wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.base}/ping", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def server(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Address, Path]]:
    """The real `mlflow models serve` of an exported model, and the folder that it may read."""
    home = tmp_path_factory.mktemp("server")
    uri = f"sqlite:///{home / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("e", (home / "artifacts").as_uri())).info.run_id
    example = torch.from_numpy(np.asarray(noise(SIDE, SIDE)).copy()).permute(2, 0, 1)
    model = log_to_mlflow(predictor, uri, run_id, example[None], None)
    (home / "root").mkdir()
    noise(8, 8).save(home / "root/jay.png")
    noise(8, 8).save(home / "secret.png")
    (port,) = free_ports(1)
    command = [executable("mlflow"), "models", "serve", "--model-uri", model, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    beside = str(Path(executable("mlflow")).parent)  # where it looks for uvicorn
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, ROOT_VARIABLE: str(home / "root")}
    environment["PATH"] = f"{beside}{os.pathsep}{environment['PATH']}"
    log = home / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment, cwd=home, start_new_session=True
        )
    address = Address(port)
    try:
        address.wait(process, log)
        yield address, home
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_server_answers_and_refuses(server: tuple[Address, Path], predictor: Predictor) -> None:
    address, home = server
    image = noise(40, 60)
    for cell in (text(encoded(image)), "file:jay.png"):
        status, body = address.images(cell)
        (answer,) = body["predictions"]
        expected = predictor.probabilities([image_from_text(cell, home / "root")])[0]
        assert status == 200
        np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
        assert answer["class"] == CLASSES[expected.argmax()]
    good = text(encoded(image))
    refused = {
        "file:absent": REFUSED_FILE,
        "file:../secret.png": REFUSED_FILE,
        f"file:{home}/secret.png": REFUSED_FILE,
        "file:/etc/passwd": REFUSED_FILE,
        text(announced(1, PIXELS + 1)): "the image has more than 50,000,000 pixels; send a smaller one",
        "A" * (4 * BYTES // 3 + 101): "the image is larger than 20,971,520 bytes; send a smaller one",
        "": f"the cell holds no text; {serving.ACCEPTED}",
        "/usr/bin/env": f"the bytes are not a whole image that this server reads; {serving.ACCEPTED}",
        "/etc/passwd": f"the text is not base64, which is one line of A-Z a-z 0-9 + / =; {serving.ACCEPTED}",
    }
    for cell, reason in refused.items():
        status, body = address.images(good, cell)
        assert status == 400, cell[:80]
        assert body.pop("message").partition("\nError: ")[2] == f"row 1: {reason}"
        assert body.keys() <= {"error_code", "sqlstate", "error_class"}, "no traceback"
        assert body["error_code"] == "BAD_REQUEST"


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["image"], "data": [[None]]}},
        {"dataframe_split": {"columns": ["image"], "data": [[3]]}},
        {"dataframe_split": {"columns": ["picture"], "data": [["a"]]}},
        {"dataframe_records": [{"image": "file:absent.png"}]},
        {"inputs": ["file:absent.png"]},
        {"inputs": {"image": ["file:absent.png"]}},
        {"instances": [{"image": "file:absent.png"}]},
        {"inputs": {"image": "file:absent.png"}},
        {"inputs": {"image": [["file:absent.png"], ["b"]]}},
        {"inputs": {"image": [1, 2], "other": [1]}},
        {"instances": [["a"], ["b"]]},
        {"nothing": 1},
    ],
)  # fmt: skip
def test_no_answer_holds_a_path_of_the_server(server: tuple[Address, Path], body: dict[str, object]) -> None:
    address, home = server
    status, answer = address.post(body)
    assert status == 400
    told = json.dumps(answer)
    for place in (str(home), str(Path(serving.__file__).parent), "site-packages", "Traceback"):
        assert place not in told
