"""Running statistics of batch norms: equal on all workers, and the same for any number of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lape_ray.training.distributed import World


class RunningStatistics:
    """The running means and variances of a network's batch norms, through the micro-batches of a step.

    A batch norm normalises each micro-batch by itself, wherever that is computed. In a step the running statistics move
    once: by the mean of what each micro-batch of all workers would have moved them. This depends on no order and on no
    number of workers, and `num_batches_tracked` counts steps. Norms that are not trained do not move.

    Args:
        micro_batches: of a step, over all workers.
        own: of these, the ones that this worker computes.
    """

    def __init__(self, network: nn.Module, world: World, *, micro_batches: int, own: int) -> None:
        # With one micro-batch a step, all of this is what batch norms do by themselves.
        norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.weight.requires_grad]
        norms = norms if micro_batches > 1 else []
        self._world, self._micro_batches, self._own = world, micro_batches, own
        self._moving = [norm.get_buffer(name) for norm in norms for name in ("running_mean", "running_var")]
        self._counts = [norm.get_buffer("num_batches_tracked") for norm in norms]
        self._before: list[Tensor] = []
        self._moved: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Begin a step."""
        if self._moving:
            self._before = [part.clone() for part in self._moving]
            self._moved = [torch.zeros_like(part) for part in self._moving]

    @torch.no_grad()
    def end_micro_batch(self) -> None:
        """Keep what a forward pass moved, and put the statistics back where the step began."""
        if self._moving:
            torch._foreach_add_(self._moved, torch._foreach_sub(self._moving, self._before))
            torch._foreach_copy_(self._moving, self._before)

    @torch.no_grad()
    def end(self) -> None:
        """Move the statistics, on all workers alike."""
        if not self._moving:
            return
        moved = torch.cat(self._moved)
        if self._world.size > 1:
            dist.all_reduce(moved)
        parts = moved.split([len(part) for part in self._moving])
        torch._foreach_add_(self._moving, parts, alpha=1 / self._micro_batches)
        torch._foreach_add_(self._counts, 1 - self._own)
