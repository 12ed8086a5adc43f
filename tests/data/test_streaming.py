"""Training on data that are still on their way from S3: what comes first, what is refused, and what is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.s3_server import Proxy, access, holding
from PIL import Image

from lape_ray import storage
from lape_ray.config import DataConfig
from lape_ray.data.beton import Manifest, check_beton, write_beton
from lape_ray.data.beton.blocks import SMALLEST_BLOCK, Blocks, block_bytes
from lape_ray.data.loader import Loader, build_loader
from lape_ray.data.remote import RemoteSet, local_split
from lape_ray.data.sources import digits
from lape_ray.data.sources.base import Source
from lape_ray.data.streaming import arrivals, start
from lape_ray.data.streaming.blocks import MAP, Layout, blocks_between, runs
from lape_ray.data.streaming.download import DISK, PEER, S3, Download
from lape_ray.data.streaming.fetcher import Fetcher
from lape_ray.data.streaming.peers import Peers, serve
from lape_ray.training.metrics import Waited
from lape_ray.training.times import Times

SIDE, BATCH = 32, 16
CPU = torch.device("cpu")
ADDRESS = "s3://b/data/d.beton"


class Pixels(Source):
    """Images from memory."""

    def name(self, index: int) -> str:
        return f"image {index}"

    def encoded(self, index: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.items_N[index]).save(file, "PNG", compress_level=1)
        return file.getvalue()


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in random order, twice: 11 MB, which are three parts."""
    path = tmp_path_factory.mktemp("beton") / "d.beton"
    source = digits()
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(source)), 2))
    write_beton(source.take(order), path, workers=1)
    return path


@dataclasses.dataclass
class Server:
    """A server that holds the objects, behind a proxy."""

    objects: dict[str, bytes]
    proxy: Proxy


