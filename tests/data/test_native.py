"""The compiled crop decoder: the same pixels as Pillow, whatever the file; a status for all that is wrong.

Shape suffixes: B images of a batch, H and W pixels of the output, N anything counted.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.installed import needs_ffcv
from PIL import Image
from scipy import stats
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from lape_ray.data import native
from lape_ray.data.native import Decoder, Status

ROOT = Path(__file__).parent.parent.parent
NATIVE = ROOT / "lape_ray" / "data" / "native"
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
JPEG, RAW = 0, 1


@dataclass
class Stored:
    """Images as they lie in a file, one after the other."""

    file: np.ndarray
    offsets_B: np.ndarray
    lengths_B: np.ndarray
    modes_B: np.ndarray
    widths_B: np.ndarray
    heights_B: np.ndarray

    @classmethod
    def of(cls, files: Sequence[bytes], modes: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Stored:
        lengths_B = np.array([len(file) for file in files])
        width_B, height_B = np.array(sizes).T
        file = np.frombuffer(b"".join(files), np.uint8)
        return cls(file, np.cumsum(lengths_B) - lengths_B, lengths_B, np.array(modes), width_B, height_B)

    def __len__(self) -> int:
        return len(self.offsets_B)

    def decode(
        self,
        boxes_B4: np.ndarray,
        flips_B: np.ndarray | None = None,
        *,
        size: tuple[int, int] = (48, 40),
        decoder: Decoder | None = None,
        **options: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, H, W, 3) and statuses (B,); `size` is width and height, as Pillow has it."""
        out_BHW3 = np.full((len(self), size[1], size[0], 3), 77, np.uint8)
        if flips_B is None:
            flips_B = np.zeros(len(self), bool)
        statuses_B = (decoder or Decoder(1)).decode_batch(
            self.file, self.offsets_B, self.lengths_B, self.modes_B, self.widths_B, self.heights_B,
            boxes_B4, flips_B, out_BHW3, **options,
        )  # fmt: skip
        return out_BHW3, statuses_B


def store(*files: bytes) -> Stored:
    return Stored.of(files, [JPEG] * len(files), [Image.open(io.BytesIO(file)).size for file in files])


def store_raw(*images_HW3: np.ndarray) -> Stored:
    files = [image_HW3.tobytes() for image_HW3 in images_HW3]
    return Stored.of(files, [RAW] * len(files), [image_HW3.shape[1::-1] for image_HW3 in images_HW3])


def whole(stored: Stored) -> np.ndarray:
    zeros_B = np.zeros(len(stored))
    return np.stack([zeros_B, zeros_B, stored.widths_B, stored.heights_B], axis=1)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A texture with edges in colour and brightness, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + y / b) for a, b in rng.uniform(2, 25, (3, 2))]
    blocks = ((x // 7 + y // 5) % 3 - 1)[..., None] * rng.uniform(-60, 60, 3)
    noise = rng.normal(0, 8, (height, width, 3))
    return np.clip(128 + 60 * np.stack(waves, -1) + blocks + noise, 0, 255).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, "JPEG", **options)
    return file.getvalue()


def pillow(
    image: bytes | np.ndarray,
    box: Sequence[int],
    *,
    size: tuple[int, int] = (48, 40),
    flip: bool = False,
    interpolation: str = "bicubic",
) -> np.ndarray:
    opened = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(io.BytesIO(image))
    x, y, width, height = map(int, box)
    crop = opened.convert("RGB").crop((x, y, x + width, y + height)).resize(size, RESAMPLING[interpolation])
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)


def of_every_kind(files: list[bytes]) -> list[bytes]:
    grey = [file for file in files if Image.open(io.BytesIO(file)).mode == "L"]
    marked = [file for file in files if b"\xff\xdd\x00\x04" in file]
    assert grey and marked
    return [*files[::7], *grey, *marked[:9]]


@pytest.fixture(scope="module")
def photographs(photograph_folder: Path) -> list[bytes]:
    """Photographs of all samplings, grey ones and some with restart markers."""
    return of_every_kind([path.read_bytes() for path in sorted(photograph_folder.glob("*/*.JPEG"))])


