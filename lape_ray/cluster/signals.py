"""SIGTERM, Ctrl-C and the end of the terminal as requests to end a run after a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}
"""By which people know the signals that ask for the end; the last one comes as the terminal is closed."""


@contextlib.contextmanager
def signals_ask(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` at the first of these signals within the block; then SIGTERM or Ctrl-C ends the process at once.

    A terminal that is closed may send SIGHUP twice, by its shell and by the kernel: the second one is ignored, and
    below `nohup` the first one as well. In another thread than the main one, where no signal arrives, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        stop()
        with contextlib.suppress(OSError):  # nobody reads it any more
            # Not `print`, which raises where the signal comes while this thread prints.
            name = NAMES[signal.Signals(number)]
            os.write(1, f"{name}: the run ends after a checkpoint; a second one ends it at once\n".encode())

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    before = {
        number: signal.signal(number, ask) for number in NAMES if not (ignored and number == signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
