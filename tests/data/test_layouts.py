"""Data sets of random layouts: what write_beton stores is what Pillow, pyarrow and tarfile read there, or is refused.

Each test draws a layout as people have them, writes it, and reads it again the plain way: every image below a folder,
row of a file or member of a tar. A sound layout must be stored whole, with the right labels. One with a fault must be
refused by name, or what is not stored must be counted.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pyarrow.parquet as pq
import pytest
from helpers.layouts import pixels, png, write_files, write_parquet, write_tar
from hypothesis import HealthCheck, given, settings

from lape_ray.data.beton import write_beton
from lape_ray.data.sources import EXTENSIONS, open_source
from lape_ray.data.sources.beton import beton_images
from lape_ray.data.sources.splits import split_word

Labelled = Counter[tuple[bytes, str]]
"""Pixels and class name of each image."""
MEANINGS = {
    "train": ("train", "training", "Train", "train2017"),
    "val": ("val", "valid", "validation", "dev", "VALIDATION"),
    "test": ("test", "testing"),
}
steady = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=list(HealthCheck)
)


@dataclass
class Layout:
    """A data set on the disk.

    Attributes:
        splits: meaning -> its images, as a plain reading finds them; '' where there are no splits
        extra: meaning -> files or members that are no part of it, and must be counted
        faults: meaning -> what is wrong with it, for which it must be refused
        doubtful: whether its names may be taken for those of splits, and so be refused
    """

    root: Path
    splits: dict[str, Labelled] = field(default_factory=dict)
    extra: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    doubtful: bool = False


def hold(layout: Layout, out: Path) -> None:
    """Hold what is stored of each split against the plain reading."""
    if len(layout.splits) > 1:
        with pytest.raises(ValueError, match=r"several splits; choose one of|parquet and image files"):
            open_source(str(layout.root))
    for meaning, expected in layout.splits.items():
        try:
            source = open_source(str(layout.root), meaning or None)
            manifest = write_beton(source, out, workers=1, mode="raw", fresh=True)
        except ValueError as error:
            assert layout.doubtful or meaning in layout.faults, f"sound, but refused: {error}"
            assert str(layout.root) in str(error)
            assert "\n" not in str(error)
            continue
        assert meaning not in layout.faults, layout.faults[meaning]
        stored = beton_images(out)
        found = Counter(
            (stored.read(i).tobytes(), stored.classes[stored.label(i)]) for i in range(len(stored))
        )
        assert found == expected
        assert manifest.num_samples == expected.total()
        assert sum(manifest.left_out.values()) == layout.extra[meaning]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("layout")


@st.composite
def split_words(draw: st.DrawFn, least: int = 1) -> dict[str, str]:
    """Meaning -> the word by which the data set calls it."""
    meanings = draw(st.lists(st.sampled_from(sorted(MEANINGS)), min_size=least, max_size=3, unique=True))
    return {meaning: draw(st.sampled_from(MEANINGS[meaning])) for meaning in meanings}


# --- class folders --------------------------------------------------------------------------------------------

CLASS_NAMES = (
    "n01440764",
    "0",
    "2",
    "10",
    "cat",
    "Cat dog",
    "test tube",
    "bullet_train",
    "é",
    "a.b",
    "values",
)
IMAGE_NAMES = (
    "1.png",
    "2.PNG",
    "x.y.jpg",
    "deep/er/3.JPEG",
    "b\udcff.png",
    "train.webp",
    "4.tiff",
    "a b.bmp",
)
STRAYS = ("._1.png", ".ipynb_checkpoints/1.png", "__MACOSX/1.png", "note.txt", "5.gif", "6.heic")


@st.composite
def folders(draw: st.DrawFn, root: Path) -> Layout:
    words = draw(st.one_of(st.just({"": ""}), split_words()))
    prefix = draw(st.sampled_from(("", "", "imagenet-", "my_"))) if "" not in words else ""
    above = draw(st.sampled_from(("", "ILSVRC/Data/CLS-LOC/", "set/"))) if "" not in words else ""
    classes = draw(st.lists(st.sampled_from(CLASS_NAMES), min_size=1, max_size=4, unique=True))
    if "" in words and draw(st.booleans()):
        classes.append("train")  # a class beside others, as in COCO
    within = "" in words and len(classes) > 1 and "train" not in classes and draw(st.integers(0, 4)) == 0
    if within:  # splits in each class
        words = draw(split_words())
        prefix = ""
    layout = Layout(root)
    for meaning, word in words.items():
        layout.splits[meaning] = Counter()
        for name in classes:
            inner = f"{name}/{word}" if within else f"{above}{prefix}{word}/{name}" if word else name
            files = draw(st.lists(st.sampled_from(IMAGE_NAMES), min_size=1, max_size=3, unique=True))
            write_files(root, *(f"{inner}/{file}" for file in files))
            if stray := draw(st.sampled_from((None, None, *STRAYS))):
                write_files(root, f"{inner}/{stray}")
                for one in (
                    words if within else (meaning,)
                ):  # it lies in the class, of which all splits are parts
                    layout.extra[one] += 1
            layout.splits[meaning].update(read_folder(root / inner, name))
    first = next(iter(words))
    base = root if within or not words[first] else root / f"{above}{prefix}{words[first]}"
    fault = draw(st.sampled_from(("", "", "", "link", "shard", "empty")))
    if fault == "link":
        (base / classes[0] / "up").symlink_to("..")
        for one in words if within else (first,):
            layout.extra[one] += 1
    elif fault == "shard":
        write_parquet(root / "stray.parquet", [0])
        layout.faults = dict.fromkeys(words, "a stray shard")
    elif fault == "empty" and not within:
        (base / "zzz").mkdir()
        layout.faults[first] = "an empty class folder"
    layout.doubtful = all(split_word(name) for name in classes)
    return layout


def read_folder(folder: Path, name: str) -> Labelled:
    """Read every image below a class folder with Pillow, but hidden ones."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS]
    hidden = ("._", ".i", "__M")
    kept = [
        path for path in files if not any(part.startswith(hidden) for part in path.relative_to(folder).parts)
    ]
    return Counter((pixels(path.read_bytes()), name) for path in kept)


