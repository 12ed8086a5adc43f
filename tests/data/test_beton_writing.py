"""Writing that is interrupted, in shards, over another mapper; and files of other writers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.installed import needs_ffcv
from helpers.photographs import cut
from PIL import Image

from lape_ray.data.beton import (
    Manifest,
    check_beton,
    manifest_path,
    read_contents,
    set_files,
    shard_path,
    write_beton,
    writer,
)
from lape_ray.data.beton.journal import open_journal
from lape_ray.data.beton.writer import PART_SAMPLES
from lape_ray.data.sources import Source, digits, open_source
from lape_ray.data.sources.beton import beton_images

ROOT = Path(__file__).resolve().parent.parent.parent
MANY = 5 * PART_SAMPLES + 7


@pytest.fixture(scope="module")
def source() -> Source:
    return digits().take(slice(0, MANY))


@pytest.fixture(scope="module")
def undisturbed(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_beton(source, tmp_path_factory.mktemp("whole") / "x.beton", workers=1)


class CutOffError(Exception):
    pass


def interrupt_after(parts: int) -> Any:
    """A mapper that fails once it has done some parts, as a lost cluster does; counts what it does."""

    def mapper(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        for count, task in enumerate(tasks):
            if count == parts:
                raise CutOffError
            yield function(task)

    return mapper


def hidden(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


def test_an_interrupted_writer_goes_on(source: Source, undisturbed: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    with pytest.raises(CutOffError):
        write_beton(source, path, mapper=interrupt_after(3))
    assert hidden(tmp_path) == [".x.beton.journal", ".x.beton.partial"]
    assert not path.exists()
    seen: list[tuple[int, int]] = []
    with pytest.raises(CutOffError):
        write_beton(source, path, mapper=interrupt_after(1), progress=lambda *n: seen.append(n))
    assert seen == [(3 * PART_SAMPLES, MANY), (4 * PART_SAMPLES, MANY)]
    manifest = write_beton(source, path, workers=1)
    assert (manifest.sha256, manifest.tables_sha256) == (undisturbed.sha256, undisturbed.tables_sha256)
    assert manifest.stored == undisturbed.stored
    assert hidden(tmp_path) == []
    assert check_beton(path, deep=True, workers=1) == manifest


def test_parts_that_come_read_only_are_written(source: Source, undisturbed: Manifest, tmp_path: Path) -> None:
    """As Ray's are, whose arrays lie in the memory that processes share."""

    def mapper(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        for done in map(function, tasks):
            for part in done:
                part.stored_N.flags.writeable = False
            yield done

    assert write_beton(source, tmp_path / "read_only.beton", mapper=mapper).sha256 == undisturbed.sha256


def test_the_bytes_of_a_file_stay_what_they_were(tmp_path: Path) -> None:
    """Files of earlier versions and of later ones are the same; large images leave gaps at the ends of pages."""
    rng = np.random.default_rng(0)
    for i in range(80):
        shape = (1 + i, 2 + i % 7, 3) if i % 17 else (1000, 1000 + 4 * i, 3)
        file = tmp_path / "images" / f"class{i % 3}" / f"{i:03}.ppm"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file)
    source = open_source(str(tmp_path / "images"))
    manifest = write_beton(source, tmp_path / "x.beton", mode="raw", workers=1)
    assert manifest.sha256 == "3ae85d2193e4217f8bace118659cf747736896550efc75435b110deb92b7a11c"
    assert manifest.tables_sha256 == "bddb6eb4c130d673d099f9651404f7df472c4e0951086b460e6fdb8ff9f7c20d"


