"""Files that are not a plain RGB JPEG: read as users of torchvision and Pillow expect, named if they cannot be."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.photographs import cut
from PIL import Image
from torchvision.datasets.folder import pil_loader

from lape_ray.data.sources import Source, image_folder, load_image, tar_shards, unusual_format

HEIGHT, WIDTH = 12, 16


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return cut(5, (WIDTH, HEIGHT))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rotated(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif.tobytes()


def deep_png(color: int, values_HWC: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, grey (0) or RGB (2), which Pillow does not write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def wide(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, channels), dtype=np.uint16)


def animation(image: Image.Image, format: str) -> bytes:
    others = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue")]
    lossless = {"lossless": True} if format == "WEBP" else {}
    return encoded(image, format, save_all=True, append_images=others, **lossless)


# name of the file, how it is made of a photograph, what `unusual_format` says of it
Make = Callable[[Image.Image], bytes]
READABLE: dict[str, tuple[Make, str | None]] = {
    "plain.jpg": (lambda i: encoded(i, "JPEG"), None),
    "plain.JPEG": (lambda i: encoded(i, "JPEG"), None),
    "progressive.jpg": (lambda i: encoded(i, "JPEG", progressive=True), None),
    "plain.png": (lambda i: encoded(i, "PNG"), None),
    "plain.bmp": (lambda i: encoded(i, "BMP"), None),
    "plain.ppm": (lambda i: encoded(i, "PPM"), None),
    "plain.tiff": (lambda i: encoded(i, "TIFF"), None),
    "plain.webp": (lambda i: encoded(i, "WEBP", lossless=True), None),
    "grey.pgm": (lambda i: encoded(i.convert("L"), "PPM"), "grey"),
    "cmyk.jpg": (lambda i: encoded(i.convert("CMYK"), "JPEG"), "CMYK"),
    "grey.jpg": (lambda i: encoded(i.convert("L"), "JPEG"), "grey"),
    "one_bit.png": (lambda i: encoded(i.convert("1"), "PNG"), "one bit"),
    "palette.png": (lambda i: encoded(i.quantize(16), "PNG"), "palette"),
    "clear_palette.png": (
        lambda i: encoded(i.quantize(16), "PNG", transparency=3),
        "palette, transparency dropped",
    ),
    "clear_shades.png": (
        lambda i: encoded(i.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
        "palette, transparency dropped",
    ),
    "clear_colour.png": (lambda i: encoded(i, "PNG", transparency=(1, 2, 3)), "transparency dropped"),
    "alpha.png": (lambda i: encoded(i.convert("RGBA"), "PNG"), "transparency dropped"),
    "grey_alpha.png": (lambda i: encoded(i.convert("LA"), "PNG"), "grey, transparency dropped"),
    "alpha.webp": (lambda i: encoded(half_clear(i), "WEBP", lossless=True), "transparency dropped"),
    "lab.tif": (lambda i: encoded(i.convert("LAB"), "TIFF"), "LAB"),
    "upright.jpg": (lambda i: encoded(i, "JPEG", exif=rotated(1)), None),
    "rotated.jpg": (lambda i: encoded(i, "JPEG", exif=rotated(6)), "EXIF rotation 6 is not applied"),
    "mirrored.png": (lambda i: encoded(i, "PNG", exif=rotated(2)), "EXIF rotation 2 is not applied"),
    "nonsense.jpg": (lambda i: encoded(i, "JPEG", exif=rotated(77)), "damaged EXIF"),
    "png.jpg": (lambda i: encoded(i, "PNG"), "PNG named .jpg"),
    "jpeg.png": (lambda i: encoded(i, "JPEG"), "JPEG named .png"),
    "gif.jpg": (lambda i: encoded(i.quantize(16), "GIF"), "GIF named .jpg, palette"),
    "animated_gif.png": (
        lambda i: animation(i.quantize(16), "GIF"),
        "GIF named .png, palette, first of several pictures",
    ),
    "animated.webp": (lambda i: animation(i, "WEBP"), "first of several pictures"),
    "animated.png": (lambda i: animation(i, "PNG"), "first of several pictures"),
    "several.jpg": (lambda i: animation(i, "MPO"), "first of several pictures"),
    "pages.tif": (lambda i: animation(i, "TIFF"), "first of several pictures"),
    "deep_colour.png": (lambda i: deep_png(2, wide(3)), None),  # an opened image does not tell
}


def half_clear(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(128)
    return image


def folder_of(root: Path, name: str, data: bytes) -> Source:
    (root / "a").mkdir()
    (root / "a" / name).write_bytes(data)
    return image_folder(root)


def tar_of(root: Path, name: str, data: bytes) -> Source:
    with tarfile.open(root / "x.tar", "w") as tar:
        for member, content in ((name, data), (f"{name.partition('.')[0]}.cls", b"0")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return tar_shards(str(root / "x.tar"))


SOURCES = {"folder": folder_of, "tar": tar_of}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("make_source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", READABLE)
def test_pixels_are_those_of_torchvisions_loader(
    name: str, make_source: Callable[[Path, str, bytes], Source], photograph: Image.Image, tmp_path: Path
) -> None:
    make, words = READABLE[name]
    data = make(photograph)
    source = make_source(tmp_path, name, data)
    image = source.read(0)
    (tmp_path / "copy").write_bytes(data)
    expected = pil_loader(str(tmp_path / "copy"))
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert unusual_format(load_image(source.encoded(0), source.name(0)), source.name(0)) == words


@pytest.mark.parametrize("make_source", SOURCES.values(), ids=SOURCES)
def test_deep_grey_keeps_its_high_byte(
    make_source: Callable[[Path, str, bytes], Source], tmp_path: Path
) -> None:
    """Where Pillow's conversion, and so torchvision's loader, turns all above 255 white."""
    values_HW1 = wide(1)
    source = make_source(tmp_path, "deep.png", deep_png(0, values_HW1))
    np.testing.assert_array_equal(np.asarray(source.read(0)), np.repeat(values_HW1 >> 8, 3, axis=2))
    assert unusual_format(load_image(source.encoded(0), "deep.png"), "deep.png") == "16-bit grey"


def test_deep_colour_keeps_its_high_byte(tmp_path: Path) -> None:
    source = folder_of(tmp_path, "deep.png", deep_png(2, wide(3)))
    np.testing.assert_array_equal(np.asarray(source.read(0)), wide(3) >> 8)


UNREADABLE: dict[str, tuple[Make, str]] = {
    "empty.jpg": (lambda i: b"", "it is empty"),
    "text.jpg": (lambda i: b"<html>404</html>", "not an image that Pillow knows"),
    "cut.jpg": (lambda i: encoded(i, "JPEG")[:-60], "truncated"),
    "header.jpg": (lambda i: encoded(i, "JPEG")[:100], ""),
    "cut.png": (lambda i: encoded(i, "PNG")[:-200], ""),
    "cut.webp": (lambda i: encoded(i, "WEBP", lossless=True)[:-40], ""),
    "cut.bmp": (lambda i: encoded(i, "BMP")[:-40], "truncated"),
    "cut.tif": (lambda i: encoded(i, "TIFF")[:200], ""),
    "float.tif": (lambda i: encoded(i.convert("F"), "TIFF"), "mode 'F', whose white is not defined"),
    "int.tif": (lambda i: encoded(i.convert("I"), "TIFF"), "mode 'I', whose white is not defined"),
}


@pytest.mark.parametrize("make_source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_is_named(
    name: str, make_source: Callable[[Path, str, bytes], Source], photograph: Image.Image, tmp_path: Path
) -> None:
    make, reason = UNREADABLE[name]
    source = make_source(tmp_path, name, make(photograph))
    with pytest.raises(ValueError, match=rf"{name[:-4]}\{name[-4:]}.* {reason}"):
        source.read(0)


def test_names_without_an_extension_say_nothing_of_the_format(photograph: Image.Image) -> None:
    image = load_image(encoded(photograph, "PNG"), "x")
    assert unusual_format(image, "data/train.parquet row 7") is None
    assert unusual_format(image, "x.JPG") == "PNG named .jpg"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_stop_an_image(photograph: Image.Image) -> None:
    """An orientation of the type `undefined`, and EXIF that breaks off."""
    header = b"Exif\0\0II*\0\x08\0\0\0\x01\0"
    for exif, words in ((header + b"\x12\x01\x07\0\x02\0\0\0\x06\0\0\0", "damaged EXIF"), (header, None)):
        data = encoded(photograph, "JPEG", exif=exif)
        assert unusual_format(load_image(data, "x.jpg"), "x.jpg") == words
