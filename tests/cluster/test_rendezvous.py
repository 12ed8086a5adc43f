"""Workers that meet, are lost and replaced: who trains, who stands by, what counts as a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import ray

from lape_ray.cluster import rendezvous
from lape_ray.cluster.rendezvous import Member, Place, RunSupervisor
from lape_ray.config import RunConfig, Span


class Actor:
    """The process of a worker, which answers while it lives and does not hang."""

    def __init__(self) -> None:
        self.lives, self.hangs, self.get_metadata = True, False, self

    async def remote(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if not self.lives:
            raise ray.exceptions.ActorDiedError


class Workers:
    """A supervisor, and the workers that meet by it: Ray Train's rank -> process."""

    def __init__(self, size: int, ranks: int) -> None:
        self.supervisor, self.size = RunSupervisor(max_failures=3), size
        self.actors = [Actor() for _ in range(ranks)]

    def arrive(self, rank: int, reason: str = "") -> asyncio.Task[Place | None]:
        actor = self.actors[rank]
        member = Member(rank, actor, str(id(actor)), ("host", rank), ("node", rank, 0.0))
        return asyncio.create_task(self.supervisor.meet(member, self.size, reason))

    def die(self, rank: int) -> None:
        """Lose a worker; another process takes its rank."""
        self.actors[rank].lives = False
        self.actors[rank] = Actor()


async def places(*tasks: asyncio.Task[Place | None]) -> list[tuple[int, int] | None]:
    """Number of the group and rank of each, where they have one."""
    await asyncio.sleep(0.01)
    return [
        (place.number, place.rank) if task.done() and (place := task.result()) else None for task in tasks
    ]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """The workers whose processes the supervisor has ended."""
    ended: list[Actor] = []
    monkeypatch.setattr(rendezvous, "end_process", lambda member: ended.append(member.actor))
    return ended


