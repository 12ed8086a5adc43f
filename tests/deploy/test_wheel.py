"""The wheel of `make wheel` runs where there is neither a compiler nor libjpeg: `make test-wheel`."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lape_ray.data import native

pytestmark = [pytest.mark.slow, pytest.mark.wheel]
ROOT = Path(__file__).parent.parent.parent
CODE = """
import json, re, sys
from pathlib import Path
import numpy as np
from lape_ray.data import native
data = Path(sys.argv[1]).read_bytes()
out = np.zeros((1, 32, 32, 3), np.uint8)
status = native.Decoder(1).decode_batch(
    np.frombuffer(data, np.uint8), np.array([0]), np.array([len(data)]), np.array([0]), np.array([96]), np.array([80]),
    np.array([[7, 5, 61, 47]]), np.array([False]), out)
maps = Path("/proc/self/maps").read_text()
print(json.dumps({
    "status": int(status[0]), "pixels": out.tobytes().hex(), "markers": native.add_restart_markers(data).hex(),
    "jpeg": sorted(set(re.findall(r"\\S*libjpeg\\S*", maps))), "package": native.__file__,
}))
"""


def pythons() -> list[str]:
    """The Pythons of this machine that the wheel is for."""
    names = [f"python3.{minor}" for minor in (11, 12, 13, 14)]
    found = [path for name in names if (path := shutil.which(name))]
    works = [path for path in found if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]
    return sorted({sys.executable, *works})


def hidden() -> list[str]:
    """Words before a command that hide the system's libjpeg from it, for which one must be root."""
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    libraries = [
        line.rpartition(" => ")[2] for line in listed.splitlines() if "libjpeg" in line or "turbojpeg" in line
    ]
    binds = " && ".join(f"mount --bind /dev/null {library}" for library in libraries)
    if os.geteuid() or not libraries:
        return []
    return ["unshare", "-m", "sh", "-c", f'{binds} && exec "$@"', "sh"]


@pytest.mark.parametrize("python", pythons())
def test_the_wheel_needs_neither_compiler_nor_libjpeg(python: str, tmp_path: Path) -> None:
    (wheel,) = (ROOT / "dist").glob("lape_ray-*-cp311-abi3-manylinux*.whl")
    uv = [str(ROOT / ".uv/bin/uv"), "-q"]
    subprocess.run([*uv, "venv", "--python", python, str(tmp_path / "venv")], check=True)
    there = tmp_path / "venv/bin/python"
    install = [
        *uv,
        "pip",
        "install",
        "--python",
        str(there),
        "--no-deps",
        str(wheel),
        f"numpy=={np.__version__}",
    ]
    subprocess.run(install, check=True, env=os.environ | {"CC": "/bin/false", "CXX": "/bin/false"})
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    nothing = {"PATH": "/nonexistent", "HOME": str(tmp_path)}
    if before := hidden():
        nothing["PATH"] = "/usr/bin:/bin"
        with pytest.raises(subprocess.CalledProcessError):  # so that the libraries are hidden indeed
            own = [*before, sys.executable, "-c", "import _lape_ray_native"]
            subprocess.run(own, check=True, capture_output=True, cwd=ROOT)
    command = [*before, str(there), "-c", CODE, str(tmp_path / "a.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, env=nothing, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["package"].startswith(str(tmp_path))
    (library,) = found["jpeg"]
    assert library.startswith(str(tmp_path / "venv")), "its own libjpeg, and no other"
    assert found["status"] == 0
    assert found["markers"] == native.add_restart_markers(buffer.getvalue()).hex()
    crop = Image.open(buffer).crop((7, 5, 68, 52)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(
        np.frombuffer(bytes.fromhex(found["pixels"]), np.uint8).reshape(32, 32, 3), np.asarray(crop)
    )
    console = [str(tmp_path / "venv/bin/lape-ray"), "train", "demo", "--dump"]
    done = subprocess.run(console, capture_output=True, text=True, env=nothing, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "optim.epochs = " in done.stdout
