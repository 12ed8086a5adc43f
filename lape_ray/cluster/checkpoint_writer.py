"""The checkpoints of a run on their way from rank 0's memory to storage, while the training continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from lape_ray import storage
from lape_ray.cluster.checkpoint_list import Listed, add
from lape_ray.cluster.run import Run
from lape_ray.training.checkpoint import MARKER, Snapshot


class CheckpointWriter:
    """Store checkpoints one after the other, in a thread.

    A checkpoint is written, brought to storage and listed; from then on a restart begins with it. Ray Train does not
    hear of it: its own list is written in place, so that a full disk or a kill can leave it empty.

    Args:
        listed: the run's checkpoints so far, oldest first.
        before_publishing: is called before a checkpoint appears: from then on a restart may begin with it.
        tell: shows a line to people.
    """

    def __init__(
        self,
        run: Run,
        listed: Sequence[Listed],
        *,
        before_publishing: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self._run, self._listed = run, tuple(listed)
        self._before_publishing, self._tell = before_publishing, tell
        self._used = set(storage.folders(run.folder))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(self, entry: Listed, snapshot: Snapshot) -> Future[tuple[str, float]]:
        """Begin to store a checkpoint; returns the name of its folder and the seconds that it took, in the future.

        The name is that of `entry`, with a number where a checkpoint has it that was damaged and is trained again.
        """
        entry = replace(entry, name=_unused(entry.name, self._used))
        self._used.add(entry.name)
        metadata = replace(snapshot.metadata, mlflow_run_id=self._run.mlflow_run_id)
        return self._thread.submit(self._store, entry, replace(snapshot, metadata=metadata))

    def _store(self, entry: Listed, snapshot: Snapshot) -> tuple[str, float]:
        """Write a checkpoint, store and list it, and delete those that it supersedes."""
        began, run = time.monotonic(), self._run
        address = storage.join(run.folder, entry.name)
        published = False

        def store() -> None:
            nonlocal published
            run.check_lease()
            if not published:
                self._before_publishing()
                with storage.staging(address) as folder:
                    snapshot.save(folder)
                    storage.publish(folder, address, last=MARKER)
                published = True
            run.check_lease()
            self._listed = add(run.folder, self._listed, entry, keep=run.config.run.keep_checkpoints)

        storage.retry(store, run.config.run.outage_s, self._tell)
        return entry.name, time.monotonic() - began

    def close(self) -> None:
        """Begin nothing more, and wait for what is being stored: this process may go on to train again."""
        self._thread.shutdown(cancel_futures=True)


def _unused(name: str, used: set[str]) -> str:
    number, free = 2, name
    while free in used:
        free, number = f"{name}-{number}", number + 1
    return free
