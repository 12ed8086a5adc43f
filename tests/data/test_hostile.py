"""Files that are damaged, or made to do harm: each reader gives one line that names the file, and touches nothing else.

To have another file tested, add a row to KINDS: how a whole one is made, and how it is read.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lape_ray.cluster.checkpoint_list import LIST, Listed, recover, write_list
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_record import RECORD, earlier_run, write_run
from lape_ray.config import TrainConfig
from lape_ray.data.beton import check_beton, manifest_path, shard_path, write_beton
from lape_ray.data.beton.writer import PART_SAMPLES
from lape_ray.data.sources import digits, open_source
from lape_ray.data.sources.beton import beton_images
from lape_ray.storage import (
    LEASE,
    LeaseLostError,
    Object,
    check_lease,
    copies,
    lease,
    leased,
    stage,
    transfer,
)
from lape_ray.training import checkpoint


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        make: write a whole one, and what belongs to it, into an empty folder; returns the file to damage
        read: read it as the product does; it must give the right values, or a ValueError or OSError
        called: what every error must name; None: the file
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    called: str | None = None


# --- the kinds ------------------------------------------------------------------------------------------------


def make_beton(folder: Path) -> Path:
    write_beton(digits().take(slice(0, 20)), folder / "x.beton", workers=1)
    return folder / "x.beton"


def make_manifest(folder: Path) -> Path:
    return manifest_path(make_beton(folder))


def read_manifest(file: Path) -> None:
    check_beton(file.with_name("x.beton")).summary("x.beton")


def make_manifest_of_a_shard(folder: Path) -> Path:
    write_beton(digits().take(slice(0, 20)), folder / "x.beton", shards=2, workers=1)
    return manifest_path(shard_path(folder / "x.beton", 1, 2))


def make_bare_beton(folder: Path) -> Path:
    file = make_beton(folder)
    manifest_path(file).unlink()
    return file


def read_bare_beton(file: Path) -> None:
    source = beton_images(file)
    for index in range(len(source)):
        source.read(index)


def read_beton(file: Path) -> None:
    check_beton(file, deep=True, workers=1)


UNFINISHED = digits().take(slice(0, 2 * PART_SAMPLES + 2))


class CutOffError(Exception):
    pass


def cut_off(function: Callable[[Any], Any], tasks: Any) -> Iterator[Any]:
    for task, _ in zip(tasks, range(2), strict=False):
        yield function(task)
    raise CutOffError


def make_journal(folder: Path) -> Path:
    with contextlib.suppress(CutOffError):
        write_beton(UNFINISHED, folder / "x.beton", mapper=cut_off)
    return folder / ".x.beton.journal"


def read_journal(file: Path) -> None:
    path = file.with_name("x.beton")
    write_beton(UNFINISHED, path, workers=1)
    check_beton(path, deep=True, workers=1)


def make_meta(folder: Path) -> Path:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    meta = checkpoint.Metadata(
        epochs_done=3,
        steps_done=17,
        progress=checkpoint.EpochProgress(step=2, logged=2, loss=1.5),
        config=TrainConfig(),
        metrics={"val/acc1": 31.5, "train/loss": float("nan")},
        world_size=2,
        classes=("cat", "dog"),
        mlflow_run_id="0" * 32,
    )
    checkpoint.snapshot(model=network, ema=network, optimizer=optimizer, metadata=meta).save(folder)
    return folder / "meta.json"


def read_metadata(file: Path) -> None:
    checkpoint.read_metadata(file.parent)
    checkpoint.verify(file.parent)


WEIGHTS = {"head.weight": torch.arange(4.0).reshape(2, 2), "head.bias": torch.zeros(2)}


def make_pth(folder: Path) -> Path:
    torch.save({"model": WEIGHTS, "epoch": 3}, folder / "x.pth")
    return folder / "x.pth"


def make_safetensors(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(WEIGHTS, folder / "x.safetensors")
    return folder / "x.safetensors"


def make_tar(folder: Path) -> Path:
    source = digits()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for index in range(4):
            for name, data in ((f"{index}.png", source.encoded(index)), (f"{index}.json", b'{"label": 1}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder / "x.tar"


def make_parquet(folder: Path) -> Path:
    images = [digits().encoded(index) for index in range(6)]
    table = pa.table({"image": [{"bytes": image} for image in images], "label": [0, 1, 0, 1, 0, 1]})
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), folder / "x.parquet",
                   row_group_size=3, write_page_checksum=True)  # fmt: skip
    return folder / "x.parquet"


def read_source(file: Path) -> None:
    source = open_source(str(file))
    for index in range(len(source)):
        source.read(index)


CONTENT = bytes(range(256)) * 3
OBJECTS = [Object("s3://b/ckpt/large", len(CONTENT), "e"), Object("s3://b/ckpt/sub/small", 3, "e")]


class Bucket:
    """What a client of S3 answers whose bucket holds OBJECTS."""

    def head_object(self, **_: object) -> dict[str, Any]:
        return {"Metadata": {}}

    def get_object(self, *, Range: str, **_: object) -> dict[str, Any]:
        first, last = map(int, Range.removeprefix("bytes=").split("-"))
        body = mock.Mock(iter_chunks=lambda _: [CONTENT[first : last + 1]])
        return {"ContentLength": last + 1 - first, "Body": body}


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[None]:
    with (
        mock.patch.object(transfer, "client", Bucket),
        mock.patch.object(transfer, "PART_BYTES", 100),
        mock.patch.object(copies, "cache", lambda: folder),
        mock.patch.object(copies, "_tell"),
    ):
        yield


def make_copy(folder: Path) -> Path:
    with bucket(folder):
        return stage(OBJECTS, below="s3://b") / ".complete"


def read_copy(file: Path) -> None:
    with bucket(file.parent.parent):
        copied = stage(OBJECTS, below="s3://b")
    assert (copied / "ckpt/large").read_bytes() == CONTENT


def make_download(folder: Path) -> Path:
    """Half an object, and the journal of its parts."""
    with bucket(folder), transfer._Journal(folder / ".large.parts", OBJECTS[0]) as journal:
        journal.begin()
        for part in (0, 3):
            journal.add(part)
    (folder / ".large.part").write_bytes(CONTENT[:100] + bytes(200) + CONTENT[300:400])
    return folder / ".large.parts"


def read_download(file: Path) -> None:
    target = file.with_name("large")
    with bucket(file.parent):
        transfer.download(OBJECTS[0], target, sha256=hashlib.sha256(CONTENT).hexdigest(), threads=1)
    assert target.read_bytes() == CONTENT


def run_in(folder: Path) -> Run:
    return Run(
        config=TrainConfig(),
        folder=str(folder),
        lease="",
        tracking_uri="",
        mlflow_run_id="0" * 32,
        use_gpu=False,
    )


def make_run(folder: Path) -> Path:
    """A run with a record, a list and a checkpoint, whose lease was given back."""
    name = "checkpoint-000005"
    with leased(str(folder), "run"):
        (folder / name).mkdir()
        make_meta(folder / name)
        write_list(str(folder), [Listed(name=name, steps_done=1, score=1.0)])
        write_run(run_in(folder), finished=False)
    return folder


def make_lease(folder: Path) -> Path:
    return make_run(folder) / LEASE


def read_lease(file: Path) -> None:
    """Whatever a lease says: somebody owns the folder, or it is free, and no other error comes of it."""
    found = lease._Disk(str(file.parent)).read()
    assert found is not None
    lease._free(found, str(file))
    with contextlib.suppress(LeaseLostError):
        check_lease(str(file.parent), "me")


def make_list(folder: Path) -> Path:
    return make_run(folder) / LIST


def read_list(file: Path) -> None:
    """The list cannot be read, and its copy serves: the checkpoint is found whatever is in it."""
    found = recover(str(file.parent), lambda _: None, before=4e9)
    assert [one.name for one in found] == ["checkpoint-000005"]


def make_record(folder: Path) -> Path:
    return make_run(folder) / RECORD


def read_record(file: Path) -> None:
    """Damage may say that the run is finished, which is refused in the words for any that is."""
    try:
        earlier_run(TrainConfig(), str(file.parent))
    except ValueError as error:
        if "is finished already; choose another --run.name" not in str(error):
            raise


MADE_AGAIN = {"lease", "list of checkpoints", "record of a run", "mark of a copy", "journal of a download"}
"""Damage to these refuses nothing: another file, or the storage itself, says what they said."""
KINDS = {
    "lease": Kind(make_lease, read_lease),
    "list of checkpoints": Kind(make_list, read_list),
    "record of a run": Kind(make_record, read_record, called="config"),
    "manifest": Kind(make_manifest, read_manifest, called="x.beton"),
    "manifest of a shard": Kind(
        make_manifest_of_a_shard, read_manifest, called=".beton"
    ),
    "beton": Kind(make_beton, read_beton),
    "beton without manifest": Kind(make_bare_beton, read_bare_beton),
    "journal of the writer": Kind(make_journal, read_journal, called="x.beton"),
    "meta.json": Kind(make_meta, read_metadata, called="above/folder"),
    "pth": Kind(make_pth, checkpoint.read_weights),
    "safetensors": Kind(make_safetensors, checkpoint.read_weights),
    "tar": Kind(make_tar, read_source),
    "parquet": Kind(make_parquet, read_source),
    "mark of a copy": Kind(make_copy, read_copy),
    "journal of a download": Kind(make_download, read_download),
}  # fmt: skip


# --- damage ---------------------------------------------------------------------------------------------------

WITNESS = "witness"
PLACES = (
    f"../{WITNESS}",
    f"../../{WITNESS}",
    f"a/../../{WITNESS}",
    f"ABOVE/{WITNESS}",
)  # ABOVE: of the test's folder
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, 1e308, float("nan"), float("-inf"),
    "", "x", "0", "NaN", "x" * 5000, "a\0b", "a\nb", "a\\b", "\ud800", ".", "..", *PLACES,
    [], [[]], [None], [1, 2], {}, {"": {}}, {"..": 1}, [0] * 50,
)  # fmt: skip


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """`whole` with one to three changes of its bytes, or of the JSON that it is."""
    changed = whole
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        lines = changed.splitlines(keepends=True)
        documents = _documents([changed]) or _documents(lines)
        if documents and rng.random() < 0.7:
            place = rng.randrange(len(documents))
            document = _with_odd_value(rng, documents[place])
            end = b"\n" if len(documents) > 1 else b""
            texts = [json.dumps(document).encode() + end if i == place else line
                     for i, line in enumerate(lines if len(documents) > 1 else [changed])]  # fmt: skip
            changed = b"".join(texts)
        else:
            changed = _with_other_bytes(rng, changed)
    return changed


def _documents(texts: list[bytes]) -> list[Any]:
    try:
        return [json.loads(text) for text in texts]
    except (ValueError, RecursionError):
        return []


def _with_odd_value(rng: random.Random, document: Any) -> Any:
    """The document with another value, name or number of values at some place."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            collect(value[key])

    collect(document)
    odd = copy.deepcopy(rng.choice(ODD))
    if not places or rng.random() < 0.05:
        return odd
    holder, key = rng.choice(places)
    change = rng.choice(("value", "value", "value", "delete", "rename", "repeat", "swap", "near"))
    if change == "value":
        holder[key] = odd
    elif change == "delete":
        del holder[key]
    elif change == "rename" and isinstance(holder, dict):
        holder[str(odd)] = holder.pop(key)
    elif change == "repeat" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif change == "swap":
        other, place = rng.choice(places)
        with contextlib.suppress(IndexError, KeyError):  # one may lie in the other
            holder[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(holder[key])
    elif isinstance(holder[key], int):
        holder[key] += rng.choice((-1, 1, 2**40))
    return document


def _with_other_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 1, 2, 8, 64))
    change = rng.choice(("flip", "flip", "noise", "cut", "remove", "insert", "zero", "deep", "empty"))
    if change == "flip" and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if change in ("noise", "zero"):
        other = bytes(length) if change == "zero" else rng.randbytes(length)
        return data[:at] + other + data[at + length :]
    if change == "remove":
        return data[:at] + data[at + length :]
    if change == "insert":
        return data[:at] + rng.randbytes(length) + data[at:]
    if change == "deep" and rng.random() < 0.2:
        return data[:at] + rng.choice((b"[", b'{"a":')) * 100_000 + data[at:]
    return b"" if change == "empty" and rng.random() < 0.2 else data[:at]