def test_small_images_are_encoded_several_parts_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That changes neither the file nor where an interrupted writer goes on, and larger images are encoded by parts."""
    source, path = digits("train"), tmp_path / "x.beton"

    def write(stop: int = -1) -> list[int]:
        sizes: list[int] = []

        def mapper(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
            for task in tasks:
                sizes.append(len(task[0]))
                yield function(task)
                if len(sizes) == stop:
                    raise CutOffError

        with contextlib.suppress(CutOffError):
            write_beton(source, path, mapper=mapper)
        return sizes

    begun, ended = write(stop=18), write()
    assert begun == [PART_SAMPLES] * 16 + [2 * PART_SAMPLES] * 2
    assert max(ended) == 2 * PART_SAMPLES
    assert sum(begun + ended) == len(source)
    together = Manifest.load(path)
    monkeypatch.setattr(writer, "TASK_BYTES", 2000)  # less than a part has
    assert max(write()) == PART_SAMPLES
    assert Manifest.load(path).sha256 == together.sha256


def test_bytes_after_the_journals_last_line_do_not_count(
    source: Source, undisturbed: Manifest, tmp_path: Path
) -> None:
    """What a power failure leaves: a torn line, and data that no line speaks of."""
    path = tmp_path / "x.beton"
    with pytest.raises(CutOffError):
        write_beton(source, path, mapper=interrupt_after(4))
    journal, partial = tmp_path / ".x.beton.journal", tmp_path / ".x.beton.partial"
    lines = journal.read_bytes().splitlines(keepends=True)
    entries = json.loads(lines[1])
    assert len(entries) == 4
    journal.write_bytes(
        lines[0] + json.dumps(entries[:2]).encode() + b"\n" + json.dumps(entries[2:]).encode()[:-9]
    )
    with partial.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"\xff" * 3_000_000)
    seen: list[tuple[int, int]] = []
    manifest = write_beton(source, path, workers=1, progress=lambda *n: seen.append(n))
    assert seen[0] == (2 * PART_SAMPLES, MANY)
    assert manifest.sha256 == undisturbed.sha256


def test_other_options_or_sources_start_again(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"

    def begin(source: Source, **options: Any) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        with pytest.raises(CutOffError):
            write_beton(
                source, path, mapper=interrupt_after(2), progress=lambda *n: seen.append(n), **options
            )
        return seen

    fresh, two = [(PART_SAMPLES, MANY), (2 * PART_SAMPLES, MANY)], 2 * PART_SAMPLES
    assert begin(source) == fresh
    assert begin(source, quality=80) == fresh
    assert begin(source, quality=80, fresh=True) == fresh
    assert begin(source.take(np.arange(MANY)[::-1]), quality=80) == fresh
    assert begin(source, quality=80) == fresh
    assert begin(source, quality=80)[0] == (two, MANY)


def test_a_bad_image_can_be_skipped_on_the_second_try(tmp_path: Path) -> None:
    root = tmp_path / "images" / "a"
    root.mkdir(parents=True)
    for i in range(2 * PART_SAMPLES):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i:03}.png")
    (root / "040.png").write_bytes(b"no image")
    source, path = open_source(str(tmp_path / "images")), tmp_path / "x.beton"
    with pytest.raises(ValueError, match=r"040\.png cannot be read"):
        write_beton(source, path, workers=1)
    seen: list[tuple[int, int]] = []
    manifest = write_beton(source, path, workers=1, on_error="skip", progress=lambda *n: seen.append(n))
    assert seen[0] == (PART_SAMPLES, 2 * PART_SAMPLES)
    assert (manifest.num_samples, len(manifest.skipped)) == (2 * PART_SAMPLES - 1, 1)
    with pytest.raises(ValueError, match=r"040\.png cannot be read"):
        write_beton(source, path, workers=1)
    assert check_beton(path) == manifest  # of before


def test_one_writer_at_a_time(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    with (
        open_journal(path, "another"),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        write_beton(source, path, workers=1)
    assert write_beton(source, path, workers=1).num_samples == MANY


def test_a_killed_writer_goes_on(thumbnail_shards: Path, tmp_path: Path) -> None:
    """SIGKILL of the job and its processes after some of the parts; then the same command again."""
    job = ROOT / "jobs" / "write_beton.py"
    arguments = [str(thumbnail_shards), str(tmp_path / "x.beton"), "--split", "train"]
    arguments += ["--mode", "jpg", "--workers", "2"]
    slow = textwrap.dedent(f"""
        import runpy, sys, time
        from lape_ray.data.beton import journal
        journal.COMMIT_SECONDS = 0
        add = journal.Journal.add
        journal.Journal.add = lambda self, entry: (add(self, entry), time.sleep(0.3))  # there is little to write
        sys.argv = {["write_beton.py", *arguments]!r}
        runpy.run_path({str(job)!r}, run_name="__main__")
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", slow], env=environment, start_new_session=True) as process:
        log = tmp_path / ".x.beton.journal"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "x.beton").exists()
    again = subprocess.run(
        [sys.executable, str(job), *arguments], env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "continuing after" in again.stderr
    whole = write_beton(open_source(arguments[0], "train"), tmp_path / "y.beton", mode="jpg", workers=2)
    assert check_beton(tmp_path / "x.beton").sha256 == whole.sha256


def test_the_manifest_has_the_names_that_the_job_is_given(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"{digit} number {digit}\n" for digit in range(10)))
    job = [sys.executable, ROOT / "jobs/write_beton.py", "digits", tmp_path / "a.beton", "--workers=1"]
    names = ["--class-names", tmp_path / "names.txt"]
    subprocess.run([*job, "--subset=per-class:2", *names], check=True, capture_output=True)
    assert Manifest.load(tmp_path / "a.beton").classes == tuple(f"number {digit}" for digit in range(10))


