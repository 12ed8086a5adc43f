"""WebDataset shards: real photographs, layouts that are in use, and tars that are wrong in every way we know."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lape_ray.data.sources import image_folder, open_source, tar_shards
from lape_ray.data.sources.find import expand_ranges
from lape_ray.data.sources.tar import Header

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def png(pixels: np.ndarray = PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PNG = png()


def write_tar(path: Path, *members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, label: object = 0, extension: str = "png") -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", PNG), (f"{key}.cls", str(label).encode())]


@pytest.fixture(scope="module")
def shards(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs in three shards; labels before, behind and far from their images."""
    source = image_folder(photograph_folder)
    root = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        images, labels = [], []
        for i in range(4 * shard, 4 * shard + 4):
            images.append((f"n{i:04}.jpg", source.encoded(i)))
            if i % 2:
                labels.append((f"n{i:04}.json", json.dumps({"label": i, "width": 3}).encode()))
            else:
                labels.append((f"n{i:04}.cls", f"{i}\n".encode()))
        order = [
            labels + images,
            images + labels,
            [m for pair in zip(images, labels, strict=True) for m in pair],
        ]
        write_tar(root / f"train-{shard:04}.tar", *order[shard])
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in source.classes))
    return root


def test_photographs_are_those_of_the_folder(shards: Path, photograph_folder: Path) -> None:
    folder = image_folder(photograph_folder)
    source = open_source(str(shards))
    assert len(source) == 12
    assert source.labels_N.tolist() == list(range(12))
    assert source.classes == folder.classes
    for i in range(12):
        assert source.encoded(i) == folder.encoded(i)
        assert source.name(i) == f"{shards}/train-{i // 4:04}.tar member n{i:04}.jpg"
    np.testing.assert_array_equal(np.asarray(source.read(7)), np.asarray(folder.read(7)))


@pytest.mark.parametrize(
    "where", ["train-0001.tar", "train-*.tar", "train-000[12].tar", "train-{0001..0002}.tar", "{0..0}/train-{1..1}.tar"]
)  # fmt: skip
def test_ways_to_name_shards(shards: Path, where: str) -> None:
    (shards / "0").mkdir(exist_ok=True)
    if not (shards / "0" / "train-1.tar").exists():
        (shards / "0" / "train-1.tar").symlink_to(shards / "train-0001.tar")
    source = open_source(str(shards / where), "train")
    (shards / "0" / "train-1.tar").unlink()
    assert source.labels_N[0] == {"train-*.tar": 0}.get(where, 4)
    assert len(source) == {"train-*.tar": 12, "train-000[12].tar": 8, "train-{0001..0002}.tar": 8}.get(
        where, 4
    )


def test_ranges() -> None:
    names = [str(path) for path in expand_ranges("a{08..11}-{2..3}.tar")]
    assert names == ["a08-2.tar", "a08-3.tar", "a09-2.tar", "a09-3.tar",
                     "a10-2.tar", "a10-3.tar", "a11-2.tar", "a11-3.tar"]  # fmt: skip
    for bad, message in (("a{5..3}.tar", "is empty"), ("a{0..9999999}.tar", "more than 1,000,000"),
                         ("{0..99999}{0..99999}", "more than 1,000,000"), ("a{x,y}.tar", "no range"),
                         ("a{1..2", "no range")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            expand_ranges(bad)


def test_splits_and_class_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", *sample("a", 2), *sample("b", 0))
    write_tar(tmp_path / "val-0.tar", *sample("c", 1))
    write_tar(tmp_path / "nested/test/000.tar", *sample("d", 1))
    assert open_source(str(tmp_path), "train").classes == ("0", "1", "2")
    assert len(open_source(str(tmp_path), "test")) == 1
    with pytest.raises(ValueError, match="several splits; choose one of test, train, val"):
        open_source(str(tmp_path))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert open_source(str(tmp_path), "test").classes == ("cat", "dog")
    with pytest.raises(ValueError, match=r"train-0\.tar member a\.png has label 2, outside 0\.\.1"):
        open_source(str(tmp_path), "train")
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match=r"classes\.txt must have the name of a class on each line"):
        open_source(str(tmp_path), "val")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"classes\.txt cannot be read"):
        open_source(str(tmp_path), "val")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar(tmp_path: Path, format: int) -> None:
    deep = "d/" + "x" * 90 + "/" + "y" * 60  # longer than a plain header holds in its name
    members = [
        *sample(deep, 1),
        *sample("é", 0, "PNG"),
        ("README.md", b"?"),
        ("noext", b"?"),
        ("._a.png", b"mac"),
    ]
    source = open_source(str(write_tar(tmp_path / "x.tar", *members, format=format)))
    assert len(source) == 2
    assert [source.label(i) for i in range(2)] == [1, 0]
    assert source.encoded(0) == source.encoded(1) == PNG
    assert source.name(0).endswith("y" * 60 + ".png")
    assert source.name(1).endswith("member é.PNG")


