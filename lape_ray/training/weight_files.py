"""Files of weights of any code: opened without running anything that is in them, down to the one state dict."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pickle
import re
import reprlib
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lape_ray.model.convert import one_network

RESTORE = "restore the checkpoint from a copy, or use another"
CONTAINERS = (
    "model", "state_dict", "model_state_dict", "net", "network", "module", "model_state", "weights", "params",
    "teacher",
)  # fmt: skip
"""The entries in which other code keeps its weights, the first that a file has counts (of DINO's two the teacher)."""
AVERAGES = (
    "model_ema", "state_dict_ema", "ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "params_ema",
)  # fmt: skip
"""The entries in which other code keeps the weights' moving average."""
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's error
_TYPES = (
    dict,
    list,
    tuple,
    set,
    frozenset,
    int,
    float,
    complex,
    str,
    bool,
    bytes,
    object,
    slice,
    defaultdict,
)
# Classes of configs and hyperparameters that are saved beside weights.
_CONFIGS = re.compile(
    r"(__main__|yacs|omegaconf|pytorch_lightning|lightning|lightning_fabric|mmengine|mmcv|ml_collections|easydict|"
    r"addict|pathlib|datetime|types|typing)\."
)
log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A checkpoint is torn, incomplete or changed; an older one may be whole."""


def read_weight_file(file: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read the state dict in a file of any code, under its own names but without what wraps a network (`one_network`).

    Args:
        ema: whether to take the weights' moving average instead.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedError: it is damaged, or holds no weights that can be found.
        ValueError: it holds no moving average, or several networks.
    """
    if not file.exists():
        raise FileNotFoundError(f"checkpoint {file} does not exist")
    if not file.stat().st_size:
        raise DamagedError(f"{file} is empty; {RESTORE}")
    state, averaged = _unwrap(_load(file), file, ema=ema)
    for name, value in state.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if not (dense and isinstance(name, str)):
            raise DamagedError(
                f"{file}: its entry {reprlib.repr(name)} is a {type(value).__name__}, not a dense tensor with a "
                f"name; {RESTORE}"
            )
    try:
        return one_network(state, ema=ema and not averaged)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None


def _load(file: Path) -> object:
    if kind := _other_kind(file):
        raise DamagedError(f"{file} is {kind}")
    try:
        return load_file(file) if file.suffix == ".safetensors" else _unpickle(file)
    except Exception as error:  # these readers raise whatever a file brings them to
        if isinstance(error, pickle.UnpicklingError) and (refused := _REFUSED.search(str(error))):
            raise DamagedError(_more_than_tensors(file, refused[1])) from None
        what = (
            "holds more than tensors, or is damaged"
            if isinstance(error, pickle.UnpicklingError)
            else "is no readable checkpoint"
        )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedError(f"{file} {what}: {reason}; {RESTORE}") from None


def _other_kind(file: Path) -> str:
    """Say what a file is that is known and not read, and what to give; empty: it may be one that is."""
    if file.suffix in (".npz", ".h5", ".keras", ".msgpack", ".onnx", ".gguf"):
        return f"a {file.suffix} file of another framework; give timm's or PyTorch's file of the same weights"
    names: list[str] = []
    with (
        contextlib.suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError),
        zipfile.ZipFile(file) as parts,
    ):
        names = parts.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a TorchScript program; save its weights alone: torch.save({'model': "
            f"torch.jit.load({str(file)!r}).state_dict()}}, 'weights.pth')"
        )
    return ""


def _more_than_tensors(file: Path, name: str) -> str:
    return (
        f"{file} holds more than tensors: {name}, which could run code, and is not opened; where you trust it, save "
        "its weights alone, by the code that it comes from: torch.save({'model': MODEL.state_dict()}, 'weights.pth') "
        f"of MODEL = torch.load({file.name!r}, weights_only=False), or of its entry"
    )


def _unpickle(file: Path) -> object:
    """Load with `weights_only`, in which nothing but tensors, plain values and what is named here can be made.

    A config's class, whatever it is, becomes an inert stand-in: nothing is imported for it.
    """
    known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        argparse.Namespace,
        *_TYPES,
        *_numpy_parts(),
    ]
    while True:
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = _REFUSED.search(str(error))
            name = refused[1] if refused else ""
            if not _CONFIGS.match(name) or (_StandIn, name) in known:
                raise
            known.append((_StandIn, name))


class _StandIn:
    """Stands for a config's class: an object of it becomes a plain dict, which the unpickler fills and nobody reads."""

    def __new__(cls, *args: object, **options: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def _numpy_parts() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """List what a pickled scalar or array of numpy is made by, under its names in numpy 1 and 2."""
    made: Any = np._core.multiarray  # type: ignore[attr-defined]
    both = [
        (getattr(made, name), f"{place}.multiarray.{name}")
        for place in ("numpy.core", "numpy._core")
        for name in ("scalar", "_reconstruct")
    ]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdFDSUOM"}
    return [*both, np.ndarray, np.dtype, *kinds, _encode, (_encode, "_codecs.encode")]


def _encode(text: str, encoding: str) -> bytes:
    """Return the bytes of a numpy scalar that an older protocol wrote as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


def _unwrap(loaded: object, file: Path, *, ema: bool) -> tuple[Mapping[Any, Any], bool]:
    """Find the state dict in what a file holds, through any containers; returns also whether it is the average."""
    inner, averaged = loaded, False
    while True:
        if not isinstance(inner, Mapping):
            raise DamagedError(f"{file} holds a {type(inner).__name__}, not a state dict; {RESTORE}")
        if not inner:
            raise DamagedError(
                f"{file} holds no weights, or a whole pickled network; save {{'model': MODEL.state_dict()}} of it"
            )
        names = _containers(inner, CONTAINERS)
        averages = [] if averaged else _containers(inner, AVERAGES)
        if averages and (ema or not names):
            if not ema:
                log.warning("%s holds nothing but a moving average, %r, which is taken", file, averages[0])
            inner, averaged = inner[averages[0]], True
            continue
        if not names:
            return inner, averaged
        if averages:
            log.warning("%s also holds a moving average, %r, which --ema takes", file, averages[0])
        if names[0] == "teacher" and "student" in inner:
            log.warning("%s holds a student and a teacher; the teacher is taken, as DINO does", file)
        inner = inner[names[0]]


def _containers(holder: Mapping[Any, Any], known: tuple[str, ...]) -> list[str]:
    """List those of the `known` entries that hold no tensor: a state dict, or in 'model' what should be one."""
    return [
        name
        for name in known
        if name in holder
        and (isinstance(holder[name], Mapping) or (name == "model" and not isinstance(holder[name], Tensor)))
    ]
