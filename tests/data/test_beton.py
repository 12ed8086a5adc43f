"""The writer: what stock FFCV reads back, what is refused, and that nothing half-made is left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import Done, run_here
from helpers.installed import needs_ffcv
from PIL import Image

from lape_ray.data.beton import Manifest, check_beton, manifest_path, read_contents, write_beton
from lape_ray.data.beton import format as layout
from lape_ray.data.beton.blocks import hash_blocks
from lape_ray.data.native import crc32c
from lape_ray.data.sources import ImageFolder, digits, image_folder, open_source, select

ROOT = Path(__file__).resolve().parent.parent.parent
RNG = np.random.default_rng(0)


def noise(height: int, width: int) -> Image.Image:
    coarse = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: colour JPEGs (4:4:4, progressive), a grey and a CMYK one, large and small PNGs."""
    root = tmp_path / "images"
    files = {
        "a/0_444.jpg": encoded(noise(90, 120), "JPEG", quality=97, subsampling=0),
        "a/1_progressive.jpg": encoded(noise(120, 90), "JPEG", progressive=True),
        "a/2_grey.jpg": encoded(noise(90, 120).convert("L"), "JPEG"),
        "a/3_cmyk.jpg": encoded(noise(90, 120).convert("CMYK"), "JPEG"),
        "b/4_large.png": encoded(noise(100, 70), "PNG"),
        "b/5_small.png": encoded(noise(40, 64), "PNG"),
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def contents(path: Path) -> list[bytes]:
    """The stored bytes of every image, in order."""
    whole, contents = path.read_bytes(), read_contents(path)
    starts = contents.images_N["data_ptr"].tolist()
    return [
        whole[start : start + size] for start, size in zip(starts, contents.lengths_N.tolist(), strict=True)
    ]


@needs_ffcv
def test_layout_is_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    assert types.HeaderType.fields == layout.HEADER.fields
    assert types.FieldDescType.itemsize == layout.FIELD.itemsize
    assert types.ALLOC_TABLE_TYPE == layout.ALLOCATION
    records = types.get_metadata_type([RGBImageField(), IntField()])
    assert records.itemsize == layout.RECORD.itemsize
    assert [records.fields[name][1] for name in records.names] == [
        layout.RECORD.fields[name][1] for name in ("image", "label")
    ]
    assert records[0] == layout.IMAGE


@needs_ffcv
@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "process_cache"])
def test_stock_ffcv_reads_it(
    os_cache: bool,
    photograph_folder: Path,
    thumbnail_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Photographs as original bytes, and thumbnails as pixels, through FFCV's unchanged Loader."""
    import cv2
    import torch
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader import loader as loader_module
    from ffcv.memory_managers import OSCacheManager

    monkeypatch.setattr(loader_module, "OSCacheManager", OSCacheManager)  # the loader's tests replace it
    threads = torch.get_num_threads()

    def stock(path: Path, decoder: object) -> tuple[np.ndarray, np.ndarray]:
        loader = Loader(str(path), batch_size=64, num_workers=1, os_cache=os_cache, order=OrderOption.SEQUENTIAL,
                        drop_last=False, pipelines={"image": [decoder]})  # fmt: skip
        batches = [(images.copy(), labels.clone()) for images, labels in loader]
        return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])[:, 0]

    thumbnails = select(open_source(str(thumbnail_shards), "test"), "per-class:20")
    assert write_beton(thumbnails, tmp_path / "c.beton", workers=1).stored == {"raw": 200}
    images, labels = stock(tmp_path / "c.beton", SimpleRGBImageDecoder())
    assert np.array_equal(labels, thumbnails.labels_N)
    assert all(np.array_equal(images[i], np.asarray(thumbnails.read(i))) for i in range(200))

    photographs = image_folder(photograph_folder)
    manifest = write_beton(photographs, tmp_path / "p.beton", workers=1)
    assert manifest.stored == {"jpeg": 3, "original_jpeg": 197}
    images, labels = stock(tmp_path / "p.beton", CenterCropRGBImageDecoder((64, 64), 1.0))
    assert np.array_equal(labels, photographs.labels_N)
    errors = []
    for i in range(200):
        image = photographs.read(i)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = np.asarray(image)[top : top + side, left : left + side]
        expected = cv2.resize(square, (64, 64), interpolation=cv2.INTER_AREA)
        errors.append(np.abs(images[i].astype(int) - expected).mean())
    assert np.max(errors) < 2.2  # of 255: FFCV's inverse DCT is fast rather than accurate
    torch.set_num_threads(threads)