def test_a_set_of_shards_is_one_file_in_parts(source: Source, undisturbed: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    manifest = write_beton(source, path, shards=3, workers=1)
    assert set_files(path) == tuple(shard_path(path, shard, 3) for shard in range(3))
    assert [file.name for file in set_files(path)] == [f"x-0000{i}-of-00003.beton" for i in range(3)]
    assert manifest == check_beton(path, deep=True, workers=1)
    assert (manifest.num_samples, manifest.class_counts) == (MANY, undisturbed.class_counts)
    assert manifest.bytes == sum(file.stat().st_size for file in set_files(path))
    contents = read_contents(path)
    assert np.array_equal(contents.labels_N, source.labels_N)
    assert contents.name(MANY - 1) == f"{shard_path(path, 2, 3)} image {MANY - 2 * MANY // 3 - 1}"
    stored = beton_images(path)
    assert all(stored.read(i).tobytes() == source.read(i).tobytes() for i in range(MANY))


def test_shards_that_are_finished_are_not_written_again(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    with pytest.raises(CutOffError):
        write_beton(source, path, shards=4, mapper=interrupt_in_shard(2))
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("x-*.beton")}
    assert len(times) == 2
    write_beton(source, path, shards=4, workers=1)
    assert all(file.stat().st_mtime_ns == before for file, before in times.items())
    write_beton(source, path, shards=4, workers=1, fresh=True)
    assert all(file.stat().st_mtime_ns != before for file, before in times.items())


def interrupt_in_shard(number: int) -> Any:
    calls = iter(range(100))

    def mapper(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        if next(calls) == number:
            raise CutOffError
        yield from map(function, tasks)

    return mapper


def test_sets_that_are_not_whole(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_beton(source, path, shards=3, workers=1)
    with pytest.raises(
        ValueError, match=r"x-00000-of-00003\.beton exists already, of another number of shards"
    ):
        write_beton(source, path, workers=1)
    with pytest.raises(ValueError, match="of another number of shards"):
        write_beton(source, path, shards=2, workers=1)
    second = shard_path(path, 1, 3)
    second.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"x-00001-of-00003\.beton is missing \(1 of 3 shards are\)"):
        check_beton(path)
    (tmp_path / "away").rename(second)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="and shards of that name do too"):
        check_beton(path)
    path.unlink()
    shard_path(path, 0, 7).write_bytes(b"")
    with pytest.raises(ValueError, match=r"shards of several sets .* of \[3, 7\] files"):
        check_beton(path)


def test_shards_of_other_classes_are_refused(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_beton(source, path, shards=2, workers=1)
    second = shard_path(path, 1, 2)
    classes = tuple("abcdefghij")
    dataclasses.replace(Manifest.load(second), classes=classes).save(second)
    with pytest.raises(ValueError, match="do not have the same classes"):
        check_beton(path)


@needs_ffcv
def test_a_file_of_ffcvs_own_writer_is_a_source(tmp_path: Path) -> None:
    """Rewritten without loss: the same coefficients with restart markers, checksums and a manifest."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    dataset = [(np.asarray(cut(number, (500 - number, 300 + 9 * number))), number) for number in range(12)]
    fields = {
        "image": RGBImageField(write_mode="jpg", max_resolution=300, jpeg_quality=90),
        "label": IntField(),
    }
    old, new = tmp_path / "old.beton", tmp_path / "new.beton"
    DatasetWriter(str(old), fields, num_workers=1).from_indexed_dataset(dataset)
    with pytest.raises(
        FileNotFoundError, match=r"make both from the existing \.beton: python jobs/write_beton\.py"
    ):
        check_beton(old)
    manifest = write_beton(beton_images(old), new, workers=1)
    assert manifest.stored == {"original_jpeg": 12}
    assert manifest.classes == tuple(map(str, range(12)))
    before, after = beton_images(old), beton_images(new)
    assert np.array_equal(before.labels_N, after.labels_N)
    assert all(before.read(i).tobytes() == after.read(i).tobytes() for i in range(12))
    assert check_beton(new, deep=True, workers=1) == manifest
    assert io.BytesIO(before.encoded(0)).read(2) == b"\xff\xd8"


def test_manifest_before_file(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two, the pair does not agree and is refused, and the next call needs no work."""
    from lape_ray.data.beton.journal import Journal

    path = tmp_path / "x.beton"
    write_beton(source, path, workers=1, quality=50)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self: (_ for _ in ()).throw(CutOffError))
        with pytest.raises(CutOffError):
            write_beton(source, path, workers=1, mode="jpg")
    with pytest.raises(ValueError, match="but its manifest says"):
        check_beton(path)
    seen: list[tuple[int, int]] = []
    manifest = write_beton(source, path, workers=1, mode="jpg", progress=lambda *n: seen.append(n))
    assert seen == [(MANY, MANY)]
    assert check_beton(path, deep=True, workers=1) == manifest
    assert manifest_path(path).exists()
