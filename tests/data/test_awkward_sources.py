"""Data sets as people have them: what is read is all of a split and its labels are right, or one line says why not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.installed import needs_ffcv
from helpers.layouts import pixels, png, sample, write_files, write_parquet, write_tar

from lape_ray.config import DataConfig, ModelConfig, TrainConfig
from lape_ray.data.beton import Manifest, check_beton, write_beton
from lape_ray.data.beton.convert import convert, verify
from lape_ray.data.sources import Source, image_folder, named, open_source, with_classes
from lape_ray.data.sources.beton import beton_images
from lape_ray.data.sources.splits import choose_split, is_split_word, split_word
from lape_ray.training.preflight import check_data


def keys(source: Source) -> list[str]:
    """The ends of the images' names."""
    return [source.name(index).rpartition(" ")[2].rpartition("/")[2] for index in range(len(source))]


def refusal(where: Path | str, split: str | None = None) -> str:
    with pytest.raises(ValueError) as error:
        open_source(str(where), split)
    return str(error.value)


# --- splits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("train-00000-of-00004", "train"),
        ("imagenet-1k-train-0000", "train"),
        ("cifar-100-test", "test"),
        ("imagenet1k.validation.03", "validation"),
        ("Training_0", "training"),
        ("VALID", "valid"),
        ("train2017", "train"),
        ("cifarTest", "test"),
        ("my_test_set-train-0", "train"),
        ("dev0001", "dev"),
        ("train_val-0", "train_val"),
        ("train-training", "training"),
        ("latest-0000", None),
        ("trainer", None),
        ("values", None),
        ("contest", None),
        ("trainval", None),
        ("0000", None),
    ],
)
def test_the_split_word_of_a_name(name: str, word: str | None) -> None:
    assert split_word(name) == word


def test_words_that_are_no_class() -> None:
    assert [is_split_word(name) for name in ("train", "Val", "test_2017", "train2017")] == [True] * 4
    assert not any(is_split_word(name) for name in ("bullet train", "test tube", "trains", "2017"))


def test_a_split_is_found_by_its_meaning() -> None:
    assert choose_split({"train", "validation"}, "val", "x") == "validation"
    assert choose_split({"val", "validation"}, "val", "x") == "val"
    assert choose_split({"imagenet-train", "imagenet-val"}, "Training", "x") == "imagenet-train"
    with pytest.raises(
        ValueError, match="x holds several splits; choose one of dev, validation with --split"
    ):
        choose_split({"dev", "validation", "train"}, "val", "x")
    with pytest.raises(
        ValueError, match="x holds no split 'test'; choose one of train, or leave --split out"
    ):
        choose_split({"train"}, "test", "x")


SPLITS = {
    "tars": ("imagenet-1k-train-0000.tar", "imagenet-1k-train-0001.tar", "imagenet-1k-validation-0000.tar"),
    "hub": ("plain_text/train-00000-of-00002.parquet", "plain_text/train-00001-of-00002.parquet",
            "plain_text/test-00000-of-00001.parquet"),
    "no numbers": ("cifar-100-train-0.parquet", "cifar-100-train-1.parquet", "cifar-100-valid.parquet"),
    "folders": ("training/0000.tar", "training/0001.tar", "dev/0000.tar"),
    "folders below": ("data/Train/part-0.parquet", "data/Train/part-1.parquet", "data/Val/part-0.parquet"),
    "class folders": ("train/a/1.png", "train/b/2.png", "val/a/1.png"),
    "prefixed class folders": ("imagenet-train/a/1.png", "imagenet-train/b/2.png", "imagenet-val/a/1.png"),
    "far below": ("Data/CLS-LOC/train/a/1.png", "Data/CLS-LOC/train/b/2.png", "Data/CLS-LOC/test/a/1.png"),
    "in each class": ("a/train/1.png", "b/train/2.png", "a/test/3.png"),
}  # fmt: skip


