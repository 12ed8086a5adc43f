"""TensorBoard: a run's metrics as event files, in a folder that `tensorboard --logdir` is given.

The package is optional (`pip install lape_ray[tensorboard]`) and imported where it is needed.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from lape_ray import storage
from lape_ray.tracking.failures import never_raise, reason
from lape_ray.tracking.sender import Sender
from lape_ray.tracking.unsent import Value

log = logging.getLogger(__name__)


def check_tensorboard(folder: str | None) -> None:
    """Check that event files can be written into `folder`; a ValueError says why not, and what to do."""
    if folder is None:
        return
    option = f"--tracking.tensorboard {folder}"
    if storage.is_remote(folder):
        raise ValueError(
            f"{option} is no folder of this machine: event files grow line by line, which objects of S3 cannot; "
            "give a folder that the workers' nodes share"
        )
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(f"{option} needs a package that is not installed: pip install lape_ray[tensorboard]")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{option} cannot be written: {error}; choose another folder") from None


class TensorBoardTracker:
    """The tracker of one run's event files.

    They lie in a subfolder that is named after the run's folder and its id in MLflow: runs of one name do not mix, and
    a run that goes on adds to its own.
    """

    def __init__(
        self, tensorboard: str, run_id: str, folder: str, check: Callable[[], None] = lambda: None
    ) -> None:
        self._folder = Path(tensorboard, f"{folder.rstrip('/').rpartition('/')[2]}-{run_id[:8]}")
        self._sender = Sender(_EventFiles(self._folder), folder, check)
        self._sender.start()

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Queue `values`."""
        self._sender.put(values, step)

    def files(self, folder: Path, to: str) -> None:
        """Copy the files beside the event files: TensorBoard does not show them, a browser does."""
        with never_raise(f"TensorBoard: keeping {to}"):
            shutil.copytree(folder, self._folder / to, dirs_exist_ok=True)

    def save_unsent(self) -> None:
        """Keep what is not written yet in the run's folder."""
        self._sender.save()

    def close(self, timeout_s: float = 60) -> None:
        """Wait until everything is written, and keep the rest in the run's folder."""
        self._sender.close(timeout_s)


class _EventFiles:
    """The event files of one folder; this process writes one of its own, whose name comes after the others."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Path | None = None

    def last_steps(self, names: Set[str]) -> Mapping[str, int]:
        """Read all files. What stands behind a torn record, no reader sees, and it is written again."""
        last: dict[str, int] = {}
        for file in sorted(self._folder.glob("events.out.tfevents.*")):
            try:
                _read_steps(file, last)
            except Exception as error:  # of the decoder; what was read until there counts
                log.warning(
                    "%s is damaged: %s; what stands behind that is written again", file, reason(error)
                )
        return {name: last[name] for name in names & last.keys()}

    def store(self, values: Sequence[Value]) -> None:
        """Write values as events and bring them to the disk."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            stamp = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file = self._folder / f"events.out.tfevents.{stamp}"
        content = _records(values, begin=not self._file.exists())
        try:
            with self._file.open("ab", buffering=0) as opened:
                while content:
                    content = content[opened.write(content) :]
                os.fsync(opened.fileno())
        except BaseException:
            self._file = None  # it may end with a torn record, behind which nothing would be read
            raise


def _records(values: Sequence[Value], *, begin: bool) -> bytes:
    """Encode values as records of an event file, behind the one that begins a file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    if begin:
        writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    for one in values:
        point = Summary(value=[Summary.Value(tag=one.name, simple_value=one.value)])
        event = Event(wall_time=one.time_ms / 1000, step=one.step, summary=point)
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _read_steps(file: Path, last: dict[str, int]) -> None:
    """Update the last step of each metric by those of an event file, up to a torn record."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for record in RawEventFileLoader(str(file)).Load():
        event = Event.FromString(record)
        for value in event.summary.value:
            last[value.tag] = max(event.step, last.get(value.tag, -1))