def headers() -> dict[str, bytes]:
    """Headers of files of 1,234 bytes as programs write them, and some that are wrong."""
    info = tarfile.TarInfo("folder/a.png")
    info.size, info.mode, info.uname = 1234, 0o644, "me"
    plain = info.tobuf(tarfile.USTAR_FORMAT)

    def changed(at: int, data: bytes) -> bytes:
        """Put data into the header, and its checksum in order."""
        changed = plain[:at] + data + plain[at + len(data) :]
        total = sum(changed) - sum(changed[148:156]) + 8 * 32
        return changed[:148] + b"%06o\0 " % total + changed[156:]

    return {
        "plain": plain,
        "GNU": info.tobuf(tarfile.GNU_FORMAT),
        "a name of 100 bytes": changed(0, b"n" * 100),
        "a name that is not UTF-8": changed(0, b"\xff.png\0"),
        "a name in two parts": changed(345, b"above"),
        "numbers that end with blanks": changed(100, b"000644 \0000000 \0000000 \0"),
        "a size of 8 GB": changed(124, b"\x80" + (1 << 33).to_bytes(11, "big")),
        "no type": changed(156, b"\0"),
        "a folder without a type": changed(0, b"folder/\0\0\0\0\0")[:156] + changed(156, b"\0")[156:],
        "a link": changed(156, b"2"),
        "a device": changed(329, b"0000001\0"),
        "a wrong size": changed(124, b"0000000123x"),
        "a wrong device": changed(329, b"x"),
        "a wrong checksum": plain[:148] + b"000000\0 " + plain[156:],
        "zeros": bytes(512),
        "half of one": plain[:256],
    }


@pytest.mark.parametrize("kind", headers())
def test_a_header_is_read_as_tarfile_reads_it(kind: str) -> None:
    def read(info: type[tarfile.TarInfo]) -> tuple[object, ...]:
        try:
            found = info.frombuf(headers()[kind], "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            return type(error), str(error)
        return found.name, found.size, found.type

    assert read(Header) == read(tarfile.TarInfo)


def test_a_plain_header_is_not_read_by_tarfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tarfile.TarInfo, "frombuf")
    for kind in ("plain", "GNU", "a name of 100 bytes"):
        assert Header.frombuf(headers()[kind], "utf-8", "surrogateescape").size == 1234


def test_other_fields_are_left_alone_and_cls_comes_first(tmp_path: Path) -> None:
    members = [
        ("a.seg.png", PNG),
        ("a.json", b'{"label": 9}'),
        ("a.txt", b"caption"),
        ("a.jpeg", PNG),
        ("a.cls", b" 3 "),
    ]
    members += [("b.webp", PNG), ("b.json", b'{"cls": 1}'), ("dir/b.png", PNG), ("dir/b.cls", b"2")]
    source = tar_shards(str(write_tar(tmp_path / "x.tar", *members)))
    assert source.labels_N.tolist() == [3, 1, 2]
    assert [source.name(i).rpartition(" ")[2] for i in range(3)] == ["a.jpeg", "b.webp", "dir/b.png"]


