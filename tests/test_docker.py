"""docker/: what can be known of images and stack without building them; `make test-images` builds and runs them."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lape_ray.gauges import GAUGES

ROOT = Path(__file__).parent.parent
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
    assert 'requires-python = ">=3.11,<3.12"' in project
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
    assert len(set(secrets)) == len(secrets) == 6
    assert min(map(len, secrets)) >= 24
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    again = subprocess.run(
        [str(DOCKER / "make-env"), str(target)], check=True, capture_output=True, text=True
    )
    assert again.stdout == ""


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
    names = {name for name, _ in GAUGES.values()}
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