# ---- pixels


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize("size", [(224, 224), (97, 160)], ids=str)
def test_photographs_are_pillows_to_the_bit(
    photographs: list[bytes], interpolation: Any, size: tuple[int, int]
) -> None:
    check_photographs(photographs, interpolation, size)


@pytest.mark.slow
def test_photographs_of_imagenet_are_pillows_to_the_bit(shared_dir: Path) -> None:
    """As coded by the programs of thousands of people, rather than by the two libraries of the other tests."""
    files = sorted(shared_dir.glob("data/imagenet-sample/*/*.JPEG"))
    check_photographs([path.read_bytes() for path in files], "bicubic", (224, 224))


def check_photographs(photographs: list[bytes], interpolation: Any, size: tuple[int, int]) -> None:
    stored = store(*photographs)
    epoch_index_B = np.arange(len(stored))
    boxes_B4 = native.random_resized_crops(3, 0, epoch_index_B, stored.widths_B, stored.heights_B)
    flips_B = native.flips(3, 0, epoch_index_B)
    got, statuses_B = stored.decode(boxes_B4, flips_B, size=size, interpolation=interpolation)
    native.check(statuses_B)
    for image, file, box, flip in zip(got, photographs, boxes_B4, flips_B, strict=True):
        wanted = pillow(file, box, size=size, flip=flip, interpolation=interpolation)
        np.testing.assert_array_equal(image, wanted)


def test_restart_markers_and_libjpegs_own_decoder_give_the_same_pixels(photographs: list[bytes]) -> None:
    plain = store(*photographs)
    marked = store(*(native.add_restart_markers(file) for file in photographs))
    for epoch in range(3):
        boxes_B4 = native.random_resized_crops(
            5, epoch, np.arange(len(plain)), plain.widths_B, plain.heights_B
        )
        wanted, statuses_B = plain.decode(boxes_B4, reference=True)
        native.check(statuses_B)
        for stored in (plain, marked):
            np.testing.assert_array_equal(stored.decode(boxes_B4)[0], wanted)


def all_kinds(width: int, height: int, seed: int) -> dict[str, bytes]:
    """One picture in the ways that JPEGs are coded."""
    import cv2

    image_HW3 = picture(width, height, seed)
    kinds = {
        "4:4:4": encode(image_HW3, subsampling=0, quality=92),
        "4:2:2": encode(image_HW3, subsampling=1, quality=75),
        "4:2:0": encode(image_HW3, subsampling=2, quality=90, optimize=True),
        "progressive": encode(image_HW3, progressive=True),
        "grey": encode(image_HW3[..., 0]),
        "RGB": encode(image_HW3, keep_rgb=True),
        "high quality": encode(image_HW3, quality=100),
        "low quality": encode(image_HW3, quality=5),
        "marker every 3 MCUs": encode(image_HW3, restart_marker_blocks=3),
        "marker every row": encode(image_HW3, restart_marker_rows=1),
    }
    for name in ("411", "440"):
        factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}")
        kinds[name] = cv2.imencode(".jpg", image_HW3, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor])[1].tobytes()
    for name in ("4:4:4", "4:2:0", "progressive", "grey", "RGB", "411"):
        for interval in (1, 4, 7, 5000):
            kinds[f"{name}, {interval}"] = native.add_restart_markers(kinds[name], interval)
    return kinds


@pytest.mark.parametrize(("width", "height"), [(61, 83), (128, 64), (17, 9), (1, 40), (50, 1)])
def test_every_kind_of_jpeg_and_every_edge(width: int, height: int) -> None:
    """Crops as large as the output compare decoding alone: each pixel is as in the whole image."""
    rng = np.random.default_rng(width)
    kinds = all_kinds(width, height, width)
    stored = store(*kinds.values())
    corner = [(0, 0, 1, 1), (width - 1, height - 1, 1, 1), (0, 0, width, height)]
    starts = [(int(rng.integers(width)), int(rng.integers(height))) for _ in range(12)]
    inner = [
        (x, y, int(rng.integers(1, width - x + 1)), int(rng.integers(1, height - y + 1))) for x, y in starts
    ]
    for box in corner + inner:
        got, statuses_B = stored.decode(np.tile(box, (len(stored), 1)), size=box[2:])
        for name, image, status in zip(kinds, got, statuses_B, strict=True):
            assert status == Status.OK, name
            wanted = pillow(kinds[name], box, size=box[2:])
            np.testing.assert_array_equal(image, wanted, f"{name} {box}")