def test_parts_pickle_small_and_carry_their_own_files(shards: Path) -> None:
    names = [str(shards / f"train-{i:04}.tar") for i in range(3)]
    source = tar_shards(str(shards))
    part = source.take(slice(6, 10))
    assert part.files == tuple(names[1:])  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(part))
    for i in range(4):
        assert again.encoded(i) == source.encoded(6 + i)
        assert again.name(i) == source.name(6 + i)
    backwards = source.take(np.array([11, 0]))
    assert backwards.encoded(0) == source.encoded(11)
    assert backwards.encoded(1) == source.encoded(0)


def test_a_part_of_many_shards_is_small(tmp_path: Path) -> None:
    for shard in range(100):
        write_tar(tmp_path / f"train-{shard:04}.tar", *[m for i in range(20) for m in sample(f"{i}", i)])
    source = tar_shards(str(tmp_path), workers=1)
    assert len(source) == 2000
    assert len(pickle.dumps(source.take(slice(1000, 1032)))) < 4_000


def test_processes_make_the_same_index(shards: Path) -> None:
    alone, together = tar_shards(str(shards), workers=1), tar_shards(str(shards), workers=2)
    np.testing.assert_array_equal(alone.items_N, together.items_N)
    np.testing.assert_array_equal(alone.labels_N, together.labels_N)


# --- what is refused ------------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        open_source(str(path))
    assert path.name.partition("{")[0] in str(error.value)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a.jpg", PNG)], r"sample 'a' has no label; it has \.jpg, and needs \.cls"),
        ([("a.jpg", PNG), ("A.cls", b"0")], r"sample 'a' has no label"),
        ([("a.cls", b"0")], r"sample 'a' has no image; it has \.cls, and needs one of \.jpg"),
        ([("a.gif", PNG), ("a.cls", b"0")], r"no image; it has \.gif, \.cls"),
        ([("a.v2.jpg", PNG), ("a.json", b"{}")], r"no image; it has \.v2\.jpg, \.json"),
        ([("a.jpg", PNG), ("a.png", PNG), ("a.cls", b"0")], r"'a\.jpg' and 'a\.png' are two images"),
        ([*sample("a"), *sample("a", 1)], r"'a\.png' occurs twice"),
        ([("a.JPG", PNG), ("a.jpg", PNG), ("a.cls", b"0")], r"'a\.jpg' occurs twice"),
        ([*sample("a"), ("a.cls", b"1")], r"'a\.cls' occurs twice"),
        (sample("a", "cat"), r"'a\.cls' holds no label: b'cat' is not a whole number"),
        (sample("a", ""), r"'a\.cls' holds no label: b'' is not"),
        (sample("a", "1.0"), r"b'1\.0' is not a whole number"),
        (sample("a", "9" * 30), r"is not a whole number"),
        (sample("a", "\N{ARABIC-INDIC DIGIT THREE}"), r"is not a whole number"),
        (sample("a", "1" * 2**21), r"holds no label: it has 2,097,152 bytes"),
        (sample("a", 10**17), r"label of 100000000000000000, and no class names"),
        (sample("a", -1), r"member a\.png has label -1, outside"),
        ([("a.jpg", PNG), ("a.json", b'{"label": "3"}')], r"'a\.json' holds no label: '3' is not a whole"),
        ([("a.jpg", PNG), ("a.json", b'{"label": true}')], r"True is not a whole number"),
        ([("a.jpg", PNG), ("a.json", b'{"label": 1.5}')], r"1\.5 is not a whole number"),
        ([("a.jpg", PNG), ("a.json", b'{"label": 1e400}')], r"inf is not a whole number"),
        ([("a.jpg", PNG), ("a.json", b'{"class": 1}')], r"no object with label or cls"),
        ([("a.jpg", PNG), ("a.json", b"[1]")], r"no object with label or cls"),
        ([("a.jpg", PNG), ("a.json", b"{")], r"'a\.json' holds no label: it is not JSON"),
        ([("a.jpg", PNG), ("a.json", b"[" * 10**5)], r"'a\.json' holds no label: it is not JSON"),
        ([("a.jpg", PNG), ("a.json", b"\xff")], r"it is not JSON"),
        ([("README", b"")], r"holds no images"),
        ([], r"holds no images"),
    ],
)  # fmt: skip
def test_bad_samples(tmp_path: Path, members: list[tuple[str, bytes]], match: str) -> None:
    good = sample("good") if members and members[0][0] != "README" else []
    refused(write_tar(tmp_path / "x.tar", *good, *members), match)


