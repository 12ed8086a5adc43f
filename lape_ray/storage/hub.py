"""Checkpoints on the Hugging Face hub: `hf-hub:OWNER/NAME`, or `hf-hub:OWNER/NAME@REVISION`.

huggingface_hub keeps the copies, in $HF_HUB_CACHE or below $HF_HOME, and finds token, server and offline mode in the
environment as its other users do: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Every machine of a run fetches for itself.
The package is optional (`pip install lape_ray[hub]`) and imported where a repository is read or written.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lape_ray.values.redaction import first_line

SCHEME = "hf-hub:"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OURS = "meta.json"
"""The file that a folder of this package's checkpoints has (see training.checkpoint)."""
# What is read of a repository. The optimizer's state is not, and a second copy of the weights only where it is the one.
WANTED = (OURS, "config.json", "model.safetensors", "ema.safetensors")
OLDER = "pytorch_model.bin"


class Repository(NamedTuple):
    """A repository, and the branch, tag or commit of it; None: its main branch."""

    name: str
    revision: str | None


def is_hub(address: str | Path) -> bool:
    return str(address).startswith(SCHEME)


def repository(address: str) -> Repository:
    """Split `hf-hub:OWNER/NAME[@REVISION]`; a ValueError where it is none."""
    name, at, revision = address.removeprefix(SCHEME).partition("@")
    if NAME.fullmatch(name) is None or (at and not re.fullmatch(r"[\w./-]+", revision)):
        raise ValueError(
            f"{address!r} names no repository; write hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION"
        )
    return Repository(name, revision or None)


def fetch(address: str) -> Path:
    """Return this machine's copy of the checkpoint in a repository: a folder of ours, else the file of its weights.

    A process keeps to the copy that it had first.

    Raises:
        FileNotFoundError: there is no such repository or revision, or it holds no weights that are read.
        PermissionError: it wants a token, or another.
        ConnectionError: the hub is not reached, and there is no copy.
        ValueError: the address is none, or huggingface_hub is not installed.
    """
    hub = _package("reading " + address)
    constants = hub.constants
    return _fetch(address, constants.ENDPOINT, constants.HF_HUB_CACHE, constants.is_offline_mode())


@functools.lru_cache(maxsize=64)
def _fetch(address: str, endpoint: str, cache: str, offline: bool) -> Path:
    name, revision = repository(address)
    hub = _package("reading " + address)
    try:
        folder = Path(
            hub.snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=[*WANTED])
        )
        if (folder / OURS).exists():
            return folder
        if not (folder / "model.safetensors").exists():  # the same commit, whatever its branch is by now
            hub.snapshot_download(name, revision=folder.name, cache_dir=cache, allow_patterns=[OLDER])
    except Exception as error:  # the package raises its own kinds and those of its transports
        raise _translated(error, address, endpoint) from error
    for file in ("model.safetensors", OLDER):
        if (folder / file).exists():
            return folder / file
    raise FileNotFoundError(
        f"{address} holds neither model.safetensors nor {OLDER} nor a checkpoint folder of ours; fetch the file that "
        f"it has with `hf download {name}`, and give its path"
    )


def check_push(name: str) -> None:
    """Check what a push needs before anything is computed for it; a ValueError says what is missing."""
    if NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} names no repository; write --hub OWNER/NAME")
    _package(f"--hub {name}")
    if not os.environ.get("HF_TOKEN"):
        raise ValueError(
            f"--hub {name}: HF_TOKEN is not set; set it in the environment to a token that may write there (make one "
            "at https://huggingface.co/settings/tokens)"
        )


def push(folder: Path, name: str, *, public: bool) -> tuple[str, bool]:
    """Upload the files of a folder as one commit of the repository `name`, which is made where there is none.

    Args:
        public: whether everybody may see one that is made. Without it one that everybody sees already is refused.

    Returns its address for a browser, and whether everybody sees it.

    Raises:
        ValueError: see `check_push`; or it is public and was not to be.
        PermissionError, ConnectionError, OSError: the hub does not take it, or is not reached.
    """
    check_push(name)
    hub = _package(f"--hub {name}")
    api = hub.HfApi(token=os.environ["HF_TOKEN"])
    try:
        page = str(api.create_repo(name, private=not public, exist_ok=True))
        seen = not api.repo_info(name).private
        if public or not seen:
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of a checkpoint")
    except Exception as error:
        raise _translated(error, SCHEME + name, hub.constants.ENDPOINT) from error
    if seen and not public:
        raise ValueError(
            f"{page} is public already: give --hub-public to add to what everybody sees, or another name"
        )
    return page, seen


def _package(wanted_for: str) -> ModuleType:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise ValueError(
            f"{wanted_for} needs the package huggingface_hub, which is not installed: pip install lape_ray[hub]"
        ) from None
    if not sys.stderr.isatty():  # in the logs of workers
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def _translated(error: Exception, address: str, endpoint: str) -> OSError:
    """Translate an error of huggingface_hub to one of Python's in one line, which says how to mend it."""
    errors = _package(address).errors
    name, revision = repository(address)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{address}: its owner gives access on request; ask for it at {endpoint}/{name}, and set HF_TOKEN to a "
            f"token of that account {_WHERE}"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        kind = "does not exist, or is private and the token in HF_TOKEN may not see it; check the name, or set HF_TOKEN"
        return FileNotFoundError(f"{address} {kind} to one that may {_WHERE}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{address}: the repository has no branch, tag or commit {revision!r}")
    if status == 403:
        return PermissionError(
            f"{address}: {endpoint} refuses it to the token; set HF_TOKEN to one that may do it (a push: write)"
        )
    if _is_offline():
        return ConnectionError(
            f"{address} is not whole among this machine's copies, and HF_HUB_OFFLINE forbids to fetch it; fetch it "
            f"once with `HF_HUB_OFFLINE=0 hf download {name}{f' --revision {revision}' if revision else ''}`"
        )
    if status is not None:
        return OSError(f"{address}: {endpoint} answers with status {status}; try again later")
    cause = error.__cause__ or error
    away = any(
        kind.__name__ == "TransportError" for kind in type(cause).__mro__
    )  # of httpx, under any of its names
    if not (away or isinstance(error, errors.LocalEntryNotFoundError)):
        return OSError(
            f"{address}: {first_line(error)} ({first_line(cause)}); HF_HOME says where copies are kept"
        )
    return ConnectionError(
        f"{address}: {endpoint} is not reached ({first_line(cause)}), and this machine has no copy; connect it, set "
        f"HF_ENDPOINT to a mirror, or fetch it elsewhere with `hf download {name}` and bring $HF_HOME here"
    )


def _is_offline() -> bool:
    return bool(_package("").constants.is_offline_mode())


_WHERE = "(on a cluster: in the environment of every node)"
