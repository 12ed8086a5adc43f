"""The flags that the workers of a run exchange at every step, without waiting for them.

A step must not wait for the network, and not for the GPU. So the flags of a step travel while the next one is computed,
over a separate process group on the CPUs, and every worker reads them one step later: all at the same step.
"""

from __future__ import annotations

import enum
from datetime import timedelta

import torch
import torch.distributed as dist


class Flags(enum.Flag):
    """The facts that one rank knows and all must act upon together, at the same step."""

    NONE = 0
    SAVE = enum.auto()
    """A checkpoint is due: by the clock, or because a machine is about to go."""
    STOP = enum.auto()
    """The run is to end after a checkpoint."""
    SAVED = enum.auto()
    """The last checkpoint has been stored."""
    UNSAVED = enum.auto()
    """The last checkpoint could not be stored."""


class RankFlags:
    """The flags of all ranks of the default process group, which may be absent: then the run has one worker.

    Args:
        timeout_s: after which a rank that does not answer is an error of `all_reduce`.
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

    def all_reduce(self, own: Flags) -> Flags:
        """Send this rank's flags; returns those that any rank sent at the call before, the same on every rank."""
        flags = torch.tensor([flag in own for flag in Flags], dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._sent = self._sent, (flags, work)
        if before is None:
            return Flags.NONE
        raised, arrived = before
        if arrived is not None:
            arrived.wait()
        found = Flags.NONE
        for flag, value in zip(Flags, raised.tolist(), strict=True):
            if value:
                found |= flag
        return found
