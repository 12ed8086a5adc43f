"""An optimizer step as one CUDA graph: captured once, then launched as a whole.

A small network's kernels take less time than their launches. A graph holds addresses and arguments of all of them, so
that whatever changes from step to step must lie in tensors at fixed places: images, targets, the learning rate, and the
random generator's seed and offset, which CUDA reads when a graph is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[Tensor, Tensor], Tensor]
WARM_UP = 3  # steps: what is compiled, chosen by measurement or allocated once is so before the capture


class Recorder(Protocol):
    """A way to turn work on a device into something that is launched again and again."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work as it is, as a capture will need it to have been done."""

    def capture(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record the work without doing it; returns where its result will lie, and what does it."""


class CudaRecorder:
    """CUDA graphs of the current device."""

    def __init__(self) -> None:
        # One for the warm-ups and the capture: libraries keep workspaces for each stream, the allocator does not give
        # to one what another left, and autograd's nodes of leaves belong to the stream that they were made on.
        self._stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def capture(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        results: list[Tensor] = []
        failures: list[Exception] = []
        try:
            # Threads of loaders and checkpoints go on with their own copies, which the capture must not forbid.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    results.append(work())
                except Exception as error:
                    failures.append(error)
        except Exception:  # the end of a broken capture, which says nothing of what broke it
            if not failures:
                raise
        if failures:
            raise failures[0]
        return results[0], graph.replay


class StepGraph:
    """Run a step's work as it is for some steps, then capture it, and from then on replay it.

    Every call does the work once, on its own images and targets. The work may hold no other input that changes, except
    tensors that are changed in place; those that it changes (weights, moments) must stay where they are.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._warm_ups_left = WARM_UP
        self._captured: tuple[tuple[Tensor, Tensor], Tensor, Callable[[], None]] | None = None

    def __call__(self, work: Work, images_BCHW: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the work's result on these inputs, in memory that the next call writes again."""
        if self._warm_ups_left:
            self._warm_ups_left -= 1
            return self._recorder.warm_up(lambda: work(images_BCHW, targets_BK))
        if self._captured is None:
            inputs = images_BCHW.clone(), targets_BK.clone()
            self._captured = inputs, *self._recorder.capture(lambda: work(*inputs))
        inputs, result, replay = self._captured
        for kept, given in zip(inputs, (images_BCHW, targets_BK), strict=True):
            if kept.shape != given.shape:
                raise ValueError(f"the graph was captured for {kept.shape}, and cannot take {given.shape}")
            kept.copy_(given)
        replay()
        return result
