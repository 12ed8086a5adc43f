"""The flags that the workers of a run exchange at every step, without waiting for them.

A step must not wait for the network, and not for the GPU. So the flags of a step travel while the next one is computed,
over a separate process group on the CPUs, and every worker reads them one step later: all at the same step.
"""

from __future__ import annotations

import enum
from datetime import timedelta

import torch
import torch.distributed as dist


class News(enum.Flag):
    """The news that one worker has and all must act upon together."""

    NONE = 0
    SAVE = enum.auto()
    """A checkpoint is due: by the clock, or because a machine is about to go."""
    STOP = enum.auto()
    """The run is to end after a checkpoint."""
    STORED = enum.auto()
    """The last checkpoint has been stored, or could not be."""


class Signals:
    """The flags of all workers of the default process group, which may be absent: then the run has one worker.

    Args:
        timeout_s: after which a worker that does not answer is an error of `exchange`.
    """

    def __init__(self, timeout_s: float) -> None:
        self._group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            assert isinstance(group, dist.ProcessGroup)  # of which every rank is a member
            self._group = group
        self._sent: tuple[torch.Tensor, dist.Work | None] | None = None

    def close(self) -> None:
        """Take the process group away; all workers are done with it."""
        if self._group is not None:
            if self._sent is not None and self._sent[1] is not None:
                self._sent[1].wait()
            dist.destroy_process_group(self._group)
            self._group = None

    def exchange(self, news: News) -> News:
        """Send this worker's news; returns what all sent at the call before, the same on every worker."""
        flags = torch.tensor([flag in news for flag in News], dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._sent = self._sent, (flags, work)
        if before is None:
            return News.NONE
        heard, arrived = before
        if arrived is not None:
            arrived.wait()
        found = News.NONE
        for flag, value in zip(News, heard.tolist(), strict=True):
            if value:
                found |= flag
        return found
