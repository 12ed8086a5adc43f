"""MLflow's list of 500 runs, as a browser opens it by the address that a run prints."""

from __future__ import annotations

import asyncio
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from helpers.browser import chromium, photograph
from helpers.tracking_server import tracking_server
from mlflow import MlflowClient

from lape_ray.cluster.local import free_ports
from lape_ray.config import replace_fields
from lape_ray.recipes import recipe
from lape_ray.tracking import create_run, log_values, run_page

RUNS = 500
KEYS = 40
OPENED_S = 15.0
"""On two cores that do nothing else it took 2 to 4 s."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium"),
]


def test_the_list_of_500_runs_opens_quickly(tmp_path: Path) -> None:
    with tracking_server(tmp_path) as server:
        config = replace_fields(recipe("smoke"), {"tracking.uri": server.uri})
        first = create_run(config, name="first", command="a test", tags={}, datasets={})
        client = MlflowClient(server.uri)
        like = client.get_run(first)
        tags = {key: value for key, value in like.data.tags.items() if key != "mlflow.runName"}
        for number in range(RUNS - 1):
            run = client.create_run(like.info.experiment_id, tags=tags, run_name=f"run-{number:03}")
            values = {f"part-{key}/value": float(key) for key in range(KEYS - 1)}
            log_values(server.uri, run.info.run_id, {"best/acc1": number / 10, **values})
            client.set_terminated(run.info.run_id)
        found = re.search(r"among all: (\S+)", run_page(server.uri, first))
        assert found
        with chromium(tmp_path / "profile", free_ports(1)[0]) as browser:
            words = ["run-498", "best/acc1", "Position embeddings"]
            opened = partial(photograph, browser, found[1], tmp_path / "list.png", words, timeout_s=120)
            seconds = [asyncio.run(opened()) for _ in range(3)]
    print(f"the list of {RUNS} runs was there after {', '.join(f'{one:.1f} s' for one in seconds)}")
    assert min(seconds) < OPENED_S
