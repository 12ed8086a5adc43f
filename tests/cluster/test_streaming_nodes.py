"""Nodes that train on data while these come from a real S3, and from each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.s3_server import Proxy, access, gateway
from helpers.service import ROOT

from lape_ray import storage
from lape_ray.cluster.local import free_ports
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits
from lape_ray.storage import s3

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.slow]


def run(size: int, home: Path, place: str) -> list[dict[str, Any]]:
    """What each of `size` nodes has to tell of a training on the data at the place, each with a cache of its own."""
    home.mkdir(exist_ok=True)
    fields = {f"data.{split}": f"{place}/{split}.beton" for split in ("train", "val")}
    (home / "fields.json").write_text(json.dumps({**fields, "run.log_steps": 1, "optim.epochs": 1}))
    (port,) = free_ports(1)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks")))
    nodes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/helpers/stream_nodes.py"), str(rank), str(size), str(port),
             str(home / f"cache{rank}"), str(home / "fields.json")],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    told = [node.communicate(timeout=800) for node in nodes]
    assert [node.returncode for node in nodes] == [0] * size, "\n".join(errors[-3000:] for _, errors in told)
    return [json.loads(output.splitlines()[-1]) for output, _ in told]


def test_s3_sends_one_copy_to_any_number_of_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the losses are those of local files, bit for bit."""
    data = tmp_path / "data"
    for split, times in (("train", 2), ("val", 1)):
        source = digits(split)
        write_beton(source.take(np.tile(np.arange(len(source)), times)), data / f"{split}.beton", workers=1)
    total = sum(file.stat().st_size for file in data.iterdir())
    sent = {}
    (tmp_path / "s3").mkdir()
    with gateway(tmp_path / "s3") as server:
        for name, value in access(server.port, tmp_path).items():
            monkeypatch.setenv(name, value)
        s3.client().create_bucket(Bucket="lape")
        storage.upload_folder(data, "s3://lape/data", last=".json")
        for size in (1, 2, 4):
            proxy = Proxy(server.port)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
                streamed = run(size, tmp_path / f"streamed{size}", "s3://lape/data")
            proxy.close()
            sent[size] = proxy.received / total
            local = run(size, tmp_path / f"local{size}", str(data))
            assert streamed[0]["losses"] == local[0]["losses"]
            assert all(one["whole"] == 2 for one in streamed)
            for cache in (tmp_path / f"streamed{size}").glob("cache*"):
                assert {file.name: file.read_bytes() for file in cache.glob("*/*.beton")} == {
                    file.name: file.read_bytes() for file in data.glob("*.beton")
                }
    print("copies that S3 sent, by nodes:", sent)
    assert sent[1] < 1.05
    # Each node reads tables, manifests and listings itself: with data as small as these, some percent.
    assert sent[4] < 1.2
