"""One training process of a run: may it start, where does it continue, and how does it end. Knows no Ray."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch

from lape_ray import storage
from lape_ray.cluster.checkpoint_list import Listed, recover, write_list
from lape_ray.cluster.compile_cache import compile_cache
from lape_ray.cluster.group import Alone, Group
from lape_ray.cluster.journal import opened_attempt
from lape_ray.cluster.reporter import opened_reporter
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_end import ERRORS, RunEnd
from lape_ray.config import TrainConfig
from lape_ray.data.streaming.start import Fetcher, stage_data, streams
from lape_ray.storage import LeaseLostError
from lape_ray.training.checkpoint import DAMAGE, DamagedError, verify
from lape_ray.training.distributed import World
from lape_ray.training.loop import train
from lape_ray.training.rehearsal import rehearse
from lape_ray.training.times import STAGING, Times


def train_run(run: Run, group: Group, device: torch.device) -> RunEnd:
    """Train, on every worker. What ends a run for good is returned: as an error, Ray Train would repeat it."""
    times = Times()
    say = tell if group.rank == 0 else _ignore
    end, listed = _check_restart_allowed(run, group, say)
    if end.kind != "done":
        return end
    with opened_attempt(run, group, times) as attempt:
        try:
            with contextlib.ExitStack() as stack:
                with times.within(STAGING):
                    stack.enter_context(_data_at_hand(run.config, group, device))
                folder, listed = stack.enter_context(_newest_complete(run, listed, device, say))
                store_compiled = stack.enter_context(compile_cache(run, device))
                world = World.current(device)
                reporter = stack.enter_context(
                    opened_reporter(run, group, listed, world, attempt, store_compiled=store_compiled)
                )
                reporter.line_of_size()
                train(run.config, device=device, reporter=reporter, resume_from=folder, times=times)
        except tuple(ERRORS.values()) as error:
            return RunEnd.of(error)
        return end


def make_ready(run: Run, device: torch.device) -> None:
    """Prepare to take another worker's place at any time; what goes wrong here is told where it counts.

    Data that stream come by a process of this worker's own, as nobody else may fetch them to this node yet.
    """
    alone = Alone(threading.Event())
    with (
        contextlib.suppress(Exception),
        compile_cache(run, device),
        _data_at_hand(run.config, alone, device),
    ):
        rehearse(run.config, device)


def tell(text: str) -> None:
    """Show a line to people."""
    print(text, flush=True)


def _ignore(text: str) -> None:
    """Say nothing, as rank 0 says it."""


def _check_restart_allowed(
    run: Run, group: Group, tell: Callable[[str], None]
) -> tuple[RunEnd, tuple[Listed, ...]]:
    """Find the run's checkpoints, on all ranks; returns also how the run ends here, or `done` where it continues."""
    end, listed = RunEnd(), tuple[Listed, ...]()

    def find_checkpoints() -> tuple[Listed, ...]:
        run.check_lease()
        return recover(run.folder, tell)

    if group.rank == 0:
        try:
            listed = storage.retry(find_checkpoints, run.config.run.outage_s, tell)
            if reason := group.may_start(listed[-1].name if listed else None):
                end = RunEnd("failures", reason)
        except LeaseLostError as error:
            end = RunEnd.of(error)
    kind, reason, entries = group.broadcast((end.kind, end.reason, [asdict(one) for one in listed]))
    return RunEnd(kind, reason), tuple(Listed(**one) for one in entries)


@contextlib.contextmanager
def _data_at_hand(config: TrainConfig, group: Group, device: torch.device) -> Iterator[None]:
    """Make sure that data on S3 come to this worker's node, until the block ends, and wait until it can train.

    One worker of each node starts the process that fetches. These processes pass to each other what they have.
    """
    say = tell if group.rank == 0 else _ignore
    if not streams(config.data):
        _stage(config, device, say)
        yield
        return
    world = World.current(device)
    nodes = world.gather(f"{os.uname().nodename}:{hashlib.sha256(bytes(storage.cache())).hexdigest()}")
    leaders = [rank for rank, node in enumerate(nodes) if nodes.index(node) == rank]
    token = group.broadcast(secrets.token_urlsafe(32))
    with contextlib.ExitStack() as stack:
        fetcher = None
        if world.rank in leaders:
            fetcher = Fetcher(config.data, group.address if len(leaders) > 1 else None)
            stack.callback(fetcher.close)
        addresses = world.gather(fetcher.address if fetcher else "")
        if fetcher:
            peers = [addresses[rank] for rank in leaders]
            fetcher.begin(peers if len(peers) > 1 else (), leaders.index(world.rank), token)
        _stage(config, device, say)
        yield


def _stage(config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> None:
    """Wait until the data that lie on S3 are on this worker's node, or what a training begins with.

    Nodes are ready at different times, and some perhaps after hours. All ask each other now and then whether they are,
    so that no time limit of a collective runs out, and all end when one of them fails.
    """
    if not any(map(storage.is_remote, (config.data.train, config.data.val))):
        return
    world, pause = World.current(device), 0.2
    pool = ThreadPoolExecutor(1, thread_name_prefix="stage")
    ready = pool.submit(stage_data, config.data, say)
    pool.shutdown(wait=False)
    while True:
        wait([ready], timeout=pause)
        done, failed = ready.done(), ready.done() and ready.exception() is not None
        if world.any(failed):
            break
        if not world.any(not done):
            return
        pause = 5.0
    if failed:
        ready.result()
    raise OSError("another worker could not copy the data from S3; its own error says why")


@contextlib.contextmanager
def _newest_complete(
    run: Run, listed: tuple[Listed, ...], device: torch.device, tell: Callable[[str], None]
) -> Iterator[tuple[Path | None, tuple[Listed, ...]]]:
    """Open the newest checkpoint that every worker finds complete; None: the run has none yet.

    Yields also the list up to it. Later ones are damaged: they leave the list, and their folders stay.

    Raises:
        DamagedError: the run has checkpoints, and each is damaged.
        OSError: whether one is damaged cannot be said now: S3 is away, or this machine's disk is full.
    """
    if not listed:
        yield None, ()
        return
    world, reasons = World.current(device), []
    for count in range(len(listed), 0, -1):
        name = listed[count - 1].name
        with contextlib.ExitStack() as stack:
            reason = ""
            try:
                folder = stack.enter_context(storage.opened(storage.join(run.folder, name)))
                verify(folder)
            except DAMAGE as error:
                reason = str(error)
            if not world.any(bool(reason)):
                if world.rank == 0 and count < len(listed):
                    write_list(run.folder, listed[:count])
                yield folder, listed[:count]
                return
        reasons.append(reason or f"{name}: damaged as another worker reads it")
        tell(f"warning: a checkpoint cannot be used, trying the one before: {reasons[-1]}")
    raise DamagedError(
        f"no checkpoint of this run is whole ({'; '.join(reasons)}); "
        "restore one of them, or start again with --run.overwrite true"
    )