@pytest.fixture
def killed_by_ray(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the supervisor has ended through Ray, where it has little patience with a run that has ended."""
    ended: list[object] = []
    monkeypatch.setattr(rendezvous, "END_S", 0.05)
    monkeypatch.setattr(ray, "kill", ended.append)
    return ended


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


def test_a_standby_takes_the_place_of_one_that_is_lost() -> None:
    """It waits for the survivor, and not for what Ray Train starts in the lost one's place, which then stands by."""

    async def story() -> None:
        workers = Workers(size=2, ranks=3)
        first = [workers.arrive(rank) for rank in range(3)]
        assert await places(*first) == [(1, 0), (1, 1), None]
        workers.die(0)
        survivor = workers.arrive(1, "Connection closed by peer")
        assert await places(survivor, first[2]) == [(2, 0), (2, 1)]
        assert survivor.result() == Place(2, 0, 2, ("host", 1))
        await workers.supervisor.failed("the actor died", (0,))
        assert workers.supervisor._failures == ["the actor died"], "one failure, in the better words"
        assert await places(workers.arrive(0)) == [None]

    run(story())


def test_without_a_standby_survivors_wait_for_the_one_that_is_started_again() -> None:
    async def story() -> None:
        workers = Workers(size=2, ranks=2)
        first = [workers.arrive(rank) for rank in range(2)]
        assert await places(*first) == [(1, 0), (1, 1)]
        broken = asyncio.create_task(workers.supervisor.until_broken(1))
        workers.die(1)
        await workers.supervisor.failed("the actor died", (1,))
        assert await broken
        survivor = workers.arrive(0, "Connection closed by peer")
        assert await places(survivor) == [None]
        assert await places(survivor, workers.arrive(1)) == [(2, 0), (2, 1)]
        assert workers.supervisor._failures == ["the actor died"]

    run(story())


def test_a_worker_that_died_while_it_waited_is_given_no_place() -> None:
    """Nor is its loss a failure of the run."""

    async def story() -> None:
        workers = Workers(size=1, ranks=3)
        first = [workers.arrive(rank) for rank in range(3)]
        assert await places(*first) == [(1, 0), None, None]
        workers.die(1)
        await workers.supervisor.failed("the actor died", (1,))
        assert workers.supervisor._failures == []
        workers.die(0)
        await workers.supervisor.failed("the actor died", (0,))
        assert await places(*first[1:]) == [None, (2, 0)]

    run(story())


def test_a_worker_that_hangs_while_it_waits_is_ended(
    killed: list[Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that Ray Train starts another one: the run would wait for it for ever."""
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.05)

    async def story() -> None:
        workers = Workers(size=1, ranks=2)
        first = [workers.arrive(rank) for rank in range(2)]
        assert await places(*first) == [(1, 0), None]
        workers.actors[1].hangs = True
        workers.die(0)
        await workers.supervisor.failed("the actor died", (0,))
        assert killed == [workers.actors[1]]
        assert await places(first[1]) == [None]
        workers.die(1)
        assert await places(workers.arrive(1)) == [(2, 0)]

    run(story())


@pytest.mark.parametrize("survivor_first", [False, True])
def test_a_step_that_does_not_fit_ends_the_run(survivor_first: bool) -> None:
    """Whoever tells first that the group is broken."""

    async def story() -> None:
        workers = Workers(size=2, ranks=2)
        await places(*(workers.arrive(rank) for rank in range(2)))
        if survivor_first:
            workers.arrive(0, "Connection closed by peer")
            await asyncio.sleep(0.01)
        await workers.supervisor.failed("torch.OutOfMemoryError: CUDA out of memory", (1,))
        assert "does not fit" in await workers.supervisor.started("a")

    run(story())


def test_one_that_does_not_come_back_is_ended(killed: list[Actor], monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs; the others came back in time."""
    monkeypatch.setattr(rendezvous, "LEAVE_S", 0.05)

    async def story() -> None:
        workers = Workers(size=3, ranks=3)
        await places(*(workers.arrive(rank) for rank in range(3)))
        await places(workers.arrive(0, "Timed out"), workers.arrive(2, "Timed out"))
        await asyncio.sleep(0.1)
        assert killed == [workers.actors[1]]

    run(story())


def test_the_end_of_the_run_lets_those_go_that_stand_by_or_come_later() -> None:
    async def story() -> None:
        workers = Workers(size=1, ranks=3)
        _, standby = [workers.arrive(rank) for rank in range(2)]
        await places(standby)
        broken = asyncio.create_task(workers.supervisor.until_broken(1))
        await workers.supervisor.finish("stopped", "after epoch 2")
        assert await standby is None
        assert await workers.arrive(2) is None
        assert not await broken
        assert await workers.supervisor.ended() == ("stopped", "after epoch 2")

    run(story())


def test_a_controller_that_waits_for_a_lost_node_does_not_keep_the_run_from_ending(
    killed_by_ray: list[object],
) -> None:
    """Nor does a run that waits for one keep its driver from stopping."""

    async def story() -> None:
        workers = Workers(size=2, ranks=2)
        await places(*(workers.arrive(rank) for rank in range(2)))
        workers.die(1)
        await workers.supervisor.failed("the node died", (1,), "controller")
        survivor = workers.arrive(0, "Connection closed by peer")
        assert await places(survivor) == [None]
        await workers.supervisor.stop()
        assert await survivor is None
        ended = await workers.supervisor.ended()
        assert ended is not None and ended[0] == "stopped"
        await asyncio.sleep(0.1)
        assert killed_by_ray == ["controller"]

    run(story())


def test_workers_that_fail_before_they_meet_are_not_started_for_ever() -> None:
    async def story() -> None:
        workers = Workers(size=1, ranks=2)
        for _ in range(4):
            assert await workers.supervisor.ended() is None
            await workers.supervisor.failed("CUDA error", (0, 1), "controller")
        assert await workers.supervisor.ended() == (
            "failures",
            "workers failed 4 times before they could begin (run.max_failures=3), the last time with: CUDA error",
        )

    run(story())


def test_a_step_that_does_not_fit_before_they_meet_ends_the_run_at_once() -> None:
    async def story() -> None:
        workers = Workers(size=1, ranks=2)
        await workers.supervisor.failed("torch.OutOfMemoryError: CUDA out of memory", (0,), "controller")
        kind, reason = await workers.supervisor.ended() or ("", "")
        assert kind == "failures"
        assert "does not fit" in reason

    run(story())


def test_a_lost_worker_that_cannot_be_started_again_ends_the_run() -> None:
    """The survivor is not left waiting; its own failure and what the controller says of it are one."""

    async def story() -> None:
        workers = Workers(size=2, ranks=2)
        await places(*(workers.arrive(rank) for rank in range(2)))
        workers.die(1)
        survivor = workers.arrive(0, "Connection closed by peer")
        for count in range(1, 5):
            await workers.supervisor.failed("ImportError", (1,))
            assert await places(survivor) == [None]
            assert len(workers.supervisor._failures) == count
        await workers.supervisor.failed("ImportError", (1,))
        assert await survivor is None
        assert await workers.supervisor.ended() is not None

    run(story())


def test_failures_before_a_checkpoint_that_is_new_do_not_end_a_run() -> None:
    """Whether it is new, the next group finds out: until then only what fails before it can begin counts."""

    async def story() -> None:
        workers = Workers(size=1, ranks=1)
        for number in range(1, 7):
            assert await places(workers.arrive(0)) == [(number, 0)]
            assert await workers.supervisor.started("a" if number < 5 else "b") == ""
            workers.die(0)
            await workers.supervisor.failed("SIGKILL", (0,))
        assert await workers.supervisor.ended() is None

    run(story())


@pytest.mark.parametrize("told", [False, True])
def test_a_death_that_the_controller_does_not_see_is_seen(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a node, and is started again; one that has told waits for as long as it takes."""
    killed: list[object] = []
    monkeypatch.setattr(rendezvous, "WATCH_S", 0.02)
    monkeypatch.setattr(rendezvous, "TELL_S", 0.1)
    monkeypatch.setattr(ray, "kill", killed.append)

    async def story() -> None:
        workers = Workers(size=1, ranks=2)
        first = [workers.arrive(rank) for rank in range(2)]
        assert await places(*first) == [(1, 0), None]
        workers.die(0)
        await workers.supervisor.failed("the node died", (0,), "controller")
        assert await places(first[1]) == [(2, 0)]
        await asyncio.sleep(0.05)
        assert workers.supervisor._members, "it lives"
        workers.die(1)
        await asyncio.sleep(0.05)
        assert not workers.supervisor._members
        if told:
            await workers.supervisor.failed("SIGKILL", (1,), "controller")
            assert workers.supervisor._failures == ["the node died", "SIGKILL"]
        await asyncio.sleep(0.15)
        assert killed == ([] if told else ["controller"])

    run(story())


def test_one_that_trains_and_is_busy_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "WATCH_S", 0.02)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.02)

    async def story() -> None:
        workers = Workers(size=1, ranks=1)
        await places(workers.arrive(0))
        workers.actors[0].hangs = True
        await asyncio.sleep(0.2)
        assert workers.supervisor._members

    run(story())


def test_a_stop_is_not_forgotten_where_a_worker_is_lost_before_it_took_effect() -> None:
    async def story() -> None:
        workers = Workers(size=2, ranks=2)
        await places(*(workers.arrive(rank) for rank in range(2)))
        await workers.supervisor.stop()
        assert await workers.supervisor.ended() is None, "they make a checkpoint first"
        workers.die(1)
        await workers.supervisor.failed("the node died", (1,), "controller")
        assert await workers.arrive(0, "Connection closed by peer") is None
        ended = await workers.supervisor.ended()
        assert ended is not None and ended[0] == "stopped"

    run(story())


def test_a_controller_that_comes_to_wait_after_the_end_is_ended(killed_by_ray: list[object]) -> None:

    async def story() -> None:
        workers = Workers(size=2, ranks=2)
        await places(*(workers.arrive(rank) for rank in range(2)))
        await workers.supervisor.finish("done", "")
        await asyncio.sleep(0.1)
        await workers.supervisor.failed("the node died", (1,), "controller")
        await asyncio.sleep(0.1)
        assert killed_by_ray == ["controller"]

    run(story())


def test_standby_workers_need_a_fixed_number_of_workers() -> None:
    assert RunConfig(num_workers=2, standby_workers=1).standby_workers == 1
    for number in (0, Span(1, 2)):
        with pytest.raises(
            ValueError, match=r"standby_workers=1 needs num_workers to be one number from 1 up"
        ):
            RunConfig(num_workers=number, standby_workers=1)
