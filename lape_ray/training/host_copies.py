"""Copies of the training's state to host memory, which a GPU makes while the training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class HostCopies:
    """Copies to host memory.

    A GPU makes them on a stream of its own, into pinned memory, so that neither the host waits nor the steps that
    follow. Only work that changes what is copied must: it calls `fence` first. On a CPU a copy is made at once.

    Args:
        network: the network whose state is copied.
    """

    def __init__(self, device: torch.device, network: nn.Module) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self.forward_changes = any(isinstance(one, _BatchNorm) for one in network.modules())
        """Tells whether a forward pass changes the network's state, and not the optimizer alone."""

    def copy(self, values: Any) -> tuple[Any, Callable[[], None]]:
        """Return a copy of tensors in mappings and lists, and what waits, on any thread, until it is whole."""
        if self._stream is None:
            return _each(values, _at_once), _nothing
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copies = _each(values, _begun)
            copied = self._copied = torch.cuda.Event()
            copied.record()
        return copies, copied.synchronize

    def fence(self) -> None:
        """Let the device's next work wait until all copies are whole."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None


def _each(values: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return copy(values.detach())
    if isinstance(values, Mapping):
        return {key: _each(item, copy) for key, item in values.items()}
    if isinstance(values, list):
        return [_each(item, copy) for item in values]
    return values


def _at_once(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _begun(tensor: Tensor) -> Tensor:
    """Begin a copy; torch keeps its memory for the next one, once nobody holds it."""
    if not tensor.is_cuda:
        return _at_once(tensor)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _nothing() -> None:
    """Wait for nothing."""
