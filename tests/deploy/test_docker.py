"""docker/: what can be known of images and stack without building them; `make test-images` builds and runs them."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lape_ray.cluster.prometheus import GAUGES
from lape_ray.values.redaction import is_secret

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_hadolint_finds_nothing() -> None:
    files = [*DOCKER.glob("*Dockerfile"), *(ROOT / "tests/images").glob("*.Dockerfile")]
    command = [str(Path(sys.executable).with_name("hadolint")), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert len(files) == 4
    assert done.returncode == 0, done.stdout


def test_images_do_not_run_as_root() -> None:
    for file in DOCKER.glob("*Dockerfile"):
        last = file.read_text().rpartition("\nFROM ")[2]
        assert re.search(r"^USER 1000:1000$", last, re.MULTILINE), file
        assert "HEALTHCHECK" in last, file
        assert not re.search(r"apt-get install[^&]*\bg\+\+", last), f"{file}: a compiler in what runs"


def test_the_image_has_the_python_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11,' in project
    for file in DOCKER.glob("*Dockerfile"):
        assert "python:3.11-slim-bookworm" in file.read_text()


def test_the_environment_is_complete(tmp_path: Path) -> None:
    """Every variable of compose.yaml is in .env.example, or has a default; make-env fills in each secret, once."""
    text = (DOCKER / "compose.yaml").read_text()
    target = tmp_path / "made.env"
    for _ in range(2):  # the second time it changes nothing
        subprocess.run([str(DOCKER / "make-env"), str(target)], check=True, capture_output=True)
        made = dict(line.split("=", 1) for line in target.read_text().splitlines() if re.match(r"\w", line))
    required = set(re.findall(r"\$\{(\w+):\?\}", text))
    used = set(re.findall(r"\$\{(\w+)", text))
    assert required <= made.keys()
    assert made.keys() <= used
    assert all(made.values()), "nothing is empty"
    secrets = [value for key, value in made.items() if key.endswith(("PASSWORD", "KEY", "TOKEN"))]
    assert len(set(secrets)) == len(secrets) == 7
    assert min(map(len, secrets)) >= 24
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    again = subprocess.run(
        [str(DOCKER / "make-env"), str(target)], check=True, capture_output=True, text=True
    )
    assert again.stdout == ""


def test_an_older_environment_is_completed(tmp_path: Path) -> None:
    """With what a new version needs; what stands there stays."""
    target = tmp_path / "old.env"
    target.write_text("# mine\nMLFLOW_ADMIN_PASSWORD=password-of-before\nRAY_WORKERS=7")
    subprocess.run([str(DOCKER / "make-env"), str(target)], check=True, capture_output=True)
    lines = target.read_text().splitlines()
    assert lines[:3] == ["# mine", "MLFLOW_ADMIN_PASSWORD=password-of-before", "RAY_WORKERS=7"]
    names = [line.partition("=")[0] for line in lines[1:]]
    example = re.findall(r"^(\w+)=", (DOCKER / ".env.example").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(example)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_no_image_holds_a_secret() -> None:
    """Arguments and variables of a build stay in the image's history, and a copied file in a layer."""
    files = [*DOCKER.glob("*Dockerfile"), *(ROOT / "tests/images").glob("*.Dockerfile")]
    for file in files:
        text = file.read_text().replace("\\\n", " ")
        for instruction, words in re.findall(r"^(ARG|ENV|LABEL|COPY|ADD)\s+(.+)$", text, re.MULTILINE):
            named = dict(re.findall(r"(\S+?)=(\S*)", words)) or {words: ""}
            assert not [name for name, value in named.items() if is_secret(name, value)], f"{file}: {words}"
            assert instruction not in ("COPY", "ADD") or not re.search(r"\.env|secret|^\. |\*", words), words
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert sent[0] == "*", "nothing is sent to a build but what is named"
    assert not [line for line in sent if ".env" in line]