def test_auto_keeps_what_it_can(folder: Path, tmp_path: Path) -> None:
    source = image_folder(folder)
    manifest = write_beton(source, tmp_path / "x.beton", workers=1)
    stored = contents(tmp_path / "x.beton")
    assert manifest.stored == {"jpeg": 3, "original_jpeg": 2, "raw": 1}
    for i in (0, 1):  # a restart marker after every fourth MCU, and the same pixels
        assert b"\xff\xdd\x00\x04\x00\x04" in stored[i]
        assert Image.open(io.BytesIO(stored[i])).tobytes() == source.read(i).tobytes()
    for i in (2, 3, 4):  # grey, CMYK and a large PNG
        image = Image.open(io.BytesIO(stored[i]))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert np.abs(np.asarray(image).astype(int) - np.asarray(source.read(i))).mean() < 3
    assert stored[5] == source.read(5).tobytes()
    assert (manifest.width, manifest.height) == ((64, 120), (40, 120))
    assert (manifest.classes, manifest.class_counts) == (("a", "b"), (4, 2))


def test_modes(folder: Path, tmp_path: Path) -> None:
    source, path = image_folder(folder), tmp_path / "x.beton"
    assert write_beton(source, path, mode="raw", workers=1).stored == {"raw": 6}
    assert contents(path) == [source.read(i).tobytes() for i in range(6)]
    assert write_beton(source, path, mode="jpg", quality=50, workers=1).stored == {"jpeg": 6}
    small = sum(map(len, contents(path)))
    write_beton(source, path, mode="jpg", quality=95, workers=1)
    assert sum(map(len, contents(path))) > 1.5 * small
    for share, raw in ((0, 0), (0.5, 3), (1 / 3, 2), (1, 6)):
        manifest = write_beton(source, path, mode="proportion", raw_share=share, workers=1)
        assert manifest.stored.get("raw", 0) == raw


def test_resize_bounds_the_longest_side(folder: Path, tmp_path: Path) -> None:
    source, path = image_folder(folder), tmp_path / "x.beton"
    manifest = write_beton(source, path, mode="raw", max_size=90, workers=1)
    records = read_contents(path).images_N
    assert list(zip(records["width"], records["height"], strict=True)) == [
        (90, 68), (68, 90), (90, 68), (90, 68), (63, 90), (64, 40)
    ]  # fmt: skip
    expected = source.read(0).resize((90, 68), Image.Resampling.BICUBIC)  # Pillow's bicubic has antialiasing
    assert contents(path)[0] == expected.tobytes()
    assert (manifest.width, manifest.height) == ((63, 90), (40, 90))
    assert write_beton(source, path, max_size=90, workers=1).stored == {"jpeg": 5, "raw": 1}


def test_bytes_do_not_depend_on_workers(photograph_folder: Path, tmp_path: Path) -> None:
    source = image_folder(photograph_folder)
    seen: list[tuple[int, int]] = []
    one = write_beton(source, tmp_path / "1.beton", max_size=100, workers=1)
    two = write_beton(
        source, tmp_path / "2.beton", max_size=100, workers=2, progress=lambda *n: seen.append(n)
    )
    assert one.sha256 == two.sha256 == hashlib.sha256((tmp_path / "1.beton").read_bytes()).hexdigest()
    assert seen[-1] == (200, 200)
    assert seen == sorted(seen)