@given(data=st.data())
@steady
def test_class_folders(fresh: Callable[[], Path], data: st.DataObject) -> None:
    place = fresh()
    hold(data.draw(folders(place / "in")), place / "x.beton")


# --- names of shards ------------------------------------------------------------------------------------------


@st.composite
def shard_names(draw: st.DrawFn, suffix: str) -> dict[str, list[str]]:
    """Meaning -> paths of its shards; '' for a set without split words."""
    words = draw(st.one_of(st.just({"": ""}), split_words()))
    prefix = draw(st.sampled_from(("", "imagenet-1k-", "cifar-100-", "cifar10_", "a b.")))
    folder = draw(st.sampled_from(("", "data/", "plain_text/", "a/b/")))
    style = draw(st.sampled_from(("of", "zeros", "plain", "bare", "folder")))
    names = {}
    for meaning, word in words.items():
        count = 1 if style == "bare" else draw(st.integers(1, 3))
        stem = f"{prefix}{word}".rstrip("-_.") or "part"
        paths = {
            "of": [f"{folder}{stem}-{i:05}-of-{count:05}" for i in range(count)],
            "zeros": [f"{folder}{stem}-{i:04}" for i in range(count)],
            "plain": [f"{folder}{stem}_{i}" for i in range(count)],
            "bare": [f"{folder}{stem}"],
            "folder": [f"{folder}{word or 'images'}/{i:05}" for i in range(count)],
        }[style]
        names[meaning] = [f"{path}{suffix}" for path in paths]
    return names


# --- parquet --------------------------------------------------------------------------------------------------

NAMES = ("black", "white", "grey")
FAULTS = ("", "", "", "order", "names", "column", "strings", "twice")