def test_secrets_reach_containers_from_the_environment_file_alone() -> None:
    """Each is a reference; none is on a command line, or an argument of a build."""
    used: dict[str, set[str]] = {}
    for name, service in COMPOSE["services"].items():
        for variable, value in service.get("environment", {}).items():
            if is_secret(variable, str(value)):  # whole, or the password of an address
                found = re.fullmatch(r"(?:\S+://\w+:)?\$\{(\w+):\?\}(?:@\S+)?", str(value))
                assert found, f"{name}: {variable}"
                used.setdefault(name, set()).add(found[1])
        rest = json.dumps({key: value for key, value in service.items() if key != "environment"})
        assert not re.findall(r"\$\{\w*(?:PASSWORD|KEY|TOKEN)", rest), name
    jobs = {"MLFLOW_TRAINER_PASSWORD", "RAY_AUTH_TOKEN", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert used["ray-head"] == used["ray-worker"] == jobs, "jobs are no administrators"
    assert used["mlflow"] >= {"MLFLOW_ADMIN_PASSWORD", "MLFLOW_TRAINER_PASSWORD"}


def test_no_secret_has_a_default() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert not re.findall(r"\$\{\w*(?:PASSWORD|_KEY|TOKEN):-", text)
    example = (DOCKER / ".env.example").read_text()
    assert re.findall(r"^\w*(?:PASSWORD|_KEY|TOKEN)=(.+)$", example, re.MULTILINE) == []


def test_ports_are_open_to_this_machine_alone() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_our_services_keep_no_privileges() -> None:
    for name, service in COMPOSE["services"].items():
        if name != "postgres":  # whose entry point changes its user
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name


def test_the_dashboard_shows_every_gauge() -> None:
    board = json.loads((DOCKER / "monitoring/dashboard.json").read_text())
    text = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    drawn = set(re.findall(r"ray_(lape_\w+)", text))
    names = {name for name, _ in GAUGES.values()} | {"lape_time_seconds"}
    assert drawn <= names
    assert names - drawn == {"lape_learning_rate"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_prometheus_asks_the_services_that_there_are() -> None:
    scrape = yaml.safe_load((DOCKER / "monitoring/prometheus.yaml").read_text())["scrape_configs"]
    names = [name for job in scrape for entry in job["dns_sd_configs"] for name in entry["names"]]
    assert set(names) == {name for name in COMPOSE["services"] if name.startswith("ray-")}
    ports = {str(entry["port"]) for job in scrape for entry in job["dns_sd_configs"]}
    for name in names:
        command = COMPOSE["services"][name]["command"]
        assert f"--metrics-export-port={ports.copy().pop()}" in " ".join(command)


SCRIPTS = [
    "docker/make-env",
    "docker/demo-job",
    "docker/mlflow-server",
    "docker/s3-server",
    "k8s/make-secrets",
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_parse(name: str) -> None:
    script = ROOT / name
    assert script.stat().st_mode & stat.S_IXUSR
    shell = script.read_text().splitlines()[0].removeprefix("#!")
    subprocess.run([shell, "-n", str(script)], check=True)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_a_lock_has_what_each_python_needs(lock: str, python: str) -> None:
    """Every package that the project asks for is pinned to an allowed version, under each Python and processor."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["ffcv"]
    if "dev" in lock:
        asked += [
            line for name in ("dev", "onnx", "tensorboard") for line in extras[name] if "[ffcv" not in line
        ]
    for machine in ("x86_64", "aarch64"):
        where = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
        pinned = {}
        for line in re.findall(r"^[a-z0-9].*", (ROOT / lock).read_text(), re.MULTILINE):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(where):
                assert pin.name not in pinned
                pinned[pin.name] = str(pin.specifier).removeprefix("==")
        for line in asked:
            need = Requirement(line)
            assert need.specifier.contains(pinned[canonicalize_name(need.name)]), line