def test_no_image_crosses_a_page(tmp_path: Path) -> None:
    """FFCV's own cache reads whole pages, so an image must lie within one."""
    for name in "abcde":
        (tmp_path / "images" / name).mkdir(parents=True)
        noise(1000, 1100).save(tmp_path / "images" / name / "x.png")
    write_beton(image_folder(tmp_path / "images"), tmp_path / "x.beton", mode="raw", workers=1)
    records = read_contents(tmp_path / "x.beton").images_N
    first, last = records["data_ptr"], records["data_ptr"] + 3 * 1000 * 1100 + 3  # with the checksum
    assert np.array_equal(first // layout.PAGE_BYTES, last // layout.PAGE_BYTES)
    assert len(np.unique(first // layout.PAGE_BYTES)) > 1


def damage(folder: Path) -> None:
    (folder / "a" / "0_444.jpg").write_bytes((folder / "a" / "0_444.jpg").read_bytes()[:500])
    (folder / "b" / "5_small.png").write_bytes(b"")


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_names_the_image_and_leaves_nothing(workers: int, folder: Path, tmp_path: Path) -> None:
    source, path = image_folder(folder), tmp_path / "out" / "x.beton"
    write_beton(source, path, workers=1)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    assert set(before) == {path, manifest_path(path)}
    damage(folder)
    with pytest.raises(ValueError, match=r"0_444\.jpg cannot be read"):
        write_beton(source, path, workers=workers)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_skip_lists_what_it_leaves_out(folder: Path, tmp_path: Path) -> None:
    source, path = image_folder(folder), tmp_path / "x.beton"
    damage(folder)
    manifest = write_beton(source, path, on_error="skip", workers=1)
    assert (manifest.num_samples, manifest.class_counts) == (4, (3, 1))
    assert [Path(name).name for name, _ in manifest.skipped] == ["0_444.jpg", "5_small.png"]
    assert all(name in reason for name, reason in manifest.skipped)
    assert read_contents(path).labels_N.tolist() == [0, 0, 0, 1]
    assert Image.open(io.BytesIO(contents(path)[0])).tobytes() == source.read(1).tobytes()
    assert check_beton(path, deep=True, workers=1) == manifest == Manifest.load(path)
    for file in folder.rglob("*.*"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 6 images"):
        write_beton(source, path, on_error="skip", workers=1)
    assert check_beton(path) == manifest


@dataclasses.dataclass(frozen=True, eq=False)
class Deadly(ImageFolder):
    """Kills the process that reads its fifth image, as the kernel does when memory runs out."""

    def encoded(self, index: int) -> bytes:
        if self.name(index).endswith("4_large.png"):
            os._exit(9)
        return super().encoded(index)


def test_death_of_a_process_is_an_error(folder: Path, tmp_path: Path) -> None:
    good = image_folder(folder)
    source = Deadly(**{field.name: getattr(good, field.name) for field in dataclasses.fields(good)})
    with pytest.raises(OSError, match="a process died"):
        write_beton(source, tmp_path / "out" / "x.beton", workers=2)
    assert list((tmp_path / "out").iterdir()) == []  # nothing was written before it


def test_processes_begin_where_the_program_came_through_a_pipe() -> None:
    text = (
        "import math\nfrom lape_ray.data.processes import processes\n"
        "with processes(2) as mapper: print(list(mapper(math.sqrt, [1, 4])), __file__)"
    )
    done = subprocess.run([sys.executable, "-"], input=text, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[1.0, 2.0] <stdin>\n", 0), done.stderr


def test_bad_options(folder: Path, tmp_path: Path) -> None:
    source, path = image_folder(folder), tmp_path / "x.beton"
    for options, message in (
        ({"mode": "png"}, "mode='png' is not known; choose one of auto, jpg"),
        ({"quality": 0}, "quality=0 is out of range"),
        ({"max_size": 0}, "max_size=0"),
        ({"raw_share": 2}, "raw_share=2"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"markers": -1}, "markers=-1 is out of range"),
        ({"shards": 7}, "shards=7 is out of range; it must be from 1 to the 6 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            write_beton(source, path, **options)
    noise(2000, 2000).save(folder / "a" / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png is 2000x2000 pixels and 12,000,000 bytes.*set max_size"):
        write_beton(image_folder(folder), path, mode="raw", workers=1)


@pytest.fixture(scope="module")
def digits_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.beton"
    write_beton(select(digits(), "per-class:30"), path, workers=1)
    return path


@pytest.fixture
def copy(digits_beton: Path, tmp_path: Path) -> Path:
    path = tmp_path / "x.beton"
    path.write_bytes(digits_beton.read_bytes())
    manifest_path(path).write_bytes(manifest_path(digits_beton).read_bytes())
    return path


def test_check_finds_missing_and_truncated_files(copy: Path, tmp_path: Path) -> None:
    assert check_beton(copy).num_samples == 300
    assert check_beton(copy, deep=True, workers=1).class_counts == (30,) * 10
    with pytest.raises(FileNotFoundError, match=r"absent\.beton is missing; write it"):
        check_beton(tmp_path / "absent.beton")
    whole = copy.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 0):
        copy.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"has {kept:,} bytes but its manifest says {len(whole):,}"):
            check_beton(copy)
    manifest_path(copy).unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.beton\.json is missing"):
        check_beton(copy)


def test_check_finds_bad_manifests(copy: Path) -> None:
    values = json.loads(manifest_path(copy).read_text())
    nameless = {name: value for name, value in values.items() if name != "sha256"}
    for text, message in {
        "": "is empty",
        "{": "is damaged: Expecting property name",
        "[]": r"is damaged: it is \[\], not an object in braces",
        json.dumps({**values, "version": 99}): "is not a manifest of version 2",
        json.dumps({"version": 1}): "is not a manifest of version 2",
        json.dumps(nameless): "is not a manifest: Manifest lacks sha256",
        json.dumps(
            {**values, "more": 1}
        ): r"is not a manifest: Manifest has no field \['more'\]; it has version",
        json.dumps({**values, "bytes": "9"}): "is not a manifest: bytes is '9', not a whole number",
        json.dumps({**values, "width": [1, 2, 3]}): r"width is \[1, 2, 3\], not a list of 2",
        json.dumps({**values, "classes": ["a", 3]}): r"classes\[1\] is 3, not a text",
        json.dumps({**values, "odd": {"grey": -1}}): r"odd\['grey'\] is -1, not a whole number not below 0",
        json.dumps({**values, "class_counts": []}): "it has 10 classes, and counts the images of 0",
    }.items():
        manifest_path(copy).write_text(text)
        with pytest.raises(
            ValueError, match=rf"x\.beton\.json .*{message}.*; copy it again, or write the \.beton again$"
        ):
            check_beton(copy)
    manifest_path(copy).write_text(json.dumps({**values, "num_samples": 299}))
    with pytest.raises(ValueError, match="holds 300 samples but its manifest says 299"):
        check_beton(copy)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_check_finds_bad_contents(copy: Path) -> None:
    whole = copy.read_bytes()
    overwrite(copy, 0, b"\x07")  # the version of the format
    with pytest.raises(ValueError, match="is not an FFCV file of images and labels"):
        check_beton(copy)
    copy.write_bytes(whole)
    overwrite(copy, 8, (10**6).to_bytes(8, "little"))  # the number of samples
    with pytest.raises(ValueError, match="is truncated"):
        check_beton(copy)
    copy.write_bytes(whole)
    overwrite(copy, layout.RECORDS_START + 16, (-3).to_bytes(8, "little", signed=True))  # the first label
    with pytest.raises(ValueError, match=r"labels from -3 to 9, outside 0\.\.9"):
        check_beton(copy)
    copy.write_bytes(whole)
    overwrite(copy, layout.RECORDS_START + 16, (9).to_bytes(8, "little"))  # a label that could be true
    with pytest.raises(ValueError, match="its tables of labels and places are not those of its manifest"):
        check_beton(copy)
    copy.write_bytes(whole)
    overwrite(copy, len(whole) // 2, bytes([whole[len(whole) // 2] ^ 1]))
    check_beton(copy)
    with pytest.raises(ValueError, match="sha256 is not its manifest's"):
        check_beton(copy, deep=True, workers=1)
    copy.write_bytes(whole)
    manifest = Manifest.load(copy)
    assert manifest.blocks
    wrong = dataclasses.replace(manifest.blocks, sha256=64 * "0")
    dataclasses.replace(manifest, blocks=wrong).save(copy)
    with pytest.raises(ValueError, match="its blocks do not agree with their checksums"):
        check_beton(copy, deep=True, workers=1)


def test_deep_check_decodes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_beton(image_folder(folder), path, workers=1)
    whole, found = path.read_bytes(), read_contents(path)
    start, size = int(found.images_N["data_ptr"][1]), int(found.lengths_N[1])

    def check_with(offset: int, data: bytes, *, checksum: bool = True) -> None:
        """With hashes that agree, as those of a file that was written wrong would."""
        path.write_bytes(whole)
        overwrite(path, offset, data)
        if checksum:
            image = path.read_bytes()[start : start + size]
            overwrite(path, start + size, crc32c(image).to_bytes(4, "little"))
        blocks = Manifest.load(path).blocks
        assert blocks
        with path.open("rb") as file:
            digests, _ = hash_blocks(file, blocks.end, blocks.bytes)
        overwrite(path, blocks.end, digests)
        hashes = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "tables_sha256": layout.tables_sha256(*layout.read_tables(path)),
            "blocks": dataclasses.replace(blocks, sha256=hashlib.sha256(digests).hexdigest()),
        }
        dataclasses.replace(Manifest.load(path), **hashes).save(path)
        check_beton(path, deep=True, workers=1)

    check_with(start, b"\xff\xd8")  # as it is
    with pytest.raises(ValueError, match="image 1 cannot be read"):
        check_with(start, b"\x00\x00")
    with pytest.raises(ValueError, match="image 1 does not agree with its checksum"):
        check_with(start + size - 9, b"\x00\x00", checksum=False)
    with pytest.raises(ValueError, match="image 1 is not as its record says"):
        check_with(layout.RECORDS_START + layout.RECORD.itemsize + 1, b"\x05\x00")  # the width


def test_places_and_labels_that_no_file_has(copy: Path) -> None:
    """Of a file whose manifest was made to agree, or that has none."""
    whole, ptr = copy.read_bytes(), len(copy.read_bytes()) - 300 * layout.ALLOCATION.itemsize + 8

    def write(*changes: tuple[int, int]) -> None:
        copy.write_bytes(whole)
        for offset, value in changes:
            overwrite(copy, offset, value.to_bytes(8, "little"))
        hashes = {"tables_sha256": layout.tables_sha256(*layout.read_tables(copy))}
        dataclasses.replace(Manifest.load(copy), **hashes).save(copy)

    for place in (2**64 - 1, 2**63, len(whole) + 1):
        write((layout.RECORDS_START + layout.IMAGE.fields["data_ptr"][1], place), (ptr, place))
        for deep in (False, True):
            with pytest.raises(ValueError, match=r"x\.beton is damaged: image 0 lies outside the file"):
                check_beton(copy, deep=deep, workers=1)
    write((layout.RECORDS_START + layout.RECORD.fields["label"][1], 2**62))
    manifest_path(copy).unlink()
    with pytest.raises(ValueError, match=r"x\.beton has a label of 4611686018427387904, and no class names"):
        open_source(str(copy))


def run_job(*arguments: str | Path) -> Done:
    return run_here("jobs/write_beton.py", *arguments)


def test_job_writes_and_verifies(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    damage(folder)
    done = run_job(
        folder, path, "--workers", "1", "--on-error", "skip", "--subset", "per-class:3", "--max-size", "80"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 images of 2 classes" in done.stdout
    assert done.stdout.count("skipped: ") == 2
    assert str(manifest_path(path)) in done.stdout
    assert Manifest.load(path).made["max_size"] == 80
    done = run_job("verify", path, "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    overwrite(path, path.stat().st_size - 1, b"\xff")
    done = run_job("verify", path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_job_help_is_instant_and_errors_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "jobs/write_beton.py"), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert "holdout:N" in done.stdout
    assert not [
        name for name in ("numpy", "torch", "ffcv", "PIL") if f"| {name}\n" in done.stderr.replace("  ", "")
    ]
    done = run_job(tmp_path / "absent", tmp_path / "x.beton")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {tmp_path}/absent is not a folder; give a folder of class folders, parquet or tar shards, "
        "a .beton, or 'digits'\n"
    )
