"""What a worker of a warm group does: trial after trial, until the search has no more for it.

The group is one Ray Train run. A trial's checkpoints go to the trial's own folder instead of `ray.train.report`, which
would keep the checkpoints of all its trials by one rule and wait for the controller after each.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch

from lape_ray import storage, tracking
from lape_ray.cluster.supervisor import LeavingNodes
from lape_ray.config import TrainConfig, from_dict
from lape_ray.search.shelf import Shelf
from lape_ray.training.checkpoint import Metadata, Snapshot, read_metadata
from lape_ray.training.distributed import World
from lape_ray.training.flags import Flags
from lape_ray.training.loop import DivergedError, EndedError, train

HOPELESS = (ValueError, DivergedError, torch.OutOfMemoryError)
"""What would happen again; anything else is tried again from the newest checkpoint."""


class LeaveError(EndedError):
    """The search wants this trial no more, or not now."""


@dataclass
class Channel:
    """A worker group's way to the search; only rank 0 asks."""

    desk: Any
    lane: int

    def ask(self, **message: Any) -> tuple[int, Any]:
        """Ask the search; returns the ticket and the answer. LeaveError: the search is gone."""
        try:
            ticket, answer = ray.get(self.desk.ask.remote(self.lane, message))
        except ray.exceptions.RayActorError:
            raise LeaveError("the search is gone") from None
        return ticket, answer

    def tell(self, **message: Any) -> None:
        """Say what needs no answer; if the search is gone, the next order tells so to all workers."""
        with contextlib.suppress(LeaveError):
            self.ask(**message)

    def order(self, rank: int) -> dict[str, Any]:
        """Receive the group's next order, on all ranks. LeaveError, on all of them: the search is gone."""
        ticket: int | None = None
        if rank == 0:
            with contextlib.suppress(LeaveError):
                ticket = self.ask(kind="ready")[0]
        ticket = ray.train.collective.broadcast_from_rank_zero(ticket)
        if ticket is None:
            raise LeaveError("the search is gone")
        order: dict[str, Any] = ray.get(self.desk.kept.remote(ticket))
        return order


def lane_worker(payload: Mapping[str, Any]) -> None:
    """One worker of a group, as Ray Train's train function."""
    channel = Channel(payload["desk"], payload["lane"])
    rank = ray.train.get_context().get_world_rank()
    device = ray.train.torch.get_device()
    with contextlib.suppress(LeaveError, ray.exceptions.RayActorError):
        while (order := channel.order(rank))["kind"] == "train":
            _train_one(order, channel, rank, device)


def _train_one(order: Mapping[str, Any], channel: Channel, rank: int, device: torch.device) -> None:
    world = World.current(device)
    trial = order["trial"]
    try:
        with contextlib.suppress(LeaveError):
            _train_trial(order, channel, rank, device)
        if rank == 0:
            channel.tell(kind="left", trial=trial)
    except Exception as error:
        kind = "failed" if isinstance(error, HOPELESS) else "crashed"
        channel.tell(kind=kind, trial=trial, error=_in_words(error))
        # All workers see a divergence. With any other error they wait for this one, and the group must start anew.
        if world.size > 1 and not isinstance(error, DivergedError):
            raise
    finally:
        # What the next trial of this process would otherwise inherit. After eight networks of one process torch would
        # compile no more; where nothing was compiled, asking for it would import the compiler.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _in_words(error: Exception) -> str:
    """Put in words the error's message for a table, then where it came from."""
    words = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        words = f"{words.splitlines()[0]}; lower --data.batch_size, or raise --optim.accumulate"
    trace = "".join(traceback.format_exception(error)[-6:]) if not isinstance(error, HOPELESS) else ""
    return f"{words}\n{trace}".strip()