def write_any(root: Path, names: tuple[str, ...]) -> Path:
    """Write each name with one image."""
    for name in names:
        if name.endswith(".tar"):
            write_tar(root / name, *sample("x"))
        elif name.endswith(".parquet"):
            write_parquet(root / name, [0])
        else:
            write_files(root, name)
    return root


@pytest.mark.parametrize("names", SPLITS.values(), ids=SPLITS)
def test_training_and_validation_stay_apart(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Two training images and one other; without --split a refusal, whose every choice works."""
    root = write_any(tmp_path / "data set", names)
    message = refusal(root)
    assert str(root) in message
    choices = message.partition("choose one of ")[2].partition(" with --split")[0].split(", ")
    train, held = open_source(str(root), "train"), [open_source(str(root), word) for word in choices]
    assert len(train) == 2
    assert sorted(map(len, held)) == [1, 2]
    found = {pixels(source.encoded(index)) for source in held for index in range(len(source))}
    assert len(found) == 3
    other = next(word for word in ("val", "test") if not refuses(root, word))
    assert len(open_source(str(root), other)) == 1


def refuses(root: Path, split: str) -> bool:
    try:
        open_source(str(root), split)
    except ValueError:
        return True
    return False


def test_folders_of_images_are_classes_whatever_they_are_called(tmp_path: Path) -> None:
    write_files(tmp_path / "a", "bus/1.png", "car/1.png", "train/1.png")
    assert open_source(str(tmp_path / "a")).classes == ("bus", "car", "train")
    write_files(tmp_path / "b", "bullet train/1.png", "test tube/1.png")
    assert open_source(str(tmp_path / "b")).classes == ("bullet train", "test tube")
    write_files(tmp_path / "c", "train/a/1.png", "train/b/1.png", "list.txt")
    assert open_source(str(tmp_path / "c")).classes == ("a", "b")


def test_one_split_alone_needs_no_choice_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    write_any(tmp_path / "a", ("0000.tar", "0001.tar"))
    assert len(open_source(str(tmp_path / "a"))) == 2
    assert "choose one of numbered, or leave --split out" in refusal(tmp_path / "a", "train")
    write_any(tmp_path / "b", ("x/1.png", "y/1.png"))
    assert "holds no split 'train', but x, y; leave --split out" in refusal(tmp_path / "b", "train")
    write_any(tmp_path / "c", ("wrapped/x/1.png", "wrapped/y/1.png"))
    message = refusal(tmp_path / "c")
    assert f"{tmp_path}/c/wrapped, with 2 folders; give that one as the source" in message
    assert len(open_source(f"{tmp_path}/c/wrapped")) == 2


def test_folders_around_splits_and_beside_them(tmp_path: Path) -> None:
    """What is neither clearly classes nor clearly splits is refused, with a way out that works."""
    cases = {
        "a": (("train/x/1.png", "train/y/1.png", "samples/1.png"), None, "choose one of samples, train"),
        "b": (("test_data/train/x/1.png", "test_data/val/x/1.png"), None, "give that one as the source"),
        "c": (
            ("test_data/train/x/1.png", "test_data/val/x/1.png"),
            "test",
            "c/test_data, with 2 folders; give that",
        ),
        "d": (
            ("imagenet/train/x/1.png", "imagenet/val/x/1.png", "cat/1.png"),
            None,
            "such as {}/d/imagenet, and others",
        ),
        "e": (
            ("imagenet/train/x/1.png", "cifar/train/x/1.png", "cifar/test/x/1.png"),
            "train",
            "{}/e/cifar, and others",
        ),
        "f": (
            ("train/all/x/1.png", "train/all/y/1.png", "val/x/1.png"),
            "train",
            "{}/f/train/all, with 2 folders",
        ),
        "g": (
            ("new-train/x/1.png", "new-train/y/1.png"),
            None,
            "one folder of images, {}/g/new-train; give that",
        ),
    }
    for name, (files, split, words) in cases.items():
        assert words.format(tmp_path) in refusal(write_files(tmp_path / name, *files), split)
    assert len(open_source(f"{tmp_path}/a", "train")) == 2
    assert len(open_source(f"{tmp_path}/b/test_data", "train")) == 1
    assert (
        open_source(f"{tmp_path}/f/train/all").classes
        == open_source(f"{tmp_path}/g/new-train").classes
        == ("x", "y")
    )
    write_files(tmp_path / "h", "bus/images/1.png", "train/images/1.png", "car/images/1.png")
    assert open_source(f"{tmp_path}/h").classes == ("bus", "car", "train")


def test_configurations_of_a_hub_are_not_joined(tmp_path: Path) -> None:
    names = ("160px/train-00000-of-00001.parquet", "full/train-00000-of-00001.parquet")
    write_any(tmp_path, names)
    message = refusal(tmp_path, "train")
    assert all(f"{tmp_path}/{name}" in message for name in names)
    assert len(open_source(f"{tmp_path}/full", "train")) == 1
    assert len(open_source(f"{tmp_path}/*/train-*.parquet")) == 2  # as the message says


def test_several_names_with_one_word_are_not_joined(tmp_path: Path) -> None:
    """Two data sets in one folder, or splits of a longer name."""
    write_any(
        tmp_path, ("cifar10-train-0.parquet", "cifar100-train-0.parquet", "test_r1-00000-of-00001.parquet")
    )
    assert "choose one of cifar10-train, cifar100-train, test with --split" in refusal(tmp_path)
    assert "several splits; choose one of cifar10-train, cifar100-train with" in refusal(tmp_path, "train")
    assert len(open_source(str(tmp_path), "cifar100-train")) == len(open_source(str(tmp_path), "test")) == 1
    assert len(open_source(f"{tmp_path}/cifar*-train-*.parquet")) == 2


def test_names_of_parquet_files_as_writers_make_them(tmp_path: Path) -> None:
    hub = [f"train-0000{i}-of-00002-{'ab' * 4}{i}{'0f' * 4}.parquet" for i in range(2)]
    spark = [f"train.parquet/part-0000{i}-1b4e28ba-2fa1-11d2-883f-c000.snappy.parquet" for i in range(2)]
    for number, names in enumerate((hub, spark, [name.partition("/")[2] for name in spark])):
        assert len(open_source(str(write_any(tmp_path / str(number), tuple(names))))) == 2
    (tmp_path / "0" / hub[1]).unlink()
    message = refusal(tmp_path / "0")
    assert f"{tmp_path}/0/train-00001-of-00002.parquet is not there" in message
    assert len(open_source(message.rpartition("such as ")[2].strip("'"))) == 1


def test_the_cache_of_a_hub(tmp_path: Path) -> None:
    """Its files are links to others of numbers; two snapshots have the same."""
    blob = write_parquet(tmp_path / "hub/blobs/0f3a", [0, 1])
    for snapshot in ("aa", "bb"):
        folder = tmp_path / "hub/snapshots" / snapshot / "data"
        folder.mkdir(parents=True)
        (folder / "train-00000-of-00001.parquet").symlink_to(blob)
    assert "same split in 2 folders" in refusal(tmp_path / "hub")
    assert "are the same file" in refusal(f"{tmp_path}/hub/snapshots/*/data/*.parquet")
    assert len(open_source(f"{tmp_path}/hub/snapshots/aa")) == 2


def test_shards_that_are_missing(tmp_path: Path) -> None:
    write_any(tmp_path / "a", ("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"))
    message = refusal(tmp_path / "a")
    assert (
        f"{tmp_path}/a/train-00001-of-00003.parquet is not there, and {tmp_path}/a holds 2 of 3 files"
        in message
    )
    rest = open_source(message.rpartition("such as ")[2].strip("'"))
    assert (len(rest), list(rest.left_out.values())) == (2, [1])
    write_any(tmp_path / "b", ("train-0000.tar", "train-0001.tar", "train-0003.tar"))
    assert open_source(str(tmp_path / "b")).left_out == {
        f"number of a shard that is not there, such as {tmp_path}/b/train-0002.tar": 1
    }


# --- shards that disagree -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "options", "reason"),
    [
        ([0, 1], {"names": ["white", "black"]}, "different class names (label 0 is 'black' and 'white')"),
        ([0, 1], {"names": ["black", "blue"]}, "(label 1 is 'white' and 'blue')"),
        ([0, 1], {"names": ["black", "white", "grey"]}, "(2 and 3 of them)"),
        (["0", "1"], {}, "is of type string; labels must be integers"),
        ([0.0, 1.0], {}, "is of type double; labels must be integers"),
        ([0, 1], {"image": "img"}, "columns 'img' and 'label'"),
        ([0, 1], {"label": "labels"}, "columns 'image' and 'labels'"),
    ],
)
def test_parquet_shards_that_disagree(
    tmp_path: Path, labels: list[object], options: dict, reason: str
) -> None:
    first = write_parquet(tmp_path / "train-0.parquet", [0, 1], ["black", "white"])
    second = write_parquet(tmp_path / "train-1.parquet", labels, **options)
    message = refusal(tmp_path)
    assert reason in message
    assert str(second) in message
    assert str(first) in message or "must be integers" in reason
    assert len(open_source(str(first))) == 2


def test_a_shard_without_class_names_is_said(tmp_path: Path) -> None:
    first = write_parquet(tmp_path / "train-0.parquet", [0, 1], ["black", "white"])
    second = write_parquet(tmp_path / "train-1.parquet", [1])
    source = open_source(str(tmp_path))
    assert source.classes == ("black", "white")
    words = f"file without class names, which were taken from {first}, such as {second}"
    assert source.left_out == {words: 1}


@pytest.mark.parametrize("shards", [1, 2])
def test_an_image_in_two_shards_is_said(tmp_path: Path, shards: int) -> None:
    twice, bad = png(), b"no image"
    write_tar(tmp_path / "in/train-0.tar", ("a.png", twice), ("a.cls", b"0"), ("c.png", bad), ("c.cls", b"0"))
    write_tar(tmp_path / "in/train-1.tar", ("a.png", twice), ("a.cls", b"1"), *sample("b"))
    out = tmp_path / "x.beton"
    text = convert(str(tmp_path / "in"), out, on_error="skip", shards=shards, workers=1)
    said = "1 x an image that is stored already (1 with another label), such as"
    assert (
        f"{said} {tmp_path}/in/train-1.tar member a.png, which is {tmp_path}/in/train-0.tar member a.png"
        in text
    )
    assert said in verify(str(out), workers=1)


# --- samples that are left out --------------------------------------------------------------------------------


def test_keys_with_dots_are_samples(tmp_path: Path) -> None:
    members = [
        *sample("a"),
        *sample("photo v1.0", 1),
        *sample("photo v1.1", 2),
        *sample("x/b.c.d", 3),
        *sample("a.2", 4),
    ]
    write_tar(tmp_path / "train-0.tar", *members)
    source = open_source(str(tmp_path))
    assert source.labels_N.tolist() == [0, 1, 2, 3, 4]
    assert [source.name(index).partition(" member ")[2] for index in range(5)] == [
        "a.png", "photo v1.0.png", "photo v1.1.png", "x/b.c.d.png", "a.2.png",
    ]  # fmt: skip
    assert source.left_out == {}


def test_a_field_of_a_key_with_dots_belongs_to_it(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "train-0.tar", *sample("a.1.x", 1), ("a.1.x.mask.png", png()), ("a.1.x.txt", b"?")
    )
    source = open_source(str(tmp_path))
    assert keys(source) == ["a.1.x.png"]
    assert source.left_out == {f"further image of a sample, such as {tar} member a.1.x.mask.png": 1}


def test_members_that_are_left_out_are_counted(tmp_path: Path) -> None:
    strays = [
        ("README", b"?"),
        ("b.txt", b"?"),
        ("c.gif", b"?"),
        ("__MACOSX/._a.png", b"?"),
        ("a.mask.png", png()),
    ]
    tar = write_tar(tmp_path / "train-0.tar", *strays, *sample("a"))
    text = convert(str(tmp_path), tmp_path / "x.beton", workers=1)
    assert f"left out: 4 x member of no sample, such as {tar} member README\n" in text
    assert f"left out: 1 x further image of a sample, such as {tar} member a.mask.png\n" in text
    manifest = Manifest.load(tmp_path / "x.beton")
    assert (manifest.num_samples, sum(manifest.left_out.values())) == (1, 5)


@pytest.mark.parametrize("member", ["b.v1.png", "b.png", "x/b.1.2.png"])
def test_an_image_without_label_is_named(tmp_path: Path, member: str) -> None:
    tar = write_tar(tmp_path / "train-0.tar", *sample("a"), (member, png()))
    message = refusal(tmp_path)
    assert str(tar) in message
    assert member.removesuffix(".png") in message


def test_tars_that_hold_no_samples_themselves(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "c/n01.tar", ("n01_1.png", png()))
    outer = write_tar(tmp_path / "o/img_train.tar", ("n01.tar", inner.read_bytes()), ("n02.tar.gz", b"?"))
    assert f"{outer} is a tar of tars, such as 'n01.tar'; unpack it" in refusal(tmp_path / "o")
    message = refusal(tmp_path / "c")
    assert f"{inner}: sample 'n01_1' has no label" in message
    assert "are of one class, unpack it (into a folder named after the class)" in message
    shutil.unpack_archive(inner, tmp_path / "unpacked/n01")  # as both say
    assert open_source(str(tmp_path / "unpacked")).classes == ("n01",)


def test_files_of_a_folder_that_are_left_out_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path / "in", "a/1.png", "b/1.JPEG", "a/2.gif", "b/3.heic", "a/4", "stray.png", "a/._1.png",
                "a/.ipynb_checkpoints/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/a/1.png")  # fmt: skip
    os.mkfifo(tmp_path / "in/a/pipe.png")
    text = convert(str(tmp_path / "in"), tmp_path / "x.beton", workers=1)
    manifest = Manifest.load(tmp_path / "x.beton")
    assert manifest.classes == ("a", "b")
    assert manifest.left_out == {
        "hidden or special file or folder, such as .ipynb_checkpoints": 5,
        "image outside of class folders, such as stray.png": 1,
        "file without extension, such as a/4": 1,
        ".gif file, such as a/2.gif": 1,
        ".heic file, such as b/3.heic": 1,
    }
    assert all(f"left out: {count} x {what}" in text for what, count in manifest.left_out.items())


def test_manifests_of_before_left_out_files_were_counted(tmp_path: Path) -> None:
    write_beton(image_folder(write_files(tmp_path / "in", "a/1.png")), tmp_path / "x.beton", workers=1)
    file = tmp_path / "x.beton.json"
    values = json.loads(file.read_text())
    del values["left_out"]
    file.write_text(json.dumps(values))
    assert check_beton(tmp_path / "x.beton").left_out == {}


# --- awkward layouts ------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_files(tmp_path / "in", b"a/\xff.png", "a/b\n.png")
    (tmp_path / "in/a").joinpath(os.fsdecode(b"\xfe.png")).write_bytes(b"no image")
    manifest = write_beton(
        open_source(str(tmp_path / "in")), tmp_path / "x.beton", workers=1, on_error="skip"
    )
    assert manifest.num_samples == 2
    assert [name for name, _ in manifest.skipped] == [f"{tmp_path}/in/a/\\xfe.png"]
    manifest.summary("x").encode()
    write_files(tmp_path / "class", b"a\xff/1.png")
    assert f"class folder {tmp_path}/class/a\\xff is not UTF-8; rename the folder" in refusal(
        tmp_path / "class"
    )
    (tmp_path / "tar").mkdir()
    tar = write_tar(tmp_path / "x.tar", *sample("a"))
    tar.rename(tmp_path / "tar" / os.fsdecode(b"\xff.tar"))
    assert f"{tmp_path}/tar/\\xff.tar is not UTF-8; rename the file" in refusal(tmp_path / "tar")


def test_links(tmp_path: Path) -> None:
    """To a folder above: not followed, said. To another folder: read."""
    write_files(tmp_path / "in", "a/1.png", "b/2.png")
    write_files(tmp_path / "else", "3.png")
    (tmp_path / "in/a/up").symlink_to("..")
    (tmp_path / "in/a/round").symlink_to(tmp_path / "in/a")
    (tmp_path / "in/c").symlink_to(tmp_path / "else")
    source = open_source(str(tmp_path / "in"))
    assert keys(source) == ["1.png", "2.png", "3.png"]
    assert source.left_out == {"link to a folder above it, such as a/round": 2}
    (tmp_path / "in/b/gone.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"b/gone\.png cannot be read: No such file"):
        write_beton(open_source(str(tmp_path / "in")), tmp_path / "x.beton", workers=1)
    write_tar(tmp_path / "elsewhere/train-1.tar", *sample("a"))
    write_tar(tmp_path / "shards/train-0.tar", *sample("a"))
    (tmp_path / "shards/more").symlink_to(tmp_path / "elsewhere")
    assert "same split in 2 folders" in refusal(tmp_path / "shards")


@pytest.mark.parametrize("stray", ["x.tar", "a/x.parquet", "a/x.tar.gz"])
def test_a_stray_shard_among_class_folders(tmp_path: Path, stray: str) -> None:
    write_any(tmp_path, ("a/1.png", "b/2.png", stray.removesuffix(".gz")))
    if stray.endswith(".gz"):
        (tmp_path / stray.removesuffix(".gz")).rename(tmp_path / stray)
    message = refusal(tmp_path)
    assert f"{tmp_path}/{stray}" in message
    assert f"{tmp_path}/a/1.png" in message
    (tmp_path / stray).unlink()
    assert len(open_source(str(tmp_path))) == 2


def test_both_kinds_of_shards(tmp_path: Path) -> None:
    write_any(tmp_path, ("train-0.tar", "train-1.parquet"))
    assert f"{tmp_path}/train-0.tar and {tmp_path}/train-1.parquet" in refusal(tmp_path)
    assert len(open_source(f"{tmp_path}/*.tar")) == len(open_source(f"{tmp_path}/*.parquet")) == 1


def test_what_img2dataset_writes(tmp_path: Path) -> None:
    for number, label in (("00000", 1), ("00001", 0)):
        members = [
            (f"{number}0000.jpg", png()),
            (f"{number}0000.json", json.dumps({"label": label}).encode()),
        ]
        write_tar(tmp_path / f"tars/{number}.tar", *members, (f"{number}0000.txt", b"a caption"))
        write_parquet(tmp_path / f"tars/{number}.parquet", [label], image="url", images=["http://x"])
        (tmp_path / f"tars/{number}_stats.json").write_text("{}")
        write_parquet(tmp_path / f"parquet/{number}.parquet", [label], image="jpg", images=[png()])
        write_files(tmp_path, f"files/{number}/{number}0000.jpg", f"files/{number}/{number}0000.json")
    tars, parquet = open_source(str(tmp_path / "tars")), open_source(str(tmp_path / "parquet"))
    assert tars.labels_N.tolist() == parquet.labels_N.tolist() == [1, 0]
    assert list(tars.left_out.values()) == [2, 2]
    assert f"{tmp_path}/files/00000 is a folder of img2dataset, no class: 000000000.jpg" in refusal(
        tmp_path / "files"
    )


def test_imagenet_as_kaggle_has_it(tmp_path: Path) -> None:
    data = "ILSVRC/Data/CLS-LOC"
    names = ("train/n01/n01_1", "train/n02/n02_1", "val/val_1", "val/val_2", "test/test_1")
    write_files(
        tmp_path, *(f"{data}/{name}.JPEG" for name in names), "ILSVRC/Annotations/CLS-LOC/train/n01/1.xml"
    )
    assert "holds several splits; choose one of test, train, val" in refusal(tmp_path)
    assert open_source(str(tmp_path), "train").classes == ("n01", "n02")
    assert "has no class folders" in refusal(tmp_path, "val")
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text("ImageId,PredictionString\nval_2,n01 1 2 3 4 n01 5 6 7 8\nval_1,n02 1 2 3 4\n")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\nn03 shark\n")
    source = open_source(str(tmp_path), "val")
    assert (source.classes, source.labels_N.tolist()) == (("n01", "n02", "n03"), [1, 0])
    assert keys(source) == ["val_1.JPEG", "val_2.JPEG"]
    assert f"{data}/test has no class folders" in refusal(tmp_path, "test")
    table.write_text("ImageId,PredictionString\nval_2,n01 1 2 3 4\n")
    assert f"{table} has no label for {tmp_path}/{data}/val/val_1.JPEG" in refusal(tmp_path, "val")
    table.write_text("ImageId,PredictionString\nval_1,n01\nval_2,n01\nval_3,n02\n")
    assert f"{table} lists val_3, which is not in {tmp_path}/{data}/val (1 of 3" in refusal(tmp_path, "val")
    table.write_text("ImageId,PredictionString\nval_1,n01\nval_2,n09\n")
    assert f"{table} gives val_2 class 'n09'" in refusal(tmp_path, "val")


def test_folders_that_are_known_to_be_no_classes(tmp_path: Path) -> None:
    """Tiny ImageNet's validation images lie in val/images, beside a table."""
    write_files(tmp_path, "train/n01/images/1.JPEG", "train/n02/images/2.JPEG", "val/images/val_0.JPEG")
    assert open_source(str(tmp_path), "train").classes == ("n01", "n02")
    assert f"{tmp_path}/val has one folder, {tmp_path}/val/images, which is no class" in refusal(
        tmp_path, "val"
    )


@needs_ffcv
@pytest.mark.parametrize(
    ("fields", "row"),
    [
        (("img", "target"), lambda image, label: (image, label)),
        (("label", "image"), lambda image, label: (label, image)),
        (("image", "index", "label"), lambda image, label: (image, 90 - label, label)),
        (("image", "other", "label"), lambda image, label: (image, 90 - label, label)),
        (("weight", "image", "meta", "class"), lambda image, label: (0.5, image, {"a": "b" * label}, label)),
    ],
)
def test_files_of_ffcv_with_other_fields(tmp_path: Path, fields: tuple[str, ...], row: object) -> None:
    pictures = [np.full((8, 8, 3), 40 * label, np.uint8) for label in range(3)]
    source = beton_images(
        ffcv_file(tmp_path, fields, [row(*pair) for pair in zip(pictures, range(3), strict=True)])
    )
    assert source.labels_N.tolist() == [0, 1, 2]
    assert [source.read(index).tobytes() for index in range(3)] == [picture.tobytes() for picture in pictures]


def ffcv_file(folder: Path, names: tuple[str, ...], rows: list[tuple]) -> Path:
    from ffcv.fields import FloatField, IntField, JSONField, RGBImageField
    from ffcv.writer import DatasetWriter

    kinds = {np.ndarray: RGBImageField, float: FloatField, dict: JSONField, int: IntField}
    fields = {name: kinds[type(value)]() for name, value in zip(names, rows[0], strict=True)}
    DatasetWriter(str(folder / "x.beton"), fields, num_workers=1).from_indexed_dataset(rows)
    return folder / "x.beton"


@needs_ffcv
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (("one", "two", "image"), r"fields one \(type 1\), two \(type 1\), image"),
        (("image", "idx"), "idx"),
        (("image",), "image"),
    ],
)
def test_files_of_ffcv_whose_label_is_not_known(tmp_path: Path, fields: tuple[str, ...], reason: str) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    file = ffcv_file(tmp_path, fields, [tuple(picture if name == "image" else 0 for name in fields)])
    with pytest.raises(
        ValueError, match=rf"x\.beton is not an FFCV file .*{reason}.*needs one RGBImageField"
    ):
        open_source(str(file))