@st.composite
def parquets(draw: st.DrawFn, root: Path) -> Layout:
    shards = draw(shard_names(".parquet"))
    image, label = (
        draw(st.sampled_from(("image", "img", "png"))),
        draw(st.sampled_from(("label", "labels", "cls"))),
    )
    named, plain = draw(st.booleans()), draw(st.booleans())
    fault = draw(st.sampled_from(FAULTS))
    layout = Layout(root)
    for meaning, paths in shards.items():
        files = []
        for number, path in enumerate(paths):
            labels = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)) + ([2] if number == 0 else [])
            wrong = fault if number and number == len(paths) - 1 else ""
            names = {"order": NAMES[::-1], "names": (*NAMES, "red")}.get(wrong, NAMES) if named else ()
            images = [png() if plain else {"bytes": png(), "path": None} for _ in labels]
            written = [str(one) for one in labels] if wrong == "strings" else labels
            column = {"image": "img", "img": "png", "png": "image"}[image] if wrong == "column" else image
            files.append(write_parquet(root / path, written, names, image=column, label=label, images=images))
            if wrong in ("column", "strings") or (named and wrong in ("order", "names")):
                layout.faults[meaning] = wrong
        if "-of-" in paths[0] and len(paths) > 1 and draw(st.booleans()):
            files.pop(draw(st.integers(0, len(paths) - 1))).unlink()
            layout.faults[meaning] = "lost"
        elif fault == "twice" and "-" in paths[0].rpartition("/")[2]:
            link = files[-1].parent / "copies" / files[-1].name
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(files[-1])
            layout.faults[meaning] = fault
        sound = files if meaning not in layout.faults else ()
        layout.splits[meaning] = sum((read_parquet(file, image, label, named) for file in sound), Counter())
    return layout


def read_parquet(file: Path, image: str, label: str, named: bool) -> Labelled:
    """Read every row with pyarrow, and class names from the schema."""
    table = pq.ParquetFile(file).read()
    names: list[str] = [str(number) for number in range(3)]
    if named:
        names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    rows = zip(table.column(image).to_pylist(), table.column(label).to_pylist(), strict=True)
    return Counter(
        (pixels(row["bytes"] if isinstance(row, dict) else row), names[number]) for row, number in rows
    )


@given(data=st.data())
@steady
def test_parquet_shards(fresh: Callable[[], Path], data: st.DataObject) -> None:
    place = fresh()
    hold(data.draw(parquets(place / "in")), place / "x.beton")


# --- tar ------------------------------------------------------------------------------------------------------

KEYS = ("a", "dir/b", "./c", "photo v1.0", "photo v1.1", "photo", "x.y.z", "x.y", "n01_1", "train.1", "é")
OTHERS = ("README", "notes.txt", "._a.png", "__MACOSX/._b.png", "c.gif", "sub/.hidden.cls")


@st.composite
def tars(draw: st.DrawFn, root: Path) -> Layout:
    layout = Layout(root)
    shards = draw(shard_names(".tar"))
    fault = draw(st.sampled_from(("", "", "", "no label", "no image", "two images", "text", "stray image")))
    for meaning, paths in shards.items():
        found: Labelled = Counter()
        for number, path in enumerate(paths):
            keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True))
            members = []
            for place, key in enumerate(keys):
                label = 2 if place == 0 else draw(st.integers(0, 2))
                as_json = draw(st.booleans())
                text = json.dumps({"label": label, "key": key}) if as_json else str(label)
                members += [(f"{key}.png", png()), (f"{key}.{'json' if as_json else 'cls'}", text.encode())]
                if draw(st.integers(0, 3)) == 0:
                    members.append((f"{key}.txt", b"a caption"))
            others = draw(st.lists(st.sampled_from(OTHERS), max_size=2, unique=True))
            members += [(name, b"?") for name in others]
            layout.extra[meaning] += len(others)
            if fault and number == 0:
                members += broken(fault)
                layout.faults[meaning] = fault
            random.Random(draw(st.integers(0, 9))).shuffle(members)
            found += read_tar(write_tar(root / path, *members))
        layout.splits[meaning] = found
    return layout


def broken(fault: str) -> list[tuple[str, bytes]]:
    return {
        "no label": [("bad.png", png())],
        "no image": [("bad.cls", b"1")],
        "two images": [("bad.png", png()), ("bad.jpg", png()), ("bad.cls", b"1")],
        "text": [("bad.png", png()), ("bad.cls", b"cat")],
        "stray image": [("bad.v1.png", png())],
    }[fault]


def read_tar(file: Path) -> Labelled:
    """Read every image with tarfile, and the label of its name up to the last dot."""
    found: Labelled = Counter()
    with tarfile.open(file) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name, data in members.items():
        key = name.removesuffix(".png")
        if key != name and f"{key}.cls" in members:
            found[pixels(data), members[f"{key}.cls"].decode()] += 1
        elif key != name and f"{key}.json" in members:
            found[pixels(data), str(json.loads(members[f"{key}.json"])["label"])] += 1
    return found


@given(data=st.data())
@steady
def test_tar_shards(fresh: Callable[[], Path], data: st.DataObject) -> None:
    place = fresh()
    hold(data.draw(tars(place / "in")), place / "x.beton")
