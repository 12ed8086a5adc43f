"""The supervisor of a run: also the place where its workers meet, at the start and wherever one of them was lost.

All workers that live wait here. As soon as there are as many as the run needs, they form a group and train, and those
that are left over stand by. Where a worker is lost, its group is broken: survivors come back, and the next group is
formed of them and of what stands by, or of the worker that Ray Train starts in the lost one's place.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lape_ray.cluster.supervisor import Supervisor

LEAVE_S = 10.0
"""The time that a survivor has to come back, before its process is ended like that of a worker that hangs."""
END_S = 10.0
"""The time that Ray Train's controller has to see that the run has ended: it may wait for a node that was lost."""
ANSWER_S = 5.0
"""The time that a worker that waits has to say that it lives, before its process is ended."""
WATCH_S = 15.0
"""Between two looks at whether all that train live: Ray Train's controller is blind while it waits for a node."""
TELL_S = 60.0
"""The time that Ray Train's controller has to tell of a lost worker, before it is started again."""
STOPPED = "stopped while a lost worker was waited for; there is a checkpoint before it"


@dataclass(frozen=True)
class Member:
    """A worker that waits.

    Attributes:
        rank: Ray Train's, by which its controller speaks of it
        actor: the handle of its process, and its id
        address: host and port of a store that it serves, for a group in which it is the first
        process: Ray's id of its node, its number there, and when it began in seconds since 1970
    """

    rank: int
    actor: Any
    id: str
    address: tuple[str, int]
    process: tuple[str, int, float]


@dataclass(frozen=True)
class Place:
    """A worker's place in a group, of which `number` says which one it is since the run's start.

    `address` is that of the store of its rank 0.
    """

    number: int
    rank: int
    size: int
    address: tuple[str, int]


