"""Ask of this machine what `lape-ray doctor` wants to know: a function for each line, which returns what works.

What does not work is raised as `BrokenError`, with its fix; what no run on this machine needs, as `AbsentError`. Texts
hold no secret: of a variable at most its name is shown, and of an address what `redacted` leaves.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lape_ray import storage, tracking
from lape_ray.cluster.local import check_answers
from lape_ray.config import TrainConfig, replace_fields
from lape_ray.data.installed import INSTALL_FFCV, missing_for_ffcv
from lape_ray.values.redaction import redacted, refuse_secret

IMPORT_S = 12.0
FREE_BYTES = 10e9
"""ImageNet's copies and checkpoints need more; the demo and Ray's logs and spilled objects need less."""
SHARED_BYTES = 64 * 2**20
"""For each GPU: what NCCL takes, as `cluster.connection` also asks when a run starts."""


class BrokenError(Exception):
    """Something that does not work.

    Attributes:
        fix: what a person can do about it
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


class AbsentError(Exception):
    """Something that is not there and that no run on this machine needs."""


def check_python() -> str:
    """Look at the version that runs, and whether the package is installed for it or only found by its path."""
    found = f"{platform.python_version()} at {sys.executable}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        raise BrokenError(found, "use Python 3.11 to 3.14: remove .venv and run make setup")
    return found


def count_gpus() -> int:
    """Count the GPUs that PyTorch can use; it is imported only where there may be some, for that takes seconds."""
    if not gpu_files():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_files() -> list[str]:
    """List the devices by which a driver shows its GPUs: NVIDIA's, that of Windows under WSL, or AMD's."""
    patterns = ("nvidia[0-9]*", "dxg", "kfd")
    return sorted(str(path) for pattern in patterns for path in Path("/dev").glob(pattern))


def check_gpu() -> str:
    """Compute on each GPU."""
    if not (files := gpu_files()):
        raise AbsentError("none: training runs on the CPU")
    import torch

    if not (count := count_gpus()):
        raise BrokenError(
            f"{files[0]} is there, but PyTorch {torch.__version__} cannot use it",
            f"install a driver for CUDA {torch.version.cuda}" if torch.version.cuda
            else "install PyTorch with CUDA (make setup, or the image with FLAVOR=gpu)",
        )  # fmt: skip
    for number in range(count):
        torch.ones(8, device=f"cuda:{number}").sum().item()
    names = sorted({torch.cuda.get_device_name(number) for number in range(count)})
    return f"{count} x {', '.join(names)}, CUDA {torch.version.cuda}"


def _needs_gpu() -> int:
    if not (count := count_gpus()):
        raise AbsentError("no GPU needs it")
    return count


def check_nccl() -> str:
    """Look for the library by which GPUs exchange gradients."""
    _needs_gpu()
    import torch

    if not torch.distributed.is_nccl_available():
        raise BrokenError(
            "this PyTorch is built without it", "install PyTorch from its own wheels (make setup)"
        )
    return ".".join(map(str, torch.cuda.nccl.version()))


def check_triton() -> str:
    """Look for the compiler of kernels."""
    _needs_gpu()
    try:
        return version("triton")
    except PackageNotFoundError:
        fix = "pip install the triton of requirements.lock, or train with --run.compile off"
        raise BrokenError("not installed", fix) from None


def check_compiler() -> str:
    """Compile the headers that the C stub of a Triton kernel includes."""
    name = os.environ.get("CC") or next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), None)
    needed = count_gpus() > 0
    fix = "apt-get install gcc libc6-dev python3-dev, with which Triton builds its kernels"
    if name is None:
        if needed:
            raise BrokenError("none", fix)
        raise AbsentError("none: only a GPU needs one, for Triton's kernels")
    command = [name, "-x", "c", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
    done = subprocess.run(
        command, input="#include <Python.h>", capture_output=True, text=True, timeout=IMPORT_S
    )
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "it fails")
        if needed:
            raise BrokenError(f"{name}: {said}", fix)
        raise AbsentError(f"{name}, but {said}; only a GPU needs it")
    return name


def check_libjpeg() -> str:
    """Pass a JPEG through the compiled decoder."""
    from PIL import Image

    try:
        from lape_ray.data import native
    except ImportError as error:
        raise BrokenError(str(error), "make setup, or pip install the wheel that make wheel builds") from None
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 80, 40)).save(buffer, "JPEG")
    native.add_restart_markers(buffer.getvalue())
    return "the compiled decoder works"


def check_ffcv() -> str:
    """Load FFCV's library, which needs OpenCV's; importing all of FFCV takes too long."""
    missing = missing_for_ffcv()
    if "ffcv" in missing:
        raise AbsentError(f"not installed; only --data.backend ffcv needs it: {INSTALL_FFCV}")
    if missing:
        raise BrokenError(f"{' and '.join(missing)} is missing", INSTALL_FFCV)
    package = importlib.util.find_spec("ffcv")
    folder = Path(package.origin).parent.parent if package and package.origin else Path()
    for library in folder.glob("ffcv/_libffcv*.so"):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            raise BrokenError(
                str(error), "apt-get install libopencv-dev libturbojpeg0-dev, or build FFCV anew"
            ) from None
        return version("ffcv")
    raise BrokenError(
        f"there is no compiled library in {folder / 'ffcv'}", f"pip uninstall ffcv, then {INSTALL_FFCV}"
    )


def check_writable(folder: Path) -> None:
    """Raise `BrokenError` where `folder` cannot be made or written in. It is not made."""
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BrokenError(f"{folder} cannot be written", "set LAPE_RAY_HOME to a folder that can")


