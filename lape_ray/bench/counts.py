"""What a step does, counted without a clock: dispatched operators, kernels, graphs, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION_WORDS = ("flash", "fmha", "cudnn", "attention", "efficient")
TOP = 20  # kernels that are listed


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher; views cost nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[int], None]) -> int:
    """Dispatched operators of one eager step."""
    with Operators() as mode:
        run(1)
    return mode.counts.total()


def kernels(run: Callable[[int], None], device: torch.device) -> dict[str, Any]:
    """Kernels of one step on a GPU: their number, the most costly (microseconds), and attention's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run(1)
        torch.cuda.synchronize(device)
    events = [
        event
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")
    ]
    spent: Counter[str] = Counter()
    for event in events:
        spent[event.name] += event.time_range.elapsed_us()
    return {
        "kernels": len(events),
        "top": [[name[:120], round(us, 1)] for name, us in spent.most_common(TOP)],
        "attention": sorted(
            {name[:120] for name in spent if any(w in name.lower() for w in ATTENTION_WORDS)}
        ),
    }


def graphs() -> dict[str, int]:
    """Graphs that the compiler has made in this process so far, and breaks between them."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def peak_bytes(run: Callable[[int], None], device: torch.device, *, kept: int) -> int:
    """The most memory that tensors hold during a step.

    Args:
        kept: bytes that tensors hold before the step; on a GPU the allocator knows them itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(1)
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(1)
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return kept + most
