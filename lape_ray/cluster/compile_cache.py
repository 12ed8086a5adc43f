"""Keep what torch.compile and Triton have made for a run with its checkpoints: a fresh machine compiles nothing.

These files are code. So the archive's sha256 is a tag of the MLflow run, and an archive that does not have it is not
opened: whoever can write to the storage alone cannot run code on the workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lape_ray import storage, tracking
from lape_ray.cluster.run import Run
from lape_ray.config import TrainConfig
from lape_ray.training.parallelize import compiles
from lape_ray.values.environment import environment

FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@contextlib.contextmanager
def compile_cache(run: Run, device: torch.device) -> Iterator[Callable[[], None]]:
    """Let this process compile into a folder of this machine, which first gets what earlier workers have stored.

    Yields a function that stores what is new there. A folder that the user has set is left alone.
    """
    if not compiles(run.config.run.compile, device) or _set_by_user():
        yield lambda: None
        return
    cache = _Cache(run, _key(run.config, device))
    with environment(dict(zip(FOLDERS, (str(cache.folder), str(cache.folder / "triton")), strict=True))):
        cache.load()
        yield cache.store


def _set_by_user() -> bool:
    """Tell whether the user chose a folder; torch writes its own choice, `torchinductor_USER`, there too."""
    return any("torchinductor_" not in os.environ.get(name, "torchinductor_") for name in FOLDERS)


class _Cache:
    """The compiled files of one kind of machine: a folder of this one, and an archive in the run's folder."""

    def __init__(self, run: Run, key: str) -> None:
        self._run, self._tag = run, f"compiled.{key}"
        self._archive = storage.join(run.folder, f"compiled-{key}.tar.gz")
        self.folder = storage.cache() / "compiled" / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stored: set[Path] = set()

    def load(self) -> None:
        """Unpack the run's archive, once on a machine; one that is absent, torn or changed only costs time."""
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._files():
                with contextlib.suppress(OSError, ValueError, tarfile.TarError):
                    self._unpack()
            self._stored = self._files()

    def _unpack(self) -> None:
        if not storage.exists(self._archive):
            return
        path, run = storage.local(self._archive), self._run
        wanted = tracking.read_run(run.tracking_uri, run.mlflow_run_id, ()).tags.get(self._tag)
        if _sha256(path) == wanted:
            with tarfile.open(path) as archive:
                # Debian 12's Python, 3.11.2, has no filters yet.
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(self.folder)

    def store(self) -> None:
        """Store an archive of all files, where there are new ones; a failure only costs time later."""
        files = self._files()
        if files == self._stored:
            return
        self._run.check_lease()
        with contextlib.suppress(OSError), storage.written_path(self._archive) as path:
            partial = path.with_name(f".{path.name}.partial")
            with tarfile.open(partial, "w:gz") as archive:
                for file in sorted(files):
                    archive.add(file, file.relative_to(self.folder))
            digest = _sha256(partial)
            partial.replace(path)
            tracking.tag_run(self._run.tracking_uri, self._run.mlflow_run_id, {self._tag: digest})
            self._stored = files

    def _files(self) -> set[Path]:
        """List what was compiled, without locks and half-written files."""
        return {
            path
            for path in self.folder.rglob("*")
            if path.is_file() and path.suffix != ".lock" and not path.name.startswith(".")
        }


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _key(config: TrainConfig, device: torch.device) -> str:
    """Name what the compiled files depend on, beside what the compilers look at themselves."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    facts = (
        *(torch.__version__, platform.python_version(), gpu, _cpu()),
        *(config.model, config.micro_batch_size, config.training.precision, config.run.compile),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Describe this machine's processor: code is compiled for what it can do."""
    described = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return "\n".join(
        line for line in described if line.startswith(("model name", "flags", "Features", "CPU part"))
    )
