"""The ways in which workers end a run for good. They are returned: after an error Ray Train would start again."""

from __future__ import annotations

from dataclasses import dataclass

from lape_ray.storage import LeaseLostError
from lape_ray.training.loop import DivergedError, StoppedError


class StorageError(OSError):
    """A checkpoint could not be stored."""


class WorkersFailedError(RuntimeError):
    """Workers failed again and again at the same place."""

    exit_code = 1


ERRORS: dict[str, type[Exception]] = {
    "diverged": DivergedError,
    "stopped": StoppedError,
    "storage": StorageError,
    "failures": WorkersFailedError,
    "lost": LeaseLostError,
}


@dataclass(frozen=True)
class RunEnd:
    """Tell how a run ended: `kind` is one of ERRORS, with its reason, or `done`."""

    kind: str = "done"
    reason: str = ""

    @classmethod
    def of(cls, error: Exception) -> RunEnd:
        """Make the end that one of ERRORS stands for."""
        return cls(next(kind for kind, cause in ERRORS.items() if isinstance(error, cause)), str(error))

    def check(self) -> None:
        """Raise the error that ended the run, where one did."""
        if self.kind in ERRORS:
            raise ERRORS[self.kind](self.reason)