@pytest.fixture
def server(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    objects = {f"data/{file.name}": file.read_bytes() for file in beton.parent.iterdir()}
    with holding(objects) as (url, _):
        proxy = Proxy(int(url.rpartition(":")[2]))
        for name, value in access(proxy.port, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield Server(objects, proxy)
        proxy.close()


@contextlib.contextmanager
def fetching(data: DataConfig, say: Callable[[str], None] = print) -> Iterator[subprocess.Popen[str]]:
    fetcher = start.Fetcher(data, None)
    try:
        fetcher.begin()
        start.stage_data(data, say)
        yield fetcher._process
    finally:
        fetcher.close()


def loader_of(path: str | Path, *, seed: int = 3) -> Loader:
    data = DataConfig(train=str(path))
    return build_loader(data, "train", image_size=SIDE, batch_size=BATCH, threads=1, seed=seed)


def assert_equal_epochs(one: Loader, other: Loader, epoch: int = 0) -> None:
    pairs = zip(one.epoch(epoch), other.epoch(epoch), strict=True)
    assert all(a.images.equal(b.images) and a.labels.equal(b.labels) for a, b in pairs)


def whole_copy() -> Path:
    """The copy that later runs use, once it is there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := list(storage.cache().glob("*/.complete")):
            return found[0].parent / "d.beton"
        time.sleep(0.02)
    raise TimeoutError


# --- blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_of_a_set_are_numbered_through() -> None:
    size = SMALLEST_BLOCK
    layout = Layout([Blocks(bytes=size, end=2 * size + 1, sha256=64 * "0"),
                     Blocks(bytes=2 * size, end=2 * size, sha256=64 * "0")])  # fmt: skip
    assert len(layout) == 4
    assert layout.place(1, 2) == (0, size, 2 * size + 1)
    assert layout.place(3, 1) == (1, 0, 2 * size)
    first, last = layout.span(np.array([0, 0, 1]), np.array([0, size, 5]), np.array([size, 2 * size + 1, 6]))
    assert (first.tolist(), last.tolist()) == ([0, 1, 3], [0, 2, 3])
    assert set(blocks_between(first, last).tolist()) == {0, 1, 2, 3}
    assert runs(np.array([1, 2, 3, 7, 9, 10]), 2) == [(1, 2), (3, 1), (7, 1), (9, 2)]
    assert block_bytes(100) == SMALLEST_BLOCK
    assert block_bytes(60 * 10**9) == 1 << 16


# --- one node ---------------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_file_while_it_is_on_its_way(server: Server, beton: Path) -> None:
    server.proxy.rate = 1e6
    with fetching(DataConfig(train=ADDRESS)):
        loader = loader_of(ADDRESS)
        assert not list(storage.cache().glob("*/.complete"))
        batches = loader_of(ADDRESS, seed=4).epoch(0)  # another reader of the same copy
        waited = Waited(batches, Times(), CPU)
        next(waited)
        assert waited.read() > 0.05, "what training tells as train/data_wait_s"
        server.proxy.rate = None
        assert_equal_epochs(loader, loader_of(beton))
        batches.close()
        copy = whole_copy()
        assert_equal_epochs(loader, loader_of(beton), epoch=1)
        assert loader.reader.arrivals is None, "a change of the file is refused again"
    size = beton.stat().st_size
    assert size <= server.proxy.received < 1.05 * size, "each byte is fetched once"
    assert copy.read_bytes() == beton.read_bytes()
    assert sorted(path.name for path in copy.parent.iterdir()) == [
        ".complete",
        ".lock",
        "d.beton",
        "d.beton.json",
    ]
    assert local_split(ADDRESS) == str(copy)


def test_the_first_batch_needs_a_tenth_of_the_file(server: Server, beton: Path) -> None:
    one = Download(RemoteSet.find(ADDRESS), Peers())
    one.open()
    batches = loader_of(ADDRESS).epoch(0)
    found = []
    reading = threading.Thread(target=lambda: found.append(next(batches)))
    reading.start()
    while not found:
        one.look_for_wants()
        if claimed := one.next_wanted():
            one.bring(*claimed)
    reading.join()
    expected = next(loader_of(beton).epoch(0))
    assert found[0].images.equal(expected.images)
    # Reading goes on ahead, so that more than the first batch may have come.
    assert one.came[S3] < 0.1 * beton.stat().st_size
    batches.close()  # does not wait for what does not come
    assert not list(one.folder.glob("wants-*"))
    one.close()


def test_what_a_reader_needs_next_comes_first(server: Server) -> None:
    one = Download(RemoteSet.find(ADDRESS), Peers())
    one.open()
    loader = loader_of(ADDRESS)
    index = np.random.default_rng(5).permutation(3000)
    reader = loader.reader
    with reader.arrivals.wanted(index, BATCH):  # type: ignore[attr-defined]
        one.look_for_wants()
        asked = []
        while claimed := one.next_wanted():
            asked.append(claimed)
        one._asked[:] = False
        (wanted,) = one._wants.values()
        wanted._runs.append((400, 3))
        one._asked[401] = True  # another thread was faster
        assert [one.next_wanted() for _ in range(3)] == [(400, 1), (402, 1), None]
    first, last = reader.arrivals._first_N[index], reader.arrivals._last_N[index]  # type: ignore[attr-defined]
    batch_of = np.full(len(one.layout), -1)
    for batch in reversed(range(32)):
        part = slice(BATCH * batch, BATCH * (batch + 1))
        batch_of[blocks_between(first[part], last[part])] = batch
    batch_of[one.have[1:] != 0] = -1
    order = [int(batch_of[block]) for block, count in asked for block in range(block, block + count)]
    assert order == sorted(order)
    assert len(order) == np.count_nonzero(batch_of >= 0), "those of 32 batches, each once"
    one.close()


@pytest.mark.slow
def test_steps_wait_for_the_first_batch_alone_where_the_network_is_faster(
    server: Server, tmp_path: Path
) -> None:
    """Than the training, by half; images of 49 kB, as ImageNet's are."""
    pixels = np.random.default_rng(0).integers(0, 256, (512, 128, 128, 3), np.uint8)
    path = tmp_path / "large" / "d.beton"
    source = Pixels("noise", ("none",), np.zeros(len(pixels), np.int64), pixels)
    write_beton(source, path, mode="raw", workers=1)
    server.objects.update({f"data/{file.name}": file.read_bytes() for file in path.parent.iterdir()})
    step_s = 0.4
    server.proxy.rate = 1.5 * BATCH * pixels[0].size / step_s
    times = []
    with fetching(DataConfig(train=ADDRESS)):
        batches = Waited(loader_of(ADDRESS).epoch(0), Times(), CPU)
        for _ in batches:
            times.append(batches.read())
            time.sleep(step_s)
    whole_s = path.stat().st_size / server.proxy.rate
    print(f"waited: {times[0]:.2f} s, then {sum(times[1:]):.2f} s; all of it takes {whole_s:.1f} s")
    assert len(times) == 32
    assert times[0] < 0.3 * whole_s
    assert sum(times[1:]) < 0.1 * len(times) * step_s


def test_a_fetcher_that_is_killed_is_followed_by_one_that_trusts_nothing(server: Server, beton: Path) -> None:
    server.proxy.rate = 8e6
    data = DataConfig(train=ADDRESS)
    with fetching(data) as process:
        (folder,) = storage.cache().glob("*/.arriving")
        while np.count_nonzero(np.fromfile(folder / MAP, np.uint8)) < 250:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = np.flatnonzero(np.fromfile(folder / MAP, np.uint8)[1:])
    lost = int(kept[len(kept) // 2])
    with (folder / "d.beton").open("r+b") as file:  # of which the map says that it is there
        file.seek(lost * SMALLEST_BLOCK)
        file.write(b"lost")
    server.proxy.rate, server.proxy.received = None, 0
    with fetching(data):
        loader = loader_of(ADDRESS)
        assert_equal_epochs(loader, loader_of(beton))
        assert whole_copy().read_bytes() == beton.read_bytes()
    assert server.proxy.received < beton.stat().st_size - (len(kept) - 20) * SMALLEST_BLOCK + 300_000


def test_readers_go_on_where_another_run_fetched_for_them(server: Server, beton: Path) -> None:
    """Of two runs on a machine one fetches; where it ends, the other takes over, in the same map."""
    server.proxy.rate = 4e6
    data = DataConfig(train=ADDRESS)
    with fetching(data) as process, fetching(data):
        loader = loader_of(ADDRESS)
        batches = loader.epoch(0)
        next(batches)
        process.kill()
        expected = loader_of(beton).epoch(0)
        next(expected)
        pairs = zip(batches, expected, strict=True)
        assert all(a.images.equal(b.images) and a.labels.equal(b.labels) for a, b in pairs)
        assert whole_copy().read_bytes() == beton.read_bytes()


def test_a_copy_that_was_begun_is_not_taken_for_a_whole_one(server: Server, beton: Path) -> None:
    """Where the next run does not stream, or evaluates."""
    server.proxy.rate = 8e6
    with fetching(DataConfig(train=ADDRESS)):
        (folder,) = storage.cache().glob("*/.arriving")
    server.proxy.rate = None
    copy = Path(local_split(ADDRESS, arriving=True))
    assert copy.parent == folder.parent
    assert check_beton(copy, deep=True, workers=1).num_samples == 3594
    assert not folder.exists()


def test_a_damaged_block_ends_the_run_before_it_is_used(server: Server, beton: Path) -> None:
    content = bytearray(beton.read_bytes())
    content[len(content) // 2] ^= 1
    server.objects["data/d.beton"] = bytes(content)
    with fetching(DataConfig(train=ADDRESS)):
        loader = loader_of(ADDRESS)
        message = r"s3://b/data/d\.beton is damaged: a block of its bytes \d+ to \d+ does not have its sha256"
        with pytest.raises(ValueError, match=message):
            list(loader.epoch(0))
    assert not list(storage.cache().glob("*/d.beton"))


def test_damaged_checksums_are_refused(server: Server, beton: Path) -> None:
    content, blocks = bytearray(beton.read_bytes()), Manifest.load(beton).blocks
    assert blocks
    content[blocks.end] ^= 1
    server.objects["data/d.beton"] = bytes(content)
    with (
        pytest.raises(ValueError, match="the checksums of its blocks are; upload it again"),
        fetching(DataConfig(train=ADDRESS)),
    ):
        pass


def test_a_reader_says_when_nothing_comes_any_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.proxy.rate = 2e6
    with fetching(DataConfig(train=ADDRESS)) as process:
        monkeypatch.setattr(arrivals, "GONE_S", 0.3)
        loader = loader_of(ADDRESS)
        process.kill()
        with pytest.raises(OSError, match="the process that fetched them from S3 has ended; start again"):
            list(loader.epoch(0))


def test_a_file_without_checksums_of_blocks_is_copied_first(
    server: Server, beton: Path, tmp_path: Path
) -> None:
    dataclasses.replace(Manifest.load(beton), blocks=None).save(tmp_path / "old.beton")
    server.objects["data/d.beton.json"] = (tmp_path / "old.beton.json").read_bytes()
    said: list[str] = []
    with fetching(DataConfig(train=ADDRESS), said.append):
        assert whole_copy().read_bytes() == beton.read_bytes()
    assert len(said) == 1
    assert "was written without checksums of its parts, so it is copied whole" in said[0]


def test_a_disk_that_is_full_ends_the_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Download(RemoteSet.find(ADDRESS), Peers())
    monkeypatch.setattr("lape_ray.storage.copies.SPARE_BYTES", 1 << 60)
    with pytest.raises(OSError, match=r"GB are needed: delete copies .* or set LAPE_RAY_CACHE"):
        one.open()
    one.fail(OSError("the disk is full"))
    with pytest.raises(OSError, match="the disk is full"):
        arrivals.wait_until_ready(one.folder, lambda: False)
    one.close()


def test_what_fails_is_told_to_readers_of_all_sets_or_ends_the_process(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that none waits for what nobody fetches any more, also where a full disk keeps the error from being told."""
    ended: list[int] = []
    monkeypatch.setattr("lape_ray.data.streaming.fetcher.os._exit", ended.append)
    one, other = (Download(RemoteSet.find(ADDRESS), Peers()) for _ in range(2))
    other.folder = other.folder.with_name("other")
    other.folder.mkdir(parents=True)
    fetcher = Fetcher(Peers())
    fetcher._opened += [other]
    with fetcher._failing(one):
        raise OSError("damaged")
    assert ended == [1], "there is no folder to tell it in"
    one.folder.mkdir()
    with fetcher._failing(one):
        raise OSError("damaged")
    assert ended == [1]
    assert "damaged" in (one.folder / "error").read_text()
    assert "damaged" in (other.folder / "error").read_text()


def test_shards_and_other_backends(server: Server, tmp_path: Path) -> None:
    """A set streams as one file does; what maps a file gets a whole one."""
    server.objects.clear()
    write_beton(digits().take(np.arange(600)), tmp_path / "set" / "d.beton", shards=3, workers=1)
    server.objects.update({f"data/{file.name}": file.read_bytes() for file in (tmp_path / "set").iterdir()})
    server.proxy.rate = 4e6
    with fetching(DataConfig(train=ADDRESS)):
        assert_equal_epochs(loader_of(ADDRESS), loader_of(tmp_path / "set" / "d.beton"))
    assert not start.streams(DataConfig(train=ADDRESS, backend="ffcv"))
    assert not start.streams(DataConfig(train=ADDRESS, stream=False))
    assert not start.streams(DataConfig(train=str(tmp_path)))


# --- several nodes ----------------------------------------------------------------------------------------------------


class Node:
    """A node of a run in this process: its set, its place among the others, and a server for them."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LAPE_RAY_CACHE", str(cache))
        self.peers = Peers()
        self.download = Download(RemoteSet.find(ADDRESS), self.peers)
        self.lies = False
        self.server = serve("127.0.0.1", lambda: "token", self.give)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def give(self, name: str, first: int, count: int) -> bytes | None:
        assert name == self.download.remote.place.folder.name
        content = self.download.give(first, count, timeout_s=10)
        return content[:-1] + bytes([content[-1] ^ 1]) if content and self.lies else content

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetch(self) -> None:
        self.download.open()
        self.fetch_rest()

    def fetch_rest(self) -> None:
        while claimed := self.download.next_missing():
            self.download.bring(*claimed, swept=True)
        while not self.download.whole:  # what others have asked for is under way
            self.download.finish()
            time.sleep(0.001)


@pytest.fixture
def nodes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    nodes = [Node(tmp_path / f"cache{number}", monkeypatch) for number in range(4)]
    yield nodes
    for node in nodes:
        node.stop()
        node.download.close()


def fetch_all(nodes: list[Node], *, token: str = "token") -> None:
    addresses = tuple(node.address for node in nodes)
    for number, node in enumerate(nodes):
        node.peers.join(addresses, number, token)
    threads = [threading.Thread(target=node.fetch) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(node.download.whole for node in nodes)


def copy_of(node: Node) -> bytes:
    return (node.download.remote.place.folder / "d.beton").read_bytes()


def test_s3_sends_one_copy_to_several_nodes(server: Server, nodes: list[Node], beton: Path) -> None:
    fetch_all(nodes)
    size = beton.stat().st_size
    assert size < server.proxy.received < 1.05 * size
    assert all(copy_of(node) == beton.read_bytes() for node in nodes)
    assert all(node.download.came[PEER] > 0.6 * size for node in nodes)


def test_a_node_that_has_a_copy_gives_it_away(server: Server, nodes: list[Node], beton: Path) -> None:
    fetch_all(nodes[:1])
    server.proxy.received = 0
    nodes[0].download = Download(nodes[0].download.remote, nodes[0].peers)
    nodes[0].download.open()
    nodes[0].peers.join((nodes[0].address, nodes[1].address), 0, "token")
    nodes[1].peers.join((nodes[0].address, nodes[1].address), 1, "token")
    nodes[1].fetch()
    assert copy_of(nodes[1]) == beton.read_bytes()
    assert nodes[1].download.came[PEER] > 0.4 * beton.stat().st_size


@pytest.mark.parametrize("fault", ["dead", "lies", "token"])
def test_where_a_node_gives_nothing_s3_does(
    server: Server, nodes: list[Node], beton: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = nodes[:2]
    first.peers.join((first.address, other.address), 0, "wrong" if fault == "token" else "token")
    other.peers.join((first.address, other.address), 1, "token")
    first.download.open()
    other.download.open()
    other.lies = fault == "lies"
    if fault == "dead":
        other.stop()
    first.fetch_rest()
    assert copy_of(first) == beton.read_bytes()
    assert first.download.came[PEER] == 0
    assert first.download.came[DISK] == 0
    assert first.download.came[S3] >= beton.stat().st_size
