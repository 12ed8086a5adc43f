"""A queue of metrics and the thread that sends them, so that logging neither blocks nor raises.

The thread sends everything that waits as one batch, and tries again, in order, while the service is away. What the
service holds already, because training went on from an older checkpoint or an answer was lost on the way, is not sent
twice. What waits is kept in a file of the run's folder before each checkpoint is published, and queued again by the
worker that goes on. So whatever dies, a value is either stored, or in that file, or belongs to a step that is trained
again.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

from lape_ray import storage
from lape_ray.tracking import unsent
from lape_ray.tracking.failures import never_raise, reason
from lape_ray.tracking.unsent import Value

log = logging.getLogger(__name__)


class Service(Protocol):
    """A place that stores metrics; every method may raise anything."""

    name: str
    """In words for people."""

    def last_steps(self, names: Set[str]) -> Mapping[str, int]:
        """Return the last step that is stored of each of these metrics; one that has none is left out."""

    def store(self, values: Sequence[Value]) -> None:
        """Store values, in the order of their steps; on return no crash takes them back."""


class Sender:
    """The queue of one service.

    Args:
        folder: the run's; its file of unsent values is read, and their service gets them first.
        check: is called before that file changes; what it raises is raised, and nothing is written.

    Raises:
        OSError: the run's folder cannot be read.
    """

    RETRY_S = 5.0
    IN_FLIGHT_S = (
        5.0  # for which a batch on its way is waited for, so that the next worker does not send it too
    )
    BATCH = 1000  # the most metrics that MLflow's REST API takes at once

    def __init__(self, service: Service, folder: str, check: Callable[[], None] = lambda: None) -> None:
        self._service, self._check = service, check
        self._file = unsent.address_of(service.name.lower(), folder)
        earlier = unsent.read(self._file)
        self._kept = earlier is not None  # the file exists
        self._waiting = collections.deque(earlier or ())
        self._last_step: dict[str, int] = {}  # of each metric, as the service has it
        self._queue, self._keeping = threading.Lock(), threading.Lock()
        self._wake, self._closing, self._give_up = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._send_all, name=service.name, daemon=True)

    def start(self) -> None:
        """Start the thread that sends."""
        self._wake.set()
        self._thread.start()

    def put(self, values: Mapping[str, float], step: int) -> None:
        """Queue the values of a step."""
        now = int(time.time() * 1000)
        new = [Value(name=name, value=float(value), time_ms=now, step=step) for name, value in values.items()]
        with self._queue:
            self._waiting.extend(new)
        self._wake.set()

    def waiting(self) -> list[Value]:
        """List what is not stored yet."""
        with self._queue:
            return list(self._waiting)

    def save(self) -> None:
        """Keep what waits in the file, and delete the file where nothing does.

        Raises:
            OSError: the file cannot be written.
        """
        with self._keeping:
            waiting = self.waiting()
            if not waiting and not self._kept:
                return
            self._check()
            self._kept = True  # from now on, even if the next line fails half-way
            if waiting:
                unsent.write(self._file, waiting)
            else:
                storage.delete_file(self._file)
                self._kept = False

    def close(self, timeout_s: float) -> None:
        """Wait until everything is stored, for `timeout_s` at most, then keep the rest in the file."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        self._give_up.set()
        self._thread.join(self.IN_FLIGHT_S)
        self._keep_the_rest()

    def send_now(self) -> bool:
        """Send everything that waits, without a thread and once; returns whether nothing is left."""
        try:
            while self._waiting:
                self._send_batch()
        except Exception as error:  # whatever a service can do, the run is trained
            log.warning("%s does not take metrics: %s", self._service.name, reason(error))
        self._keep_the_rest()
        return not self._waiting

    def _keep_the_rest(self) -> None:
        if count := len(self._waiting):
            log.warning(
                "%s has not taken %d values, which are kept in %s", self._service.name, count, self._file
            )
        with never_raise(f"writing {self._file}"):
            self.save()

    def _send_all(self) -> None:
        away = False
        while not self._give_up.is_set():
            self._wake.wait()
            self._wake.clear()
            while self._waiting and not self._give_up.is_set():
                try:
                    self._send_batch()
                    away = False
                except Exception as error:  # whatever a service can do, the training goes on
                    if not away:
                        name = self._service.name
                        log.warning("%s does not take metrics, trying again: %s", name, reason(error))
                    away = True
                    self._give_up.wait(self.RETRY_S)
            if self._closing.is_set():
                return

    def _send_batch(self) -> None:
        with self._queue:
            batch = list(itertools.islice(self._waiting, self.BATCH))
        try:
            if fresh := self._not_yet_stored(batch):
                self._service.store(fresh)
        except BaseException:
            self._last_step.clear()  # a part of it may be stored
            raise
        with self._queue:
            for _ in batch:
                self._waiting.popleft()

    def _not_yet_stored(self, batch: Sequence[Value]) -> list[Value]:
        if new := {value.name for value in batch} - self._last_step.keys():
            self._last_step |= dict.fromkeys(new, -1) | dict(self._service.last_steps(new))
        fresh = []
        for value in batch:
            if value.step > self._last_step[value.name]:
                self._last_step[value.name] = value.step
                fresh.append(value)
        return fresh