def test_compressed_tars(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a" / "x.tar", *sample("a")).read_bytes()
    for name, data, match in (
        ("x.tar.gz", gzip.compress(plain), r"compressed with gzip.*unpack it with `gunzip`"),
        ("x.tgz", gzip.compress(plain), "gzip"),
        ("x.tar", gzip.compress(plain), "gzip"),
        ("x.tar.xz", lzma.compress(plain), "`unxz`"),
        ("x.tar.zst", b"\x28\xb5\x2f\xfd" + plain, "`unzstd`"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        refused(path, match)
        path.unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train-0.tar.gz").write_bytes(gzip.compress(plain))
    with pytest.raises(ValueError, match=r"train-0\.tar\.gz is compressed with gzip"):
        open_source(str(tmp_path / "folder"), "train")


def test_every_cut_is_seen(tmp_path: Path) -> None:
    """Wherever a shard ends too early, up to its end mark."""
    path = write_tar(tmp_path / "x.tar", *sample("a"), *sample("b", 1))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in [*range(0, end, 100), *range(512, end, 512), end - 1, end]:
        path.write_bytes(whole[:length])
        refused(path, "no tar file, or cut or damaged|is cut: it has no end mark")
    path.write_bytes(whole[: end + 512])
    assert len(open_source(str(path))) == 2


def test_damaged_and_hostile_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", *sample("a"), *sample("b", 1))
    whole = path.read_bytes()
    second = whole.index(b"b.png")
    for at in (second + 3, second + 124, second + 148):  # name, size and checksum of a header
        path.write_bytes(whole[:at] + b"\x7f" + whole[at + 1 :])
        refused(path, "continues after byte|no tar file, or cut or damaged")
    path.write_bytes(whole + whole)
    refused(path, "continues after byte .*joined")
    path.write_bytes(b"no tar at all" * 100)
    refused(path, "no tar file, or cut or damaged")
    path.write_bytes(b"")
    refused(path, "no tar file, or cut or damaged")

    def header(size: int, name: str = "c.png") -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)

    start = whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512]
    for size in (2**62, 2**40, -512, -(10**9)):
        path.write_bytes(start + header(size) + PNG + bytes(20_000))
        refused(path, "damaged|is cut")


def test_links_are_refused(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("folder/"))
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        refused(tmp_path / "x.tar", r"member 'a\.png' is a link or no plain file")


def test_members_are_never_unpacked(tmp_path: Path) -> None:
    """Their names may lead anywhere (`tar -P` of whole paths is in use), for none becomes a path."""
    keys = ("../../out", f"{tmp_path}/out", "./a/../out")
    write_tar(tmp_path / "x/y/x.tar", *[member for key in keys for member in sample(key)])
    before = set(tmp_path.rglob("*"))
    source = open_source(str(tmp_path / "x/y/x.tar"))
    assert [source.read(index).size for index in range(3)] == [(16, 12)] * 3
    assert source.name(0).endswith("x.tar member ../../out.png")
    assert set(tmp_path.rglob("*")) == before


def test_missing_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", *sample("a"))
    write_tar(tmp_path / "train-2.tar", *sample("b"))
    refused(tmp_path / "train-{0..3}.tar", r"train-1\.tar is not there \(2 of 4 are missing\); no tar shards")
    refused(tmp_path / "val-*.tar", r"is not there")
    refused(tmp_path / "absent.tar", r"is not there")
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(str(tmp_path / "absent"))


def test_a_shard_that_changes_after_its_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", *sample("a"))
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"x\.tar member a\.png ends early"):
        source.read(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"x\.tar member a\.png cannot be read: No such file"):
        source.read(0)