# --- who touches what -----------------------------------------------------------------------------------------

OUTSIDE: list[tuple[Path, list[str]]] = []
"""The folder that may be changed, and what was done elsewhere; empty: nobody looks."""
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {
    "os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "shutil.rmtree": 1, "os.chmod": 1, "os.utime": 1,
}  # fmt: skip


def note(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook of Python: it gets every file that is opened, made, renamed or deleted."""
    if not OUTSIDE or (event != "open" and event not in PATHS):
        return
    folder, found = OUTSIDE[-1]
    if event == "open" and not (arguments[2] or 0) & CHANGING:
        return
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # of a tree, which shutil.rmtree names
        return
    for path in arguments[: PATHS.get(event, 1)]:
        if isinstance(path, int) or path is None:
            continue
        place = Path(os.fsdecode(path)).resolve()
        if not place.is_relative_to(folder) and "__pycache__" not in place.parts:
            found.append(f"{event} {place}")


sys.addaudithook(note)


@contextlib.contextmanager
def nothing_else_is_touched(folder: Path) -> Iterator[None]:
    found: list[str] = []
    OUTSIDE.append((folder, found))
    try:
        yield
    finally:
        OUTSIDE.pop()
    assert not found, found


def survive(kind: Kind, name: str, cases: range, home: Path) -> Counter[str]:
    """Read `cases` damaged files; returns how many could be read, and how many were refused."""
    above, ends = home / "above", Counter[str]()
    folder = above / "folder"
    for _ in range(2):  # the first time it imports what it needs
        shutil.rmtree(above, ignore_errors=True)
        folder.mkdir(parents=True)
        file = kind.make(folder)
        whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        kind.read(file)
    for number in cases:
        shutil.rmtree(above)
        for path, data in {**whole, above / WITNESS: b"", home / WITNESS: b""}.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        rng = random.Random(f"{name} {number}")
        file.write_bytes(damaged(rng, whole[file]).replace(b"ABOVE", str(above).encode()))
        ends[survive_one(kind, file, folder, f"case {number} of {name}")] += 1
        assert {path.name for path in above.iterdir()} == {"folder", WITNESS}
        assert not (above / WITNESS).read_bytes() + (home / WITNESS).read_bytes()
    return ends


def survive_one(kind: Kind, file: Path, folder: Path, case: str) -> str:
    """`read` or `refused`; an AssertionError where it ends otherwise."""
    content = file.read_bytes()
    try:
        with nothing_else_is_touched(folder), mock.patch("os.fsync"):  # there are thousands of them
            kind.read(file)
        return "read"
    except (ValueError, OSError) as error:
        message = str(error)
        assert (kind.called or file.name) in message, f"{case}: {error!r}"
        assert "\n" not in message, f"{case}: {error!r}"
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{case} ended with {error!r}: {content[:2000]!r}") from error


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    ends = survive(KINDS[name], name, range(200), tmp_path)
    made_again = name in MADE_AGAIN
    assert ends["read" if made_again else "refused"] > 20, ends


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_much_damage(tmp_path: Path, name: str) -> None:
    survive(KINDS[name], name, range(200, 2000), tmp_path)


def test_the_watch_sees_what_is_done_outside(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    with nothing_else_is_touched(inside):
        (inside / "x").write_text("x")
        (inside / "x").rename(inside / "y")
    for harm in (
        outside.touch,
        outside.unlink,
        outside.mkdir,
        outside.rmdir,
        lambda: (inside / "y").rename(outside),
    ):
        with pytest.raises(AssertionError, match="outside"), nothing_else_is_touched(inside):
            harm()