def _train_trial(order: Mapping[str, Any], channel: Channel, rank: int, device: torch.device) -> None:
    config = from_dict(TrainConfig, order["config"])
    shelf, clone = Shelf(order["folder"]), order["clone"]
    name: str | None = None
    if rank == 0:
        name = shelf.newest_whole(config, clone)
        if name is None and clone is not None:
            name, weights = shelf.clone(Shelf(clone["folder"]), config, clone)
            what = {"epoch": clone["epoch"], "source": clone["source"], "weights": weights}
            channel.tell(kind="loaded", trial=order["trial"], what=what)
    name = ray.train.collective.broadcast_from_rank_zero(name)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(shelf.opened(name)) if name is not None else None
        meta = read_metadata(folder) if folder is not None else None
        tracker = None
        if rank == 0:
            tracker = tracking.open_tracker(
                config.tracking,
                order["tracking_uri"],
                order["run_id"],
                order["folder"],
            )
            stack.callback(tracker.close)
        reporter = TrialReporter(
            order, channel, shelf, tracker, World.current(device), protected=name, best=order["best"]
        )
        try:
            if meta is not None:
                reporter.tell_again(meta)
            train(config, device=device, reporter=reporter, resume_from=folder)
        finally:
            reporter.keep_lines()


@dataclass
class TrialReporter:
    """Carries what the loop reports to the trial's folder, to MLflow and to the search, which decides."""

    order: Mapping[str, Any]
    channel: Channel
    shelf: Shelf
    tracker: tracking.Tracker | None
    """Of rank 0 only."""
    world: World
    protected: str | None
    """The checkpoint that this part of the trial began with; another trial may be cloning it."""
    lines: list[str] = field(default_factory=list)
    best: tuple[float, str] | None = None
    """Score and name of the best checkpoint that is kept."""
    clock: float = field(default_factory=time.monotonic)
    nodes: LeavingNodes = field(default_factory=LeavingNodes)

    def step(self, metrics: dict[str, float], *, step: int) -> None:
        if self.tracker is not None:
            self.tracker.metrics(metrics, step=step)

    def epoch(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        leave = False
        if self.tracker is not None:
            self.tracker.metrics(metrics, step=step)
            leave = self._decision(metrics, self._keep(metrics, step, snapshot())) != "go"
        if self.world.any(leave):
            raise LeaveError("the search has ended this part of the trial")

    def tell_again(self, meta: Metadata) -> None:
        """Report the epoch of a checkpoint that the search has not heard of: it was stopped in between."""
        leave = False
        if self.tracker is not None and meta.epochs_done > self.order["reported"] and not meta.progress.step:
            self.tracker.metrics(dict(meta.metrics), step=meta.steps_done)
            assert self.protected is not None
            leave = self._decision(meta.metrics, self.protected) != "go"
        if self.world.any(leave):
            raise LeaveError("the search has ended this part of the trial")

    def checkpoint(self, metrics: dict[str, float], *, step: int, snapshot: Callable[[], Snapshot]) -> None:
        if self.tracker is not None:
            self._keep(metrics, step, snapshot())

    def wait_until_saved(self) -> None:
        """Nothing is left to wait for."""

    def poll_flags(self) -> Flags:
        return Flags.NONE

    def node_leaving(self) -> bool:
        return self.nodes.poll()

    def line(self, text: str) -> None:
        if self.tracker is not None:
            self.lines.append(text)

    def keep_lines(self) -> None:
        """Add the loop's lines to the trial's log.txt."""
        if not self.lines:
            return
        address = storage.join(self.order["folder"], "log.txt")
        before = storage.read_text(address) if storage.exists(address) else ""
        storage.write_text(address, before + "\n".join(self.lines) + "\n")
        self.lines.clear()

    def _decision(self, metrics: Mapping[str, float], name: str) -> str:
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        best = self.best[1] if self.best else name
        try:
            answer = self.channel.ask(
                kind="epoch",
                trial=self.order["trial"],
                epoch=round(metrics["epoch"]),
                metrics=dict(metrics),
                seconds=seconds,
                checkpoint=self.shelf.address(best),
            )[1]
        except LeaveError:
            return "stop"  # and so the other workers hear of it, too
        return str(answer)

    def _keep(self, metrics: Mapping[str, float], step: int, snapshot: Snapshot) -> str:
        """Save a checkpoint, and delete those that are neither new, nor best, nor protected."""
        if self.tracker is not None:
            self.tracker.save_unsent()
        name = self.shelf.put(step, snapshot.save)
        value = metrics.get(self.order["metric"])
        if value is not None and value == value:
            score = self.order["sign"] * value
            if self.best is None or score >= self.best[0]:
                self.best = (score, name)
        kept = {name, self.protected, self.best[1] if self.best else None}
        self.shelf.drop_all_but({each for each in kept if each is not None})
        return name