class RunSupervisor(Supervisor):
    """The supervisor of a run, by which its workers meet."""

    def __init__(self, max_failures: int) -> None:
        super().__init__(max_failures)
        self._size = 0
        self._waiting: dict[int, tuple[Member, asyncio.Future[Place | None]]] = {}
        self._members: list[Member] = []  # of the group that trains
        self._absent: dict[str, int] = {}  # of a process that did not come back yet: the group it was of
        self._lost: set[int] = set()  # ranks of the last broken group that the controller has not told of
        self._told = False  # whether the controller has told of them
        self._unmet = 0  # failures of workers since a group was last formed or broken
        self._number = 0
        self._watch: asyncio.Task[None] | None = None
        self._broken = asyncio.Event()
        self._end: tuple[str, str] | None = None
        self._controller: Any = None
        self._forming = asyncio.Lock()

    async def meet(self, member: Member, size: int, reason: str = "") -> Place | None:
        """Wait for a place in a group of `size`; None: the run has ended.

        `reason` says why a survivor left its group.
        """
        if any(member.rank == one.rank for one in self._members):
            self._break(reason or "a worker was started again")
        self._absent.pop(member.id, None)
        self._size = size
        place = asyncio.get_running_loop().create_future()
        self._waiting[member.rank] = member, place
        await self._form()
        return await place

    async def until_broken(self, number: int) -> bool:
        """Wait until a group is broken; returns false where the run has ended instead."""
        if number == self._number:
            await self._broken.wait()
        return self._end is None

    async def failed(self, reason: str, ranks: tuple[int, ...] = (), controller: Any = None) -> None:
        """Note that workers failed, and break their group. The loss of one that stood by is no failure of the run.

        Those that fail before they meet are failures like others, or they would be started again for ever.
        """
        self._controller, told = controller, set(ranks)
        if self._end is not None:  # the controller may wait for a node from now on
            asyncio.get_running_loop().call_later(END_S, self._end_controller)
        elif any(one.rank in told for one in self._members):
            self._break(reason, told=True)
            self._lost -= told
            await self._form()
        elif self._lost & told:
            self._lost -= told
            self._told = True
            if self._failures:
                self._failures.pop()  # survivors know only that a connection is gone
                self._count(reason)
        elif told and not self._members:
            self._count(reason)
            self._unmet += 1
        if self._hopeless and not self._members:
            self._finish("failures", self._hopeless)
        elif self._unmet > self._max_failures:
            self._finish(
                "failures",
                f"workers failed {self._unmet} times before they could begin (run.max_failures={self._max_failures}), "
                f"the last time with: {reason}",
            )

    async def stop(self) -> None:
        """Ask the workers to end after a checkpoint; where none train, because one was lost, they have theirs."""
        await super().stop()
        if self._number and not self._members:
            self._finish("stopped", STOPPED)

    async def finish(self, kind: str, reason: str) -> None:
        """End the run: those that stand by are let go."""
        self._finish(kind, reason)

    def _finish(self, kind: str, reason: str) -> None:
        if self._end is None:
            self._end = kind, reason
            asyncio.get_running_loop().call_later(END_S, self._end_controller)
        self._members = []
        self._broken.set()
        self._release()

    async def ended(self) -> tuple[str, str] | None:
        """Return how the run ended, the fields of a `RunEnd`; None: it has not."""
        return self._end

    def _end_controller(self) -> None:
        if self._controller is not None:
            ray.kill(self._controller)

    def _break(self, reason: str, told: bool = False) -> None:
        """Break the group that trains; `told` says whether Ray Train's controller knows why."""
        members, self._members = self._members, []
        self._lost, self._told = {one.rank for one in members}, told
        self._absent |= {one.id: self._number for one in members}
        self._count(reason)
        self._broken.set()
        if self._stop.is_set():
            self._finish("stopped", STOPPED)
            return
        loop = asyncio.get_running_loop()
        loop.call_later(LEAVE_S, self._end_absent, members, self._number)
        loop.call_later(TELL_S, self._end_deaf_controller, self._number)

    def _end_absent(self, members: list[Member], number: int) -> None:
        """End the processes of those that did not come back from group `number`."""
        for member in members:
            if self._end is None and self._absent.get(member.id) == number:
                del self._absent[member.id]
                end_process(member)

    def _end_deaf_controller(self, number: int) -> None:
        """End a controller that has not told of the worker that group `number` lost; the driver starts another one."""
        if self._number == number and not self._members and not self._told and self._end is None:
            self._end_controller()

    async def _watch_members(self, number: int) -> None:
        """Break group `number` where one of its processes has ended."""
        while True:
            await asyncio.sleep(WATCH_S)
            lives = await asyncio.gather(*(_lives(member) for member in self._members))
            if self._number != number or not self._members:
                return
            if False in lives:
                self._break("a worker's process has ended")
                await self._form()
                return

    def _release(self) -> None:
        for _, place in self._waiting.values():
            if not place.done():
                place.set_result(None)
        self._waiting.clear()

    async def _form(self) -> None:
        """Form a group, where none trains and enough workers wait."""
        async with self._forming:
            if self._end is not None:
                self._release()
            if self._members or len(self._waiting) < self._size:
                return
            waiting = dict(self._waiting)
            lives = await asyncio.gather(*(_lives(member) for member, _ in waiting.values()))
            for rank, alive in zip(waiting, lives, strict=True):
                if not alive and self._waiting.get(rank) == waiting[rank]:
                    del self._waiting[rank]
                    if alive is None:  # so that Ray Train starts another one in its place
                        end_process(waiting[rank][0])
            if len(self._waiting) < self._size:
                return
            chosen = [self._waiting.pop(rank) for rank in sorted(self._waiting)[: self._size]]
            self._members = [member for member, _ in chosen]
            self._number, self._broken, self._unmet = self._number + 1, asyncio.Event(), 0
            self._watch = asyncio.create_task(self._watch_members(self._number))
            address = chosen[0][0].address
            for rank, (_, place) in enumerate(chosen):
                place.set_result(Place(self._number, rank, self._size, address))


def end_process(member: Member) -> None:
    """End a worker's process, which may be stopped.

    Ray asks the process itself to end. Where that does not answer, Ray takes it for dead at times, and it would keep
    its place in the cluster, so that the run waits for it for ever. Hence also by the operating system, on its node.
    """
    ray.kill(member.actor)
    node, pid, began = member.process
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    _kill.options(scheduling_strategy=there).remote(pid, began)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, began: float) -> None:
    """Kill a process of this node, unless its number is another one's by now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.create_time() == began:
            process.kill()


async def _lives(member: Member) -> bool | None:
    """Ask a worker's process whether it lives; None: it does not say so now, as it hangs or has much to do."""
    try:
        await asyncio.wait_for(member.actor.get_metadata.remote(), ANSWER_S)
    except (TimeoutError, ray.exceptions.ActorUnavailableError):
        return None
    except ray.exceptions.RayError:
        return False
    return True