@pytest.mark.parametrize("simd", [True, False])
@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_resize_of_any_size_to_any_size(interpolation: Any, simd: bool) -> None:
    rng = np.random.default_rng(1)
    decoder = Decoder(1, simd=simd)
    # From a height of 100 widths on, Pillow takes the vertical pass first, and rounds otherwise.
    edges = [(1, 1, 1, 1), (2, 2, 300, 7), (500, 3, 1, 1), (3, 300, 11, 2), (700, 5, 2, 9), (1, 1, 50, 60)]
    for width, height, out_width, out_height in edges + rng.integers(1, 90, (60, 4)).tolist():
        image_HW3 = rng.integers(0, 256, (height, width, 3), np.uint8)
        stored, size = store_raw(image_HW3), (out_width, out_height)
        for flip in (False, True):
            got, statuses_B = stored.decode(
                whole(stored), np.array([flip]), size=size, interpolation=interpolation, decoder=decoder
            )
            wanted = pillow(
                image_HW3, (0, 0, width, height), size=size, flip=flip, interpolation=interpolation
            )
            assert statuses_B[0] == Status.OK
            np.testing.assert_array_equal(got[0], wanted, f"{width}x{height} to {size}")


def test_raw_and_jpeg_in_one_batch() -> None:
    images = [picture(width, 90 - width, width) for width in (20, 33, 64)]
    jpeg, raw = store(*(encode(image) for image in images)), store_raw(*images)
    both = Stored(
        np.concatenate([jpeg.file, raw.file]),
        np.concatenate([jpeg.offsets_B, raw.offsets_B + len(jpeg.file)]),
        *(np.concatenate([getattr(jpeg, name), getattr(raw, name)])
          for name in ("lengths_B", "modes_B", "widths_B", "heights_B")),
    )  # fmt: skip
    boxes_B4 = np.tile((3, 2, 15, 20), (6, 1))
    got, statuses_B = both.decode(boxes_B4)
    native.check(statuses_B)
    np.testing.assert_array_equal(got[:3], jpeg.decode(boxes_B4[:3])[0])
    np.testing.assert_array_equal(got[3:], np.stack([pillow(image, boxes_B4[0]) for image in images]))


def test_small_raw_images_are_copied() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    stored, flips_B = store_raw(*images), np.arange(50) % 2 == 1
    got, _ = stored.decode(whole(stored), flips_B, size=(32, 32))
    np.testing.assert_array_equal(got[::2], images[::2])
    np.testing.assert_array_equal(got[1::2], images[1::2, :, ::-1])


def test_an_interpolation_for_each_image(photographs: list[bytes]) -> None:
    stored = store(*photographs)
    filters_B = np.arange(len(stored)) % 3 == 0
    mixed, _ = stored.decode(whole(stored), interpolation=filters_B)
    for name, index in native.FILTERS.items():
        alike, _ = stored.decode(whole(stored), interpolation=name)
        np.testing.assert_array_equal((mixed == alike).all(axis=(1, 2, 3)), filters_B == index)


def test_threads_and_kernels_change_nothing(photographs: list[bytes]) -> None:
    stored = store(*(native.add_restart_markers(file) for file in photographs))
    boxes_B4 = native.random_resized_crops(0, 0, np.arange(len(stored)), stored.widths_B, stored.heights_B)
    flips_B = np.arange(len(stored)) % 3 == 0
    wanted, _ = stored.decode(boxes_B4, flips_B)
    for decoder in (Decoder(2), Decoder(3), Decoder(2, simd=False), Decoder(64)):
        for _ in range(2):
            got, _ = stored.decode(boxes_B4, flips_B, decoder=decoder)
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("resize", "size"), [(256, 224), (73, 64), (224, 224)])
def test_center_crops_are_torchvisions_resize_and_center_crop(
    photographs: list[bytes], resize: int, size: int
) -> None:
    stored = store(*photographs)
    boxes_B4 = native.center_crops(stored.widths_B, stored.heights_B, resize=resize, size=size)
    got, statuses_B = stored.decode(boxes_B4, size=(size, size), crop_first=False)
    native.check(statuses_B)
    resize_short, crop = Resize(resize, Image.Resampling.BICUBIC), CenterCrop(size)
    for image, file in zip(got, photographs, strict=True):
        wanted = np.asarray(crop(resize_short(Image.open(io.BytesIO(file)).convert("RGB"))))
        np.testing.assert_array_equal(image, wanted)


