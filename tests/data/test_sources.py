"""Sources against torchvision and pyarrow, unusual files, and every way a data set can be wrong."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, image_folder, named, open_source, parquet_shards, select
from lape_ray.data.sources.beton import beton_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(PIXELS), "PNG")


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_shard(path: Path, images: list[object], labels: list[object], *, image: str = "image",
                label: str = "label", names: list[str] | None = None, rows: int = 3) -> Path:  # fmt: skip
    table = pa.table({image: images, label: labels})
    if names:
        info = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def test_folder_is_torchvisions(photograph_folder: Path) -> None:
    ours, theirs = image_folder(photograph_folder), ImageFolder(str(photograph_folder))
    assert list(ours.classes) == theirs.classes
    assert [(ours.name(i), ours.label(i)) for i in range(len(ours))] == theirs.samples
    for i in range(0, len(ours), 20):
        assert np.array_equal(np.asarray(ours.read(i)), np.asarray(theirs[i][0]))


def test_folder_reads_nested_and_upper_case_names(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"b/x/2.PNG": PNG, "b/1.png": PNG, "a/0.png": PNG, "a/notes.txt": b"", "stray.png": PNG}
    )
    ours, theirs = image_folder(tmp_path), ImageFolder(str(tmp_path))
    assert [(ours.name(i), ours.label(i)) for i in range(len(ours))] == theirs.samples
    assert len(ours) == 3


def odd_images() -> dict[str, bytes]:
    rgb = Image.fromarray(PIXELS)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "palette.gif.png": encoded(rgb.convert("P"), "PNG", transparency=0),
        "alpha.png": encoded(rgb.convert("RGBA"), "PNG"),
        "grey_alpha.png": encoded(rgb.convert("LA"), "PNG"),
        "one_bit.png": encoded(rgb.convert("1"), "PNG"),
        "rotated.jpg": encoded(rgb, "JPEG", exif=rotated.tobytes()),
        "still.webp": encoded(rgb, "WEBP", lossless=True),
        "tiff.tif": encoded(rgb, "TIFF"),
    }


@pytest.mark.parametrize("name", odd_images())
def test_unusual_images_are_converted_as_torchvision_does(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {f"a/{name}": odd_images()[name]})
    image = image_folder(tmp_path).read(0)
    assert image.mode == "RGB"
    assert image.size == (16, 12)  # EXIF rotation is not applied
    assert np.array_equal(np.asarray(image), np.asarray(ImageFolder(str(tmp_path))[0][0]))


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    wide = np.arange(0, 2**16, 2**16 // 192).astype(np.uint16)[:192].reshape(12, 16)
    write_folder(tmp_path, {"a/x.png": encoded(Image.fromarray(wide), "PNG")})
    pixels = np.asarray(image_folder(tmp_path).read(0))
    assert np.array_equal(pixels, np.repeat((wide >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", PNG[: len(PNG) // 2], encoded(Image.fromarray(PIXELS), "JPEG")[:-80],
     encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF")],
    ids=["empty", "garbage", "half a png", "truncated jpeg", "floating point"],
)  # fmt: skip
def test_unreadable_image_is_named(data: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/good.png": PNG, "a/x.png": data})
    source = image_folder(tmp_path)
    source.read(0)
    with pytest.raises(ValueError, match=r"a/x\.png"):
        source.read(1)


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="no class folders"):
        open_source(str(write_folder(tmp_path / "flat", {"x.png": PNG})))
    with pytest.raises(ValueError, match=r"class folder .*/b holds no images"):
        open_source(str(write_folder(tmp_path / "gap", {"a/x.png": PNG, "b/x.txt": b""})))
    vanishing = image_folder(write_folder(tmp_path / "vanish", {"a/x.png": PNG}))
    (tmp_path / "vanish/a/x.png").unlink()
    with pytest.raises(ValueError, match=r"a/x\.png cannot be read: No such file"):
        vanishing.read(0)


def test_folder_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/a/x.png": PNG, "train/b/x.png": PNG, "val/a/x.png": PNG})
    assert len(open_source(str(tmp_path), "train")) == 2
    assert open_source(str(tmp_path), "val").classes == ("a",)
    with pytest.raises(ValueError, match="holds no split 'test'; choose one of train, val with --split"):
        open_source(str(tmp_path), "test")


def test_shards_of_a_hub(thumbnail_shards: Path) -> None:
    source = open_source(str(thumbnail_shards), "train")
    assert len(source) == 4 * 260
    assert source.classes[:3] == ("zero", "one", "two")
    shard = pq.read_table(thumbnail_shards / "train-00001-of-00004.parquet")
    for row in (0, 150, 259):  # first and last of a file, and across row groups
        struct = shard.column("image")[row].as_py()
        expected = np.asarray(Image.open(io.BytesIO(struct["bytes"])).convert("RGB"))
        assert np.array_equal(np.asarray(source.read(260 + row)), expected)
        assert source.label(260 + row) == shard.column("label")[row].as_py()
    assert source.name(260).endswith("train-00001-of-00004.parquet row 0")


def test_shards_of_other_layouts(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [{"bytes": PNG, "path": None}] * 4, [0, 2, 1, 0],
                image="img", label="fine_label", names=["x", "y", "z"])  # fmt: skip
    write_shard(tmp_path / "train-1.parquet", [PNG] * 2, [2, 2], image="img", label="fine_label")
    write_shard(tmp_path / "test-0.parquet", [PNG], [4], label="labels")
    train = open_source(str(tmp_path), "train")
    assert (len(train), train.classes, train.label(4)) == (6, ("x", "y", "z"), 2)
    assert np.array_equal(np.asarray(train.read(5)), PIXELS)
    assert open_source(str(tmp_path), "test").classes == ("0", "1", "2", "3", "4")
    assert len(open_source(str(tmp_path / "train-*.parquet"))) == 6
    assert len(open_source(str(tmp_path / "test-0.parquet"))) == 1
    nested = write_shard(tmp_path / "nested/val/0000.parquet", [PNG], [0]).parent.parent
    assert len(open_source(str(nested), "val")) == 1


def test_shard_errors(tmp_path: Path) -> None:
    def shard(*columns: Any, **options: Any) -> str:
        return str(write_shard(tmp_path / "x.parquet", *columns, **options))

    with pytest.raises(ValueError, match=r"row 1 has label -1, outside 0\.\.2 \(1 of 3"):
        open_source(shard([PNG] * 3, [2, -1, 0]))
    with pytest.raises(ValueError, match=r"row 2 has label 7, outside 0\.\.1"):
        open_source(shard([PNG] * 3, [0, 1, 7], names=["a", "b"]))
    with pytest.raises(ValueError, match="has a label of 4611686018427387904, and no class names"):
        open_source(shard([PNG] * 2, [0, 2**62]))
    with pytest.raises(ValueError, match="row 1 has no label"):
        open_source(shard([PNG] * 2, [0, None]))
    with pytest.raises(ValueError, match="labels must be integers"):
        open_source(shard([PNG], ["cat"]))
    with pytest.raises(
        ValueError, match=r"x\.parquet .*no image column \(image, img, .*\), only pixels, label"
    ):
        open_source(shard([PNG], [0], image="pixels"))
    with pytest.raises(ValueError, match="no label column"):
        open_source(shard([PNG], [0], label="target"))
    with pytest.raises(ValueError, match="holds no images"):
        open_source(shard(pa.array([], pa.binary()), pa.array([], pa.int64())))
    with pytest.raises(ValueError, match=r"x\.parquet row 1 holds no image bytes"):
        open_source(shard([{"bytes": PNG}, {"bytes": None}], [0, 0])).read(1)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read as a shard"):
        open_source(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match=r"y-\*\.parquet is not there"):
        parquet_shards(str(tmp_path / "y-*.parquet"))
    write_shard(tmp_path / "test-0.parquet", [PNG], [0])
    with pytest.raises(ValueError, match="several splits; choose one of test, x"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="no split 'val'"):
        open_source(str(tmp_path), "val")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "is empty"),
        ("{", "is damaged: Expecting property name"),
        ("[1]", r"is damaged: it is \[1\], not an object in braces"),
        ("[" * 100_000, "is damaged: maximum recursion depth exceeded"),
        ({"info": 3}, "is damaged: info is 3, not an object in braces"),
        ({"info": {"features": ["label"]}}, r"info\.features is \['label'\], not an object"),
        ({"info": {"features": {"label": "names"}}}, r"info\.features\.label is 'names', not an object"),
        ({"info": {"features": {"label": {"names": "cat"}}}}, r"label\.names is 'cat', not a list"),
        ({"info": {"features": {"label": {"names": ["cat", 3]}}}}, r"label\.names\[1\] is 3, not a text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_class_names_of_a_shard_that_are_none(tmp_path: Path, value: object, message: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    table = pa.table({"image": [PNG], "label": [0]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=rf"x\.parquet .* its metadata 'huggingface' .*{message}.*; write the"
    ):
        open_source(str(tmp_path / "x.parquet"))


def damaged_shard(folder: Path, *, checksums: bool) -> Path:
    """60 rows in three groups of ten pages of two; the fifth page of the second group is overwritten: row 28 and 29."""
    noise = np.random.default_rng(1).integers(0, 256, (60, 12, 16, 3), dtype=np.uint8)
    pngs = [encoded(Image.fromarray(pixels), "PNG") for pixels in noise]
    table = pa.table({"image": [{"bytes": png, "path": None} for png in pngs], "label": [0] * 60})
    file = folder / "x.parquet"
    pq.write_table(table, file, row_group_size=20, data_page_size=1000, write_batch_size=2, use_dictionary=False,
                   compression="none", write_page_checksum=checksums)  # fmt: skip
    whole = bytearray(file.read_bytes())
    start = whole.index(pngs[28]) - 4  # its length, which is where the page's bytes begin
    whole[start : start + 40] = b"\xff" * 40
    file.write_bytes(whole)
    return file


@pytest.mark.parametrize("checksums", [False, True])
def test_a_damaged_page_costs_the_rest_of_its_row_group(tmp_path: Path, checksums: bool) -> None:
    file = damaged_shard(tmp_path, checksums=checksums)
    source = open_source(str(file))
    where = r"x\.parquet row 28 cannot be read: row group 1 is damaged from row 28 on \(.+\); repair the file"
    with pytest.raises(ValueError, match=where):
        write_beton(source, tmp_path / "x.beton", workers=1)
    manifest = write_beton(source, tmp_path / "x.beton", workers=1, on_error="skip")
    assert [name for name, _ in manifest.skipped] == [f"{file} row {row}" for row in range(28, 40)]
    assert all(f"{file} row" in reason and "\n" not in reason for _, reason in manifest.skipped)
    stored = beton_images(tmp_path / "x.beton")
    kept = [*range(28), *range(40, 60)]
    assert [stored.read(i).tobytes() for i in range(len(stored))] == [source.read(i).tobytes() for i in kept]


def test_damaged_labels_are_refused_for_the_whole_file(tmp_path: Path) -> None:
    file = damaged_shard(tmp_path, checksums=True)
    at = pq.read_metadata(file).row_group(2).column(2).data_page_offset
    whole = bytearray(file.read_bytes())
    whole[at : at + 8] = b"\xff" * 8
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read as a shard of images: "):
        open_source(str(file))


def test_a_shard_that_is_gone_or_cut_after_it_was_opened(tmp_path: Path) -> None:
    source = open_source(str(write_shard(tmp_path / "x.parquet", [PNG] * 9, [0] * 9)))
    write_shard(tmp_path / "x.parquet", [PNG] * 3, [0] * 3)
    with pytest.raises(ValueError, match=r"x\.parquet row 8 cannot be read: .*footer counts fewer"):
        source.encoded(8)
    (tmp_path / "y.parquet").write_bytes((tmp_path / "x.parquet").read_bytes())
    other = open_source(str(tmp_path / "y.parquet"))
    (tmp_path / "y.parquet").unlink()
    with pytest.raises(ValueError, match=r"y\.parquet row 1 cannot be read: .*No such file"):
        other.encoded(1)


def test_digits() -> None:
    train, val, every = digits("train"), digits("val"), digits()
    assert (len(train), len(val), len(every)) == (1438, 359, 1797)
    image = np.asarray(train.read(0))
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    assert np.array_equal(image[::4, ::4, 0], train.items_N[0])
    assert (train.items_N.min(), train.items_N.max()) == (0, 255)
    together = np.concatenate([train.items_N, val.items_N]).reshape(1797, -1)
    assert np.array_equal(np.unique(together, axis=0), np.unique(every.items_N.reshape(1797, -1), axis=0))
    shares = np.bincount(val.labels_N) / np.bincount(every.labels_N)
    assert np.ptp(shares) < 0.012  # stratified: within one or two images of every class
    # The draw is part of what a reported accuracy means.
    assert val.labels_N[:16].tolist() == [2, 2, 0, 8, 7, 8, 3, 4, 0, 2, 1, 3, 3, 1, 0, 5]
    with pytest.raises(ValueError, match="no split 'test'"):
        open_source("digits", "test")


def test_a_subset_of_a_subset() -> None:
    """The first few of each class among those that were not held out."""
    source = digits("train")
    held, few = select(source, "holdout:100"), select(source, "rest:100,per-class:3")
    assert np.bincount(few.labels_N).tolist() == [3] * 10
    images = [{each.encoded(index) for index in range(len(each))} for each in (held, few)]
    assert not images[0] & images[1]
    rest = select(source, "rest:100")
    assert [few.encoded(i) for i in range(30)] == [select(rest, "per-class:3").encoded(i) for i in range(30)]


def test_subsets() -> None:
    source = digits()
    few = select(source, "per-class:5")
    assert np.bincount(few.labels_N).tolist() == [5] * 10
    assert few.label(0) == source.label(0)
    held, rest = select(source, "holdout:100"), select(source, "rest:100")
    assert (len(held), len(rest)) == (100, 1697)
    assert np.array_equal(held.items_N, select(source, "holdout:100").items_N)
    union = np.concatenate([held.items_N, rest.items_N]).reshape(1797, -1)
    assert np.array_equal(np.unique(union, axis=0), np.unique(source.items_N.reshape(1797, -1), axis=0))
    assert set(np.bincount(held.labels_N)) <= {9, 10, 11}
    assert select(source, None) is source
    for bad in ("first:3", "holdout", "holdout:0", "holdout:-1", "holdout:x"):
        with pytest.raises(ValueError, match="is not known; write one of per-class:N"):
            select(source, bad)
    for bad in ("holdout:1797", "rest:5000"):
        with pytest.raises(ValueError, match="of the 1797 samples"):
            select(source, bad)


def test_sources_pickle_small(thumbnail_shards: Path) -> None:
    source = open_source(str(thumbnail_shards), "train")
    part = source.take(slice(500, 532))
    sent = pickle.dumps(part)
    assert len(sent) < 4_000
    again = pickle.loads(sent)
    assert np.array_equal(np.asarray(again.read(3)), np.asarray(source.read(503)))


BIRDS = ("n01514668", "n01514859", "n02012849")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n02012849 crane\nn01514668 cock\nn01514859 hen, biddy\n", ("cock", "hen, biddy", "crane")),
        ("n01514668\tcock\n\nn01514859\then\nn02012849\tcrane\nn09999999\tof others\n", ("cock", "hen", "crane")),
        ("cock\nred hen\ncrane\n", ("cock", "red hen", "crane")),
        ("crane\nhen\ncrane", ("crane (n01514668)", "hen", "crane (n02012849)")),
    ],
    ids=["ids", "tabs", "names", "shared"],
)  # fmt: skip
def test_classes_take_the_names_of_a_file(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    source = image_folder(write_folder(tmp_path / "images", {f"{bird}/a.png": PNG for bird in BIRDS}))
    (tmp_path / "names.txt").write_text(text)
    again = named(source, str(tmp_path / "names.txt"))
    assert again.classes == names
    assert (again.name(2), again.label(2)) == (source.name(2), source.label(2))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cock\nhen\n", "has 2 names, but .* has 3 classes; give a line for each"),
        ("", "has 0 names, but .* has 3 classes"),
        ("n01514668 cock\n", "has no name for 2 of the 3 classes of .*, such as 'n01514859'"),
        ("n01514668 cock\nn01514859\nn02012849 crane\n", "has no name for 1 of the 3 .* such as 'n01514859'"),
        ("n01514668 cock\nn01514668 hen\n", "has two lines for class 'n01514668'; leave one of them"),
    ],
    ids=["too few", "none", "missing", "nameless", "twice"],
)
def test_names_that_do_not_fit_the_classes_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    source = image_folder(write_folder(tmp_path / "images", {f"{bird}/a.png": PNG for bird in BIRDS}))
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=reason):
        named(source, str(tmp_path / "names.txt"))
