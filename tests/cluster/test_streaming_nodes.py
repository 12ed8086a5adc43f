"""Nodes that train on data while these come from a real S3, and from each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.nodes import environment
from helpers.s3_server import access, gateway
from helpers.service import ROOT

from lape_ray import storage
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits
from lape_ray.storage import s3

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.slow]


def test_s3_sends_one_copy_to_any_number_of_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends with all of it, and the losses are those of local files, bit for bit."""
    data = tmp_path / "data"
    for split, times in (("train", 2), ("val", 1)):
        source = digits(split)
        write_beton(source.take(np.tile(np.arange(len(source)), times)), data / f"{split}.beton", workers=1)
    (tmp_path / "s3").mkdir()
    with gateway(tmp_path / "s3") as server:
        for name, value in access(server.port, tmp_path).items():
            monkeypatch.setenv(name, value)
        s3.client().create_bucket(Bucket="lape")
        storage.upload_folder(data, "s3://lape/data", last=".json")
        command = [sys.executable, str(ROOT / "tests/helpers/stream_nodes.py"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=850)
    assert done.returncode == 0, done.stderr[-5000:]
    told = json.loads(done.stdout.splitlines()[-1])
    sent = {int(size): one["sent"] for size, one in told.items()}
    print("copies that S3 sent, by nodes:", sent)
    for size, one in told.items():
        assert one["losses"] == one["local"], f"{size} nodes"
        assert one["whole"] == 2 * int(size), "two files on each node"
    assert sent[1] < 1.05
    # Each node reads tables, manifests and listings itself: with data as small as these, some percent.
    assert sent[4] < 1.2