def check_storage(address: str) -> str:
    """Write and delete a small file where runs are kept."""
    try:
        storage.check_writable(address)
    except (ValueError, OSError) as error:
        raise BrokenError(
            redacted(str(error)), "see above; s3:// takes AWS_ENDPOINT_URL and credentials"
        ) from None
    return f"{redacted(address)} can be written"


def check_s3(address: str | None) -> str:
    """Write to the s3:// address that is given, else look whether endpoint and credentials are there."""
    if address and storage.is_remote(address):
        return check_storage(address)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    kept = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    known = "AWS_ACCESS_KEY_ID" in os.environ or "AWS_PROFILE" in os.environ or kept.exists()
    if not endpoint and not known:
        raise AbsentError("no endpoint and no credentials; only s3:// addresses need them")
    if importlib.util.find_spec("boto3") is None:
        raise BrokenError("boto3 is not installed", "pip install boto3")
    try:
        refuse_secret("AWS_ENDPOINT_URL", endpoint)
    except ValueError as error:
        raise BrokenError(str(error), "see there") from None
    if endpoint:
        answers(endpoint, "start the server, or correct AWS_ENDPOINT_URL")
    if not known:
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise BrokenError(
            f"{endpoint} answers, but there are no credentials", f"{fix}, unless the machine has a role"
        )
    return f"{endpoint or 'Amazon'}, with credentials; try them with --storage s3://BUCKET/FOLDER"


def answers(address: str, fix: str) -> None:
    """Raise `BrokenError` where nobody listens at the host and port of `address`."""
    try:
        check_answers(address)
    except (OSError, ValueError) as error:
        raise BrokenError(f"{redacted(address)} does not answer: {error}", fix) from None


def check_mlflow(uri: str | None) -> str:
    """Ask the tracking server for its experiments; of a local file ask only that its folder can be written."""
    config = replace_fields(TrainConfig(), {"tracking.uri": uri}) if uri else TrainConfig()
    fix = (
        "set --tracking.uri or MLFLOW_TRACKING_URI to a server that is up, or leave both out for a local file"
    )
    try:
        if importlib.util.find_spec("mlflow") is None:
            raise BrokenError("not installed", "make setup, or pip install mlflow")
        address = tracking.tracking_uri(config)
        if address.startswith("sqlite:"):
            folder = Path(address.removeprefix("sqlite:///").partition("?")[0]).parent
            check_writable(folder)
            return f"{version('mlflow')}, a file in {folder}"
        tracking.check_reachable(address)
    except ValueError as error:
        raise BrokenError(redacted(str(error)), fix) from None
    return f"{version('mlflow')}, {redacted(address)} answers"


def check_ray() -> str:
    """Import it, first in a process of its own, and look for the cluster that a run would connect to."""
    try:
        found = version("ray")
        done = subprocess.run(
            [sys.executable, "-c", "import ray"], capture_output=True, text=True, timeout=IMPORT_S
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it ends without a word"])[-1]
            raise BrokenError(
                f"{found} cannot be imported: {said}", "install the lock's versions (make setup)"
            )
    except PackageNotFoundError:
        raise BrokenError("not installed", "make setup, or pip install the lock's ray") from None
    except subprocess.TimeoutExpired:
        return f"{found} (not imported within {IMPORT_S:g} s: the machine is busy)"
    from lape_ray.cluster.connection import find_cluster  # not before Ray has shown that it can be imported

    try:
        address = find_cluster()
    except ValueError as error:
        raise BrokenError(str(error), "see there") from None
    return f"{found}, {redacted(address)} answers" if address else f"{found}; a run starts a Ray of its own"


def check_shared_memory() -> str:
    """Look at what is left of /dev/shm, through which Ray and NCCL pass data."""
    free, need = shutil.disk_usage("/dev/shm").free, SHARED_BYTES * max(1, count_gpus())
    found = f"{free / 2**20:,.0f} MB free"
    if free < need:
        fix = "docker run --shm-size=2g, or an emptyDir of medium Memory at /dev/shm"
        raise BrokenError(f"{found}, and a run needs {need / 2**20:,.0f} MB", fix)
    return found


def check_disk(address: str | None) -> str:
    """Look at the space for runs, copies of data, and Ray's own files in /tmp."""
    places = {str(storage.home()): "LAPE_RAY_HOME", "/tmp": "RAY_TMPDIR"}
    if address and not storage.is_remote(address):
        places[address] = "--storage"
    found = {place: storage.free_bytes(place) or 0 for place in places}
    text = ", ".join(f"{free / 1e9:,.0f} GB free for {place}" for place, free in found.items())
    if few := [place for place, free in found.items() if free < FREE_BYTES]:
        raise BrokenError(text, f"free space, or name another place with {places[few[0]]}")
    return text


def checks(address: str | None, uri: str | None) -> dict[str, Callable[[], str]]:
    """Return all checks by the names of their lines.

    Args:
        address: of runs, which is tried by writing there; None: the default's space is looked at.
        uri: of the MLflow server; None: what a run would take.
    """
    return {
        "Python": check_python,
        "GPU": check_gpu,
        "NCCL": check_nccl,
        "Triton": check_triton,
        "C compiler": check_compiler,
        "libjpeg": check_libjpeg,
        "FFCV": check_ffcv,
        "S3": lambda: check_s3(address),
        "MLflow": lambda: check_mlflow(uri),
        "Ray": check_ray,
        "shared memory": check_shared_memory,
        "disk space": lambda: check_disk(address),
    }