def test_center_crops_lie_inside() -> None:
    sides_2B = np.random.default_rng(0).integers(1, 3000, (2, 20000))
    boxes_B4 = native.center_crops(*sides_2B, resize=256, size=224)
    assert (boxes_B4 >= 0).all() and (boxes_B4[:, :2] + boxes_B4[:, 2:] <= sides_2B.T + 1e-9).all()


def test_empty_batch() -> None:
    empty = Stored(np.zeros(0, np.uint8), *(np.zeros(0, int) for _ in range(5)))
    assert empty.decode(np.zeros((0, 4)))[1].shape == (0,)


# ---- what is wrong


def damaged_at(share: float, data: bytes) -> bytes:
    """Bits of the compressed data inverted from there on, in a way that makes no marker."""
    start = int(len(data) * share)
    return (
        data[:start]
        + bytes(0x55 if byte != 0xFF else 0xFF for byte in data[start : start + 200])
        + data[start + 200 :]
    )


GOOD = encode(picture(200, 150), quality=90)
MARKED = native.add_restart_markers(GOOD)
CMYK = encode(Image.new("CMYK", (20, 20)))


@pytest.mark.parametrize(
    ("status", "data", "change"),
    [
        (Status.OK, GOOD, {}),
        (Status.DAMAGED, GOOD[: len(GOOD) // 2], {}),
        (Status.DAMAGED, MARKED[: len(MARKED) // 2], {}),
        (Status.DAMAGED, damaged_at(0.5, MARKED), {}),
        (Status.DAMAGED, MARKED.replace(b"\xff\xd3", b"\xff\xd4", 1), {}),
        (Status.DAMAGED, MARKED[: len(MARKED) // 2] + bytes(len(MARKED) // 2), {}),
        (Status.BAD_HEADER, b"", {}),
        (Status.BAD_HEADER, bytes(1000), {}),
        (Status.BAD_HEADER, b"\x89PNG" + GOOD[4:], {}),
        (Status.SIZE_MISMATCH, GOOD, {"widths_B": [201]}),
        (Status.SIZE_MISMATCH, GOOD, {"heights_B": [151]}),
        (Status.UNSUPPORTED, CMYK, {"widths_B": [20], "heights_B": [20]}),
        (Status.BAD_BOX, GOOD, {"box": (-1, 0, 20, 20)}),
        (Status.BAD_BOX, GOOD, {"box": (190, 0, 11, 20)}),
        (Status.BAD_BOX, GOOD, {"box": (0, 131, 20, 20)}),
        (Status.BAD_BOX, GOOD, {"box": (0, 0, 0, 20)}),
        (Status.BAD_BOX, GOOD, {"box": (0.5, 0, 20, 20)}),
        (Status.BAD_BOX, GOOD, {"box": (0, 0, float("nan"), 20)}),
        (Status.BAD_BOX, GOOD, {"box": (0, float("inf"), 20, 20)}),
        (Status.OUT_OF_RANGE, GOOD, {"lengths_B": [len(GOOD) + 1]}),
        (Status.OUT_OF_RANGE, GOOD, {"offsets_B": [2**63], "lengths_B": [2**63]}),
        (Status.OUT_OF_RANGE, bytes(200 * 150 * 3 - 1), {"modes_B": [RAW]}),
        (Status.OK, bytes(200 * 150 * 3), {"modes_B": [RAW]}),
        (Status.BAD_MODE, GOOD, {"modes_B": [2]}),
        (Status.TOO_LARGE, GOOD, {"widths_B": [2**16], "heights_B": [2**16]}),
    ],
)  # fmt: skip
def test_statuses(status: Status, data: bytes, change: dict[str, Any]) -> None:
    """Each fails alone: the other images are right, and its own pixels are zeros, never stale ones."""
    one = Stored.of([data], [JPEG], [(200, 150)])
    change = dict(change)
    box = change.pop("box", (0, 0, 200, 150) if status != Status.UNSUPPORTED else (0, 0, 20, 20))
    for name, values in change.items():
        setattr(one, name, np.array(values, np.uint64))
    good = store(GOOD)
    batch = Stored(
        np.concatenate([good.file, one.file]),
        *(np.concatenate([getattr(good, name), getattr(one, name).astype(np.uint64)]).astype(np.uint64)
          for name in ("offsets_B", "lengths_B", "modes_B", "widths_B", "heights_B")),
    )  # fmt: skip
    if "offsets_B" not in change:
        batch.offsets_B[1] += len(GOOD)
    images, statuses_B = batch.decode(np.array([(0, 0, 200, 150), box]))
    assert statuses_B.tolist() == [Status.OK, status]
    np.testing.assert_array_equal(images[0], pillow(GOOD, (0, 0, 200, 150)))
    if status != Status.OK:
        assert not images[1].any()
        with pytest.raises(ValueError, match="1 of 2 images cannot be read: image 1 of the batch: "):
            native.check(statuses_B)


def test_damage_outside_the_crop_does_not_matter() -> None:
    marked = damaged_at(0.5, MARKED)
    images, statuses_B = store(marked).decode(np.array([(0, 0, 200, 60)]))
    assert statuses_B[0] == Status.OK
    np.testing.assert_array_equal(images[0], pillow(GOOD, (0, 0, 200, 60)))


def test_too_many_scans() -> None:
    """A small file of thousands of scans keeps other decoders busy for minutes."""
    progressive = encode(picture(64, 64), progressive=True)
    start = progressive.rindex(b"\xff\xda")
    hostile = progressive[:start] + progressive[start:-2] * 2000 + progressive[-2:]
    assert store(hostile).decode(np.array([(0, 0, 64, 64)]))[1][0] in (Status.TOO_LARGE, Status.DAMAGED)
    with pytest.raises(ValueError, match="cannot add restart markers"):
        native.add_restart_markers(hostile)


def test_out_of_memory() -> None:
    """A progressive image is decoded whole: 216 MB for this one, of 100 kB."""
    code = """
        import io, resource, sys
        import numpy as np
        from PIL import Image
        from lape_ray.data import native
        file = io.BytesIO()
        Image.new("RGB", (6000, 6000)).save(file, "JPEG", progressive=True, subsampling=0)
        data = np.frombuffer(file.getvalue(), np.uint8)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
        statuses = native.Decoder(1).decode_batch(
            data, [0], [len(data)], [0], [6000], [6000], [(0, 0, 9, 9)], [False], np.empty((1, 9, 9, 3), np.uint8))
        assert statuses.tolist() == [native.Status.NO_MEMORY], statuses
    """
    run_python(code, cwd=ROOT)


def test_every_status_has_a_text() -> None:
    assert [status.value for status in Status] == list(range(len(native._native.STATUS_TEXTS)))
    assert len({status.text for status in Status}) == len(Status)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_BHW3": np.empty((2, 8, 8, 3), np.uint8)}, "must be uint8 \\(1, H, W, 3\\)"),
        ({"out_BHW3": np.empty((1, 8, 8, 3), np.int8)}, "must be uint8"),
        ({"out_BHW3": np.empty((1, 0, 8, 3), np.uint8)}, "a side must be"),
        ({"out_BHW3": np.empty((1, 8, 16, 3), np.uint8)[:, :, ::2]}, "C-contiguous"),
        ({"file": np.zeros((4, 4), np.uint8)}, "contiguous uint8 \\(N,\\)"),
        ({"lengths_B": [5, 5]}, "lengths has shape"),
        ({"lengths_B": [-1]}, "lengths must be whole numbers from 0"),
        ({"widths_B": [2**32]}, "widths must be whole numbers from 0"),
        ({"widths_B": [1.5]}, "widths must be whole numbers"),
        ({"boxes_B4": [(0, 0, 4)]}, "boxes has shape"),
        ({"interpolation": "lanczos"}, "choose one of bilinear, bicubic"),
        ({"interpolation": np.array([2])}, "indices from 0 to 1"),
        ({"interpolation": np.array([0, 1])}, "interpolation has shape"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = {
        "file": np.zeros(48, np.uint8), "offsets_B": [0], "lengths_B": [48], "modes_B": [RAW], "widths_B": [4],
        "heights_B": [4], "boxes_B4": [(0, 0, 4, 4)], "flips_B": [False],
        "out_BHW3": np.empty((1, 8, 8, 3), np.uint8),
    }  # fmt: skip
    assert Decoder(1).decode_batch(**arguments)[0] == Status.OK
    with pytest.raises(ValueError, match=message):
        Decoder(1).decode_batch(**(arguments | change))


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_impossible_numbers_of_threads(threads: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Decoder(threads)


def test_two_callers_share_a_decoder() -> None:
    stored, decoder = store(*[GOOD] * 20), Decoder(2)
    wanted, _ = stored.decode(whole(stored))
    results: list[np.ndarray] = []
    callers = [
        threading.Thread(target=lambda: results.append(stored.decode(whole(stored), decoder=decoder)[0]))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result, wanted)


def test_a_forked_child_is_told_to_make_its_own_decoder() -> None:
    code = """
        import os
        import numpy as np
        from lape_ray.data.native import Decoder
        def decode(decoder):
            image = np.zeros((1, 2, 2, 3), np.uint8)
            return decoder.decode_batch(image.ravel(), [0], [12], [1], [2], [2], [(0, 0, 2, 2)], [False], image)[0]
        decoder = Decoder(3)
        assert decode(decoder) == 0
        child = os.fork()
        if child == 0:
            try:
                decode(decoder)
            except RuntimeError as error:
                assert "make a new decoder" in str(error)
                del decoder  # must not wait for threads that are not there
                os._exit(decode(Decoder(2)))
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert decode(decoder) == 0
    """
    run_python(code, cwd=ROOT)


# ---- restart markers


def coefficients_survive(before: bytes, after: bytes) -> None:
    assert np.array_equal(Image.open(io.BytesIO(before)), Image.open(io.BytesIO(after)))


def test_markers_are_lossless_and_where_they_should_be() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    before = encode(picture(200, 150), quality=90, exif=exif, comment=b"hello")
    for interval in (1, 4, 13, 5000):
        after = native.add_restart_markers(before, interval)
        coefficients_survive(before, after)
        mcus = -(-200 // 16) * -(-150 // 16)
        body = after[after.index(b"\xff\xda") :]
        markers = sum(body.count(bytes([0xFF, 0xD0 + i])) for i in range(8))
        assert markers == (mcus - 1) // interval
        assert b"Exif" not in after and b"hello" not in after
    assert len(native.add_restart_markers(before, 5000)) < len(before)


@pytest.mark.parametrize("name", ["progressive", "grey", "RGB", "4:4:4", "411", "marker every row"])
def test_markers_for_every_kind(name: str) -> None:
    before = all_kinds(61, 83, 1)[name]
    after = native.add_restart_markers(before, 4)
    coefficients_survive(before, after)
    assert "progressive" not in Image.open(io.BytesIO(after)).info
    assert native.add_restart_markers(after, 4) == after


@pytest.mark.parametrize("data", [CMYK, GOOD[:-2000], damaged_at(0.5, GOOD), b"", b"RIFF" + bytes(100)])
def test_markers_for_what_cannot_have_them(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot add restart markers: "):
        native.add_restart_markers(data)
    with pytest.raises(ValueError, match="interval=0 is out of range"):
        native.add_restart_markers(GOOD, 0)


@needs_ffcv
def test_ffcv_reads_images_with_markers() -> None:
    from ffcv.libffcv import imdecode

    decoded = []
    for data in (GOOD, native.add_restart_markers(GOOD)):
        image_HW3 = np.zeros((150, 200, 3), np.uint8)
        imdecode(np.frombuffer(data, np.uint8), image_HW3, 150, 200, 150, 200)
        decoded.append(image_HW3)
    assert decoded[0].any()
    np.testing.assert_array_equal(*decoded)


# ---- random numbers


def test_philox_known_answers() -> None:
    """The vectors that its authors publish with Random123 (kat_vectors, philox4x32 10)."""
    full = 0xFFFFFFFF
    for counter, key, answer in [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([full] * 4, (full, full), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]:  # fmt: skip
        assert native.philox4x32(np.array([counter]), key).tolist() == [answer]


def expected_crop(seed: int, epoch: int, position: int, width: int, height: int) -> list[int]:
    """RandomResizedCrop's procedure in plain Python, with the words that the documented counter gives."""
    for attempt in range(10):
        counter = [position & 0xFFFFFFFF, position >> 32, epoch, attempt]
        words = native.philox4x32(np.array([counter]), (seed & 0xFFFFFFFF, seed >> 32))[0]
        a, b, c, d = (int(word) / 2**32 for word in words)
        area = width * height * (0.08 + 0.92 * a)
        ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * b)
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(c * (width - w + 1)), int(d * (height - h + 1)), w, h]
    raise AssertionError("no attempt fitted")


def test_crops_follow_the_documented_counter() -> None:
    rng = np.random.default_rng(0)
    for seed, epoch, position in [(0, 0, 0), (7, 3, 2**40 + 5), (2**63 + 1, 299, 1281166)]:
        width, height = (int(side) for side in rng.integers(100, 600, 2))
        box = native.random_resized_crops(seed, epoch, [position], [width], [height])[0]
        assert box.tolist() == expected_crop(seed, epoch, position, width, height)


def test_draws_depend_on_seed_epoch_and_index_alone() -> None:
    epoch_index_B, sides_B = np.arange(1000), np.full(1000, 400)

    def draw(seed: int, epoch: int, epoch_index: np.ndarray) -> np.ndarray:
        sides = sides_B[: len(epoch_index)]
        boxes = native.random_resized_crops(seed, epoch, epoch_index, sides, sides)
        return np.column_stack([boxes, native.flips(seed, epoch, epoch_index)])

    all_B5 = draw(1, 2, epoch_index_B)
    np.testing.assert_array_equal(draw(1, 2, epoch_index_B[::-7]), all_B5[::-7])
    for other in (draw(1, 3, epoch_index_B), draw(2, 2, epoch_index_B), draw(1 + 2**32, 2, epoch_index_B)):
        assert (other[:, :4] == all_B5[:, :4]).all(axis=1).mean() < 0.01
        assert abs((other[:, 4] == all_B5[:, 4]).mean() - 0.5) < 0.1


@pytest.mark.parametrize(
    ("width", "height", "scale", "ratio"),
    [
        (500, 375, (0.08, 1.0), (3 / 4, 4 / 3)),
        (333, 500, (0.35, 1.0), (3 / 4, 4 / 3)),
        (80, 400, (0.5, 1.0), (1 / 2, 2.0)),  # many tries fail here
    ],
)
def test_crops_are_distributed_as_torchvisions(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    """Kolmogorov-Smirnov for each number of a box, its area and its shape."""
    import torch

    count = 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    theirs = theirs[:, [1, 0, 3, 2]]
    ours = native.random_resized_crops(
        11, 0, np.arange(count), np.full(count, width), np.full(count, height), scale=scale, ratio=ratio
    )
    features: list[Callable[[np.ndarray], np.ndarray]] = [
        *(lambda boxes, i=i: boxes[:, i] for i in range(4)),
        lambda boxes: boxes[:, 2] * boxes[:, 3],
        lambda boxes: boxes[:, 2] / boxes[:, 3],
    ]
    for feature in features:
        assert stats.ks_2samp(feature(ours), feature(theirs)).pvalue > 1e-3


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (7, 7)])
def test_fallback_crop_is_torchvisions(width: int, height: int) -> None:
    import torch

    image = torch.empty(3, height, width)
    top, left, h, w = RandomResizedCrop.get_params(image, [50.0, 50.0], [3 / 4, 4 / 3])  # never fits
    box = native.random_resized_crops(0, 0, [0], [width], [height], scale=(50.0, 50.0))[0]
    assert box.tolist() == [left, top, w, h]


def test_flips_have_their_probability() -> None:
    epoch_index_B = np.arange(20000)
    for probability in (0.0, 0.3, 0.5, 1.0):
        share = native.flips(0, 0, epoch_index_B, probability).mean()
        assert (
            abs(share - probability)
            < 4 * np.sqrt(probability * (1 - probability) / len(epoch_index_B)) + 1e-9
        )


def test_bad_draws() -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        native.flips(-1, 0, [0])
    with pytest.raises(ValueError, match="at least 1 pixel"):
        native.random_resized_crops(0, 0, [0], [0], [5])
    with pytest.raises(ValueError, match="0 < low <= high"):
        native.random_resized_crops(0, 0, [0], [5], [5], scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="size=300"):
        native.center_crops([5], [5], resize=256, size=300)


# ---- the build


def run_python(code: str, *, cwd: Path, **environment: str) -> None:
    """Run `code` in a fresh Python; an AssertionError with what it printed if it fails."""
    import textwrap

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """The Python files of the package without anything that was built, as a submitted working directory."""
    for path in (ROOT / "lape_ray").rglob("*.py"):
        target = tmp_path / "tree" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path / "tree"


def test_found_where_a_source_tree_shadows_the_package(source_tree: Path) -> None:
    code = f"""
        import numpy as np
        import lape_ray
        from lape_ray.data import native
        assert native.__file__.startswith({str(source_tree)!r}), native.__file__
        image = np.arange(48, dtype=np.uint8)
        out = np.empty((1, 4, 4, 3), np.uint8)
        native.check(native.Decoder(1).decode_batch(image, [0], [48], [1], [4], [4], [(0, 0, 4, 4)], [False], out))
        assert (out.ravel() == image).all()
    """
    run_python(code, cwd=source_tree.parent, PYTHONPATH=str(source_tree))


@pytest.mark.parametrize(
    ("module", "message"),
    [("raise ImportError('libjpeg.so.62: no such file')", "libjpeg.so.62"), ("ABI = -5", "has version -5")],
)
def test_a_missing_or_stale_extension_says_the_fix(source_tree: Path, module: str, message: str) -> None:
    (source_tree / "_lape_ray_native.py").write_text(module)
    code = f"""
        try:
            import lape_ray.data.native
        except ImportError as error:
            assert "make setup" in str(error) and {message!r} in str(error), error
        else:
            raise AssertionError("imported")
    """
    run_python(code, cwd=source_tree, PYTHONPATH=str(source_tree))


# ---- fuzzing


@pytest.fixture(scope="session")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The fuzz program, built with sanitizers, and the seeds that it mutates."""
    folder = tmp_path_factory.mktemp("fuzz")
    sources = [ROOT / "tests" / "data" / "fuzz_native.cpp", *NATIVE.glob("*.cpp")]
    sources = [path for path in sources if path.name != "module.cpp"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_ = ["g++", "-std=c++17", "-O1", "-g1", "-ffp-contract=off", *sanitize, f"-I{NATIVE}", "-c"]
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    commands = [[*compile_, str(path), "-o", file] for path, file in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(subprocess.run, check=True), commands))
    program = str(folder / "fuzz")
    subprocess.run(["g++", *sanitize, *objects, "-o", program, "-ljpeg", "-pthread"], check=True)
    kinds = all_kinds(97, 61, 0)
    for name in ("4:2:0", "4:4:4", "progressive", "grey", "411", "marker every 3 MCUs"):
        (folder / f"{name.replace(':', '')}.jpg").write_bytes(kinds[name])
    (folder / "cmyk.jpg").write_bytes(CMYK)
    return [program, *sorted(str(path) for path in folder.glob("*.jpg"))]


def fuzz(fuzzer: list[str], count: int, seed: int) -> None:
    program, *seeds = fuzzer
    done = subprocess.run([program, str(count), str(seed), *seeds], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    endings = {line.split(": ", 1)[1]: int(line.split()[0]) for line in done.stdout.splitlines()}
    for status in (Status.OK, Status.DAMAGED, Status.BAD_HEADER, Status.SIZE_MISMATCH, Status.BAD_BOX):
        assert endings[status.text] > 0


def test_fuzz(fuzzer: list[str]) -> None:
    fuzz(fuzzer, 500, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_fuzz_longer(fuzzer: list[str], seed: int) -> None:
    fuzz(fuzzer, 10_000, seed)
