"""One training process of a run on Ray: may it start, where does it continue, and how does it end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch

from lape_ray import storage
from lape_ray.cluster.checkpoint_list import Listed, recover, write_list
from lape_ray.cluster.reporter import opened_reporter
from lape_ray.cluster.run import Run
from lape_ray.cluster.run_end import ERRORS, RunEnd
from lape_ray.config import TrainConfig
from lape_ray.data.remote import stage_data
from lape_ray.storage import LeaseLostError
from lape_ray.training.checkpoint import DamagedError, verify
from lape_ray.training.distributed import World
from lape_ray.training.loop import train


def run_worker(payload: dict[str, Any]) -> RunEnd:
    """Train. What ends a run for good is returned on every rank: as an error, Ray Train would repeat it.

    Args:
        payload: the `run`, and its `supervisor`, the actor's handle.
    """
    run: Run = payload["run"]
    _quiet_ray_train()
    device = ray.train.torch.get_device()
    end, listed = _check_restart_allowed(run, payload["supervisor"])
    if end.kind != "done":
        return end
    _stage(run.config, device)
    try:
        with (
            _newest_complete(run, listed, device) as (folder, listed),
            opened_reporter(run, listed, payload["supervisor"]) as reporter,
        ):
            reporter.line_of_size()
            train(run.config, device=device, reporter=reporter, resume_from=folder)
    except tuple(ERRORS.values()) as error:
        return RunEnd.of(error)
    return end


def _tell(text: str) -> None:
    """Print a line, on rank 0 only."""
    if ray.train.get_context().get_world_rank() == 0:
        print(text, flush=True)


def _check_restart_allowed(run: Run, supervisor: Any) -> tuple[RunEnd, tuple[Listed, ...]]:
    """Find the run's checkpoints, on all ranks; returns also how the run ends here, or `done` where it continues."""
    end, listed = RunEnd(), tuple[Listed, ...]()

    def find_checkpoints() -> tuple[Listed, ...]:
        run.check_lease()
        return recover(run.folder, _tell)

    if ray.train.get_context().get_world_rank() == 0:
        try:
            listed = storage.retry(find_checkpoints, run.config.run.outage_s, _tell)
            newest = listed[-1].name if listed else None
            if reason := ray.get(supervisor.started.remote(newest)):
                end = RunEnd("failures", reason)
        except LeaseLostError as error:
            end = RunEnd.of(error)
    # Plain values: the actor of Ray Train that hands them on would import torch for ours, which takes 0.5 GB.
    kind, reason, entries = ray.train.collective.broadcast_from_rank_zero(
        (end.kind, end.reason, [asdict(one) for one in listed])
    )
    return RunEnd(kind, reason), tuple(Listed(**one) for one in entries)


def _stage(config: TrainConfig, device: torch.device) -> None:
    """Fetch data that lies on S3 to this worker's node.

    Nodes are ready at different times, and some perhaps after hours. All ask each other now and then whether they are,
    so that no time limit of a collective runs out, and all end when one of them fails.
    """
    if not any(map(storage.is_remote, (config.data.train, config.data.val))):
        return
    world, pause = World.current(device), 0.2
    pool = ThreadPoolExecutor(1, thread_name_prefix="stage")
    ready = pool.submit(stage_data, config.data)
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
    run: Run, listed: tuple[Listed, ...], device: torch.device
) -> Iterator[tuple[Path | None, tuple[Listed, ...]]]:
    """Open the newest checkpoint that every worker finds complete; None: the run has none yet.

    Yields also the list up to it. Later ones are damaged: they leave the list, and their folders stay.

    Raises:
        DamagedError: the run has checkpoints, and each is damaged.
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
            except (ValueError, OSError) as error:
                reason = str(error)
            if not world.any(bool(reason)):
                if world.rank == 0 and count < len(listed):
                    write_list(run.folder, listed[:count])
                yield folder, listed[:count]
                return
        reasons.append(reason or f"{name}: damaged as another worker reads it")
        _tell(f"warning: a checkpoint cannot be used, trying the one before: {reasons[-1]}")
    raise DamagedError(
        f"no checkpoint of this run is whole ({'; '.join(reasons)}); "
        "restore one of them, or start again with --run.overwrite true"
    )


def _quiet_ray_train() -> None:
    """Keep Ray Train from repeating every report's metrics for every rank.

    Some of its loggers are named after their file instead of their module, so that LoggingConfig misses them.
    """
    for name in list(logging.root.manager.loggerDict):
        if "ray/train/" in name:
            logging.getLogger(name).setLevel(logging.WARNING)
