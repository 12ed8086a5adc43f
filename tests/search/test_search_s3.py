"""A search whose folder is on a remote store: checkpoints, Ray Tune's snapshots, the report."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from helpers.s3_server import Gateway, gateway
from helpers.service import Service, alone, running_service

from lape_ray import storage
from lape_ray.search.command import plan_of
from lape_ray.search.run import search
from lape_ray.search.trials import analysis, read_trials
from lape_ray.storage import s3

pytestmark = [pytest.mark.timeout(600), pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def remote(server: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose processes all know a store; its credentials stand in their environment alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        with running_service(tmp_path_factory.mktemp("home")) as service:
            s3.client().create_bucket(Bucket="searches")
            yield service


def test_a_search_on_a_remote_store_is_continued_there(remote: Service) -> None:
    data = {f"data.{split}": str(remote.home / f"{split}.beton") for split in ("train", "val")}
    plan = plan_of(
        space="free", recipe="smoke", axes=["optim.lr=choice(1e-3,5e-4)"],
        overrides={**data, "optim.epochs": 2, "run.name": "far", "run.storage": "s3://searches"},
    )  # fmt: skip
    found = search(plan)
    assert [(trial.state, trial.done) for trial in found.trials] == [("finished", 2)] * 2
    assert found.folder == "s3://searches/far"
    assert storage.exists(found.page)
    assert {trial.checkpoint for trial in found.trials} <= {
        f"s3://searches/far/trial-000{number}/checkpoint-0000000{steps}"
        for number in (0, 1)
        for steps in ("05", "10")
    }
    assert [trial.epochs for trial in read_trials(found.folder)] == [trial.epochs for trial in found.trials]
    assert len(analysis(found.folder).results_df) == 2
    lost = [name for name in storage.names(found.folder) if name.startswith(("experiment_state-", "tuner"))]
    for name in lost:  # as if Ray Tune had never written anything
        storage.delete_file(storage.join(found.folder, name))
    again = search(plan)
    assert again.trials == found.trials, (
        "found in the trials' folders, with all seconds, and not trained again"
    )


@pytest.mark.faults
def test_a_search_waits_for_storage_that_is_away(remote: Service, server: Gateway) -> None:
    """For some seconds here, and up to `run.outage_s`; no trial is tried again, and all learn what they would have."""
    data = {f"data.{split}": str(remote.home / f"{split}.beton") for split in ("train", "val")}
    plan = plan_of(
        space="free", recipe="smoke", axes=["optim.lr=choice(1e-3,5e-4)"],
        overrides={**data, "optim.epochs": 8, "run.name": "outage", "run.storage": "s3://searches"},
    )  # fmt: skip
    away_s, struck = 8.0, threading.Event()

    def away() -> None:
        while not all(storage.folders(f"s3://searches/outage/trial-000{number}") for number in (0, 1)):
            time.sleep(0.2)
        server.kill()
        struck.set()
        time.sleep(away_s)
        server.start()

    threading.Thread(target=away, daemon=True).start()
    found = search(plan)
    assert struck.is_set()
    for trial in found.trials:
        assert (trial.state, trial.done, trial.crashes) == ("finished", 8, 0)
        assert max(one.seconds for one in trial.epochs) > away_s / 2, "it had to wait"
        expected = [metrics["val/loss"] for metrics in alone(found.plan.config(trial)).epochs]
        assert [one.metrics["val/loss"] for one in trial.epochs] == expected