def test_a_validation_set_without_some_classes(tmp_path: Path) -> None:
    """Training refuses it; written with the classes of the training set, its labels are right."""
    write_files(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/a/1.png", "val/c/2.png")
    train, val = tmp_path / "train.beton", tmp_path / "val.beton"
    convert(str(tmp_path), train, split="train", workers=1)
    convert(str(tmp_path), val, split="val", workers=1)
    config = TrainConfig(
        data=DataConfig(train=str(train), val=str(val), batch_size=1, upscale=True),
        model=ModelConfig(num_classes=3),
    )
    with pytest.raises(ValueError, match=rf"'b' is only in the first; write .* with --classes-of {train}"):
        check_data(config)
    text = convert(str(tmp_path), val, split="val", classes_of=str(train), workers=1)
    assert "no images of 1 of the classes, such as b" in text
    assert beton_images(val).labels_N.tolist() == [0, 2]
    check_data(config)
    (tmp_path / "val/b").mkdir()
    assert f"class folder {tmp_path}/val/b holds no images" in refusal(tmp_path, "val")
    write_files(tmp_path / "val", "d/1.png")
    shutil.rmtree(tmp_path / "val/b")
    with pytest.raises(ValueError, match=rf"/val has class 'd', which is none of the 3 of {train}"):
        convert(str(tmp_path), val, split="val", classes_of=str(train), workers=1)


def test_folders_that_are_trained_on_directly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a .beton there is no summary, and what is left out is logged."""
    write_files(tmp_path, "train/a/1.png", "train/b/2.png", "train/b/3.gif", "val/b/1.png", "val/a/2.png")
    data = DataConfig(
        train=f"{tmp_path}/train", val=f"{tmp_path}/val", backend="torchvision", batch_size=1, upscale=True
    )
    config = TrainConfig(data=data, model=ModelConfig(num_classes=2))
    check_data(config)
    assert caplog.messages == [f"{tmp_path}/train: 1 x .gif file, such as b/3.gif is left out"]
    with pytest.raises(
        ValueError, match=r"holds several splits; choose one of train, val with --split, or give its"
    ):
        check_data(dataclasses.replace(config, data=dataclasses.replace(data, train=str(tmp_path))))


def test_classes_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [0, 1, 1], ["white", "black"])
    source = with_classes(open_source(str(tmp_path / "x.parquet")), ("black", "grey", "white"), "x")
    assert source.labels_N.tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="x has two classes of one name"):
        with_classes(source, ("black", "black"), "x")


def test_a_class_that_lacks_a_split_keeps_its_label(tmp_path: Path) -> None:
    write_files(tmp_path, "a/train/1.png", "b/train/2.png", "b/test/3.png")
    source = open_source(str(tmp_path), "test")
    assert (source.classes, source.labels_N.tolist()) == (("a", "b"), [1])


def test_bare_names_of_numbered_folders_go_by_number(tmp_path: Path) -> None:
    write_files(tmp_path, *(f"in/{number}/1.png" for number in range(12)))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    (tmp_path / "names.txt").write_text("\n".join(words))
    source = named(open_source(str(tmp_path / "in")), str(tmp_path / "names.txt"))
    by_folder = {source.name(i).split("/")[-2]: source.classes[source.label(i)] for i in range(12)}
    assert by_folder == {str(number): word for number, word in enumerate(words)}
    (tmp_path / "in/11").rename(tmp_path / "in/12")
    with pytest.raises(
        ValueError,
        match=r"names\.txt has bare names, .*numbers with gaps or repeats, from 0 to 12; give lines such",
    ):
        named(open_source(str(tmp_path / "in")), str(tmp_path / "names.txt"))
