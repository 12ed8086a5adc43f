"""Builds the images without a Docker engine: buildah on a base of its own. See run.py, which is what `make` calls.

The Dockerfiles know nothing of this machine: its package sources, certificates and pip configuration are mounted
while a step runs, read-only, and are in no image.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = "localhost/lape-base:bookworm"
IMAGES = {
    "trainer": ("localhost/lape-ray:cpu", "docker/Dockerfile"),
    "mlflow": ("localhost/lape-ray-mlflow:test", "docker/mlflow.Dockerfile"),
    "s3": ("localhost/lape-ray-s3:test", "docker/s3.Dockerfile"),
    "postgres": ("localhost/lape-ray-postgres:test", "tests/images/postgres.Dockerfile"),
}
EXTRA = {name: (f"localhost/lape-ray:{name}", "docker/Dockerfile") for name in ("gpu", "arm64")}
CA_IN_BUILD = "/etc/build-ca.crt"  # at a path of its own: packages write into /etc/ssl/certs
PIP_IN_BUILD = "/etc/pip.conf"


def configure(work: Path) -> None:
    """Container tools that work without systemd, with storage below `work`."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "containers.conf").write_text(
        '[containers]\ndefault_ulimits=["nofile=16384:16384","nproc=30000:30000"]\npids_limit=0\n'
        '[engine]\nruntime="runc"\ncgroup_manager="cgroupfs"\nevents_logger="file"\n'
    )
    (work / "storage.conf").write_text(
        f'[storage]\ndriver="overlay"\ngraphroot="{work}/store"\nrunroot="{work}/run"\n'
    )
    os.environ["CONTAINERS_CONF"] = str(work / "containers.conf")
    os.environ["CONTAINERS_STORAGE_CONF"] = str(work / "storage.conf")


def timed(what: str, command: Sequence[str], log: Path) -> None:
    """Run a step, its output in `log`; its last lines and exit where it fails."""
    began = time.monotonic()
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code:
        raise SystemExit(
            f"{what} failed ({code}), see {log}:\n" + "\n".join(log.read_text().splitlines()[-25:])
        )
    print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)


@contextlib.contextmanager
def emulated_arm64() -> Iterator[None]:
    """Let this machine run programs for arm64, in containers too: with qemu-user, 5 to 20 times slower."""
    emulator, kernel = Path("/usr/bin/qemu-aarch64-static"), Path("/proc/sys/fs/binfmt_misc")
    if not emulator.exists() or not (kernel / "register").exists():
        raise SystemExit(
            "--arm64 needs binfmt_misc and Debian's qemu-user-static: apt-get install qemu-user-static"
        )
    # How such a program begins (its ELF header), the bits of it that count, and F: containers find the emulator, too.
    begins = r"\x7fELF\x02\x01\x01" + r"\x00" * 9 + r"\x02\x00\xb7\x00"
    mask = r"\xff" * 7 + r"\x00" + r"\xff" * 8 + r"\xfe\xff\xff\xff"
    (kernel / "register").write_text(f":lape-aarch64:M::{begins}:{mask}:{emulator}:F")
    try:
        yield
    finally:
        (kernel / "lape-aarch64").write_text("-1")


def make_base(work: Path, *arch: str) -> str:
    """Make a Debian 12 with a Python 3.11, from this machine's package mirror, for its or another processor."""
    base, foreign = "-".join((BASE, *arch)), [f"--arch={one}" for one in arch]
    if subprocess.run(["podman", "image", "exists", base]).returncode == 0:
        return base
    folder = work / "-".join(("base", *arch))
    if not (folder / "usr/bin/python3.11").exists():
        shutil.rmtree(folder, ignore_errors=True)
        packages = "--include=ca-certificates,python3,python3-venv,python3-pip"
        command = ["debootstrap", *foreign, "--variant=minbase", packages, "bookworm", str(folder), mirror()]
        timed("debootstrap", command, work / "debootstrap.log")
    archive = f"tar -C {folder} -c . | podman import {' '.join(foreign)} - {base}"
    timed("base image", ["bash", "-o", "pipefail", "-c", archive], work / "base.log")
    return base


def mirror() -> str:
    """Where this machine's apt finds Debian itself."""
    listed = subprocess.run(["apt-get", "indextargets"], capture_output=True, text=True, check=True).stdout
    for target in listed.split("\n\n"):
        if "Codename: bookworm\n" in f"{target}\n" and (
            found := re.search(r"^Repo-URI: (\S+)", target, re.MULTILINE)
        ):
            return found[1]
    raise SystemExit("apt has no list of Debian bookworm; run apt-get update on a Debian 12")


def mounts(work: Path) -> list[str]:
    """What the build steps see of this machine: apt's sources and keys, certificates, pip's configuration."""
    seen = [Path(name) for name in ("/etc/apt/sources.list.d/debian.sources", "/usr/share/keyrings")]
    pairs = [(path, str(path)) for path in seen if path.exists()]
    authority = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    pairs.append((authority, CA_IN_BUILD))
    config = configparser.ConfigParser()
    config.read(
        ["/etc/pip.conf", Path.home() / ".config/pip/pip.conf", os.environ.get("PIP_CONFIG_FILE", "")]
    )
    values = dict(config["global"]) if config.has_section("global") else {}
    values["cert"] = CA_IN_BUILD
    for word in " ".join(values.values()).split():
        folder = Path(word.removeprefix("file://"))
        folder = folder.parent if folder.name == "simple" else folder  # an index, whose files lie beside it
        if folder.is_absolute() and folder.is_dir():
            pairs.append((folder, str(folder)))
    (work / "pip.conf").write_text(
        "[global]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
    )
    pairs.append((work / "pip.conf", PIP_IN_BUILD))
    return [word for source, target in pairs for word in ("-v", f"{source}:{target}:ro")]


def build(name: str, work: Path, arguments: dict[str, str]) -> None:
    """Build one of IMAGES or EXTRA."""
    tag, file = (IMAGES | EXTRA)[name]
    command = [
        "buildah",
        "bud",
        "--isolation",
        "chroot",
        "--format",
        "docker",
        "--layers",
        "--network",
        "host",
    ]
    command += ["--arch", name] if name == "arm64" else []
    command += mounts(work)
    for key, value in {"BASE_IMAGE": BASE, **arguments}.items():
        command += ["--build-arg", f"{key}={value}"]
    timed(f"image {name}", [*command, "-f", file, "-t", tag, "."], work / f"build-{name}.log")


def size(tag: str) -> str:
    """Of an image, for people."""
    command = ["podman", "image", "inspect", "--format", "{{.Size}}", tag]
    return f"{int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e9:.2f} GB"
