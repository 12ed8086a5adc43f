"""The batch script of docs/quick_start.md on two nodes, each of processes of its own, with a stand-in for Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.service import ROOT, alone
from helpers.tracking_server import history, tracking_server

from lape_ray.config import replace_fields
from lape_ray.data.beton import write_beton
from lape_ray.data.sources import digits, select
from lape_ray.recipes import recipe

NODES = {"lape-slurm-1": "10.77.0.1", "lape-slurm-2": "10.77.0.2"}
BRIDGE, HOST = "lape-slurm", "10.77.0.254"
SCONTROL = "#!/bin/sh\nprintf '10.77.0.1\\n10.77.0.2\\n'\n"
# `ray symmetric-run` ends with `ray stop`, which ends every Ray that it can see: hence process ids of a node's own.
SRUN = """#!/bin/bash
for node in {nodes}; do
  ip netns exec $node unshare --pid --fork --kill-child --mount-proc "$@" & pids="$pids $!"
done
for pid in $pids; do wait $pid || code=$?; done
exit $code
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"),
]


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[None]:
    """Two network namespaces on a bridge, on which this host has an address too."""
    with contextlib.ExitStack() as stack:
        for left in (f"link del {BRIDGE}", *(f"netns del {node}" for node in NODES)):
            with contextlib.suppress(subprocess.CalledProcessError):  # none of a test that was killed
                ip(left)
        ip(f"link add {BRIDGE} type bridge")
        stack.callback(ip, f"link del {BRIDGE}")
        ip(f"addr add {HOST}/24 dev {BRIDGE}")
        ip(f"link set {BRIDGE} up")
        for number, (node, address) in enumerate(NODES.items()):
            ip(f"netns add {node}")
            stack.callback(ip, f"netns del {node}")
            ip(f"link add lape{number} type veth peer name eth0 netns {node}")
            ip(f"link set lape{number} master {BRIDGE} up")
            for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                ip(f"-n {node} {words}")
            ip(f"-n {node} route add default via {HOST}")
        yield


def batch_script(server: str, home: Path) -> str:
    """The script that the quick start shows, with a run that takes seconds."""
    text = (ROOT / "docs/quick_start.md").read_text()
    found = re.search(r"(    #!/bin/bash\n(?:    .*\n)+)", text)
    assert found
    script = re.sub(r"^    ", "", found[1], flags=re.MULTILINE)
    data = " ".join(f"--data.{split} {home}/{split}.beton" for split in ("train", "val"))
    own = f"smoke --run.num_workers 2 --run.cpus_per_worker 2 --run.name slurm --run.storage {home}/runs {data}\n"
    script, number = re.subn(
        r"deit_small_lape(?:.|\n)*", own, script.replace("http://MLFLOW_HOST:5000", server)
    )
    assert (number, server in script) == (1, True)
    return script


def test_the_batch_script_trains_on_two_nodes(nodes: None, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_beton(select(digits(split), "per-class:16"), tmp_path / f"{split}.beton", workers=1)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN.format(nodes=" ".join(NODES))}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "LAPE_RAY_HOME": str(tmp_path / "home")}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tracking_server(tmp_path, HOST) as server:
        done = subprocess.run(
            ["bash", "-c", batch_script(server.uri, tmp_path)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, **slurm, "PATH": path}, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((tmp_path / "runs/slurm/run.json").read_text())
        learned = [loss for _, (loss, _) in sorted(history(server.uri, record["mlflow_run_id"]).items())]
    data = {f"data.{split}": str(tmp_path / f"{split}.beton") for split in ("train", "val")}
    assert learned == pytest.approx(alone(replace_fields(recipe("smoke"), data)).losses, rel=1e-4)
