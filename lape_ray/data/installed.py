"""Tell whether what a backend needs is installed: FFCV may be missing. Standard library only."""

from __future__ import annotations

import importlib.util

from lape_ray.config import Backend

INSTALL_FFCV = (
    "install the system's g++, pkg-config, libopencv-dev and libturbojpeg0-dev, then the extra lape_ray[ffcv] "
    "(in a checkout: make setup)"
)


def check_backend(backend: Backend) -> None:
    """Raise a ValueError where what `data.backend` needs is not installed."""
    if backend == "ffcv" and (missing := missing_for_ffcv()):
        raise ValueError(
            f"data.backend=ffcv needs {' and '.join(missing)}, which this Python does not have: {INSTALL_FFCV}; "
            "or choose --data.backend native, which reads the same files"
        )


def missing_for_ffcv() -> list[str]:
    """List the modules that FFCV needs and that are not installed, itself among them. Nothing is imported."""
    return [name for name in ("ffcv", "distutils", "numba") if importlib.util.find_spec(name) is None]
