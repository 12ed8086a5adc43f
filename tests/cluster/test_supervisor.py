"""When a run gives up, and with which words."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from lape_ray.cluster import connection, failure_count
from lape_ray.cluster import supervisor as supervisor_module
from lape_ray.cluster.failure_count import FailureCount
from lape_ray.cluster.supervisor import StopRequest, Supervisor


def told(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> str:
    """What the supervisor hears of workers that failed with `errors`."""
    heard: list[tuple[str, tuple[int, ...], str]] = []
    context = SimpleNamespace(current_actor="controller")
    monkeypatch.setattr(failure_count.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(failure_count.ray, "get", lambda answer, timeout: answer)
    supervisor = SimpleNamespace(failed=SimpleNamespace(remote=lambda *told: heard.append(told)))
    FailureCount(supervisor).after_exception(None, dict(enumerate(errors)))
    ((reason, ranks, controller),) = heard
    assert (ranks, controller) == (tuple(range(len(errors))), "controller")
    return reason


def test_failures_are_counted_between_checkpoints() -> None:
    async def run() -> list[str]:
        supervisor, answers = Supervisor(max_failures=1), []
        for checkpoint in ("a", "a", "b", "b", "b"):
            await supervisor.failed("Traceback\nOSError: gone")
            answers.append(await supervisor.started(checkpoint))
        return answers

    answers = asyncio.run(run())
    assert answers[:4] == ["", "", "", ""]
    assert answers[4].startswith("workers failed 2 times without a new checkpoint (run.max_failures=1)")


def test_what_would_not_fit_again_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's error of one worker counts, whatever the others say who lost it."""
    reason = told(
        monkeypatch,
        RuntimeError("Connection closed by peer"),
        RuntimeError("Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
    )
    assert reason == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"

    async def run() -> str:
        supervisor = Supervisor(max_failures=9)
        await supervisor.failed(reason)
        return await supervisor.started("a")

    answer = asyncio.run(run())
    assert "raise --optim.accumulate or --run.num_workers" in answer
    assert answer.endswith(f"({reason})")


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        (None, True),
        (ActorUnavailableError("the network is away", None), False),
        (ActorDiedError(), True),
    ],
)
def test_a_network_that_is_away_for_a_moment_asks_for_no_end(
    answer: Exception | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor that is dead does: after a checkpoint, with which the run is started again."""

    def get(reference: object) -> None:
        if answer:
            raise answer

    calls: list[str] = []
    supervisor = SimpleNamespace(until_stop=SimpleNamespace(remote=lambda: calls.append("asked")))
    monkeypatch.setattr(supervisor_module.ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(supervisor_module.ray, "get", get)
    assert bool(StopRequest(supervisor)) == asked
    assert len(calls) == (1 if asked else 2), "asked again"


def test_little_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node of 4 GPUs in a container as Docker makes it."""

    class Remote:
        def options(self, **given: Any) -> Remote:
            return self

        def remote(self) -> int:
            return free

    nodes = [
        {"NodeID": "ab" * 28, "Alive": True, "Resources": {"GPU": 4.0}},
        {"NodeID": "cd" * 28, "Alive": True, "Resources": {"CPU": 4.0}},
    ]
    monkeypatch.setattr(connection.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(connection.ray, "remote", lambda **given: lambda function: Remote())
    monkeypatch.setattr(connection.ray, "get", lambda reference: reference)
    free = 64 * 2**20
    with pytest.raises(
        ValueError, match=r"node abababababab has 64 MB of .* 4 GPUs need 256 MB .*--shm-size"
    ):
        connection.refuse_little_shared_memory()
    free = 1024 * 2**20
    connection.refuse_little_shared_memory()
