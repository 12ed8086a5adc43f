"""A user's own position embeddings on a cluster: the text travels, and no worker needs the file."""

from __future__ import annotations

import re

import pytest
from helpers.plugins import EXAMPLE
from helpers.service import Service, alone

from lape_ray.search.trials import read_trials
from lape_ray.values.plugin import TrustedPlugin

WORDS = ["--model.plugin=examples/my_positions.py", "--model.bias=decay"]

pytestmark = [pytest.mark.timeout(600), pytest.mark.cluster]


def test_a_submitted_job_trains_it_in_another_process(service: Service) -> None:
    done = service.submit("smoke", *WORDS, "--model.join=gated", "--run.name=own", "--tracking.pages=false")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plugin = TrustedPlugin.read(str(EXAMPLE))
    model = {"model__plugin": plugin, "model__bias": "decay", "model__join": "gated"}
    expected = alone(service.config(**model)).losses
    assert service.losses(service.run_of(done.stdout)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_search_goes_over_its_names(service: Service) -> None:
    space = ["free", "smoke", "--space=model.join=choice(lape,gated)", "--run.name=search"]
    done = service.submit_job("jobs/tune_position.py", *space, *WORDS, *service.data())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    trials = read_trials(str(service.home / "runs/search"))
    assert {(trial.values["model.join"], trial.state) for trial in trials} == {
        ("lape", "finished"),
        ("gated", "finished"),
    }
    best = re.search(r"train the best: (.+)", done.stdout)
    assert best
    assert re.search(
        rf"--model.plugin {re.escape(WORDS[0].partition('=')[2])}@sha256:[0-9a-f]{{64}} ", best[1]
    )
