"""SIGTERM and Ctrl-C as requests to end a run after a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_ask(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` at the first SIGTERM or Ctrl-C within the block; a second one of either kind ends the process.

    In another thread than the main one, where no signal arrives, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        stop()
        with contextlib.suppress(OSError):  # nobody reads it any more
            # Not `print`, which raises where the signal comes while this thread prints.
            os.write(1, f"{name}: the run ends after a checkpoint; a second one ends it at once\n".encode())

    before = {number: signal.signal(number, ask) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
