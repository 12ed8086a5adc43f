"""Where a run could leave a secret of its user: all of it is searched, while the demo trains and after it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lape_ray.cluster.local import LocalCluster, local_cluster

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.timeout(600), pytest.mark.cluster, pytest.mark.slow]
ADDRESS = "https://ann:{}@127.0.0.1:9/"
# A user's variables, each with a secret that stands nowhere else.
PLANTED = {
    name: form.format(f"planted-{secrets.token_hex(8)}")
    for name, form in {
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), "{}"),
        **dict.fromkeys(("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"), "{}"),
        **dict.fromkeys(("PGPASSWORD", "HF_TOKEN", "OPENAI_API_KEY", "MLFLOW_FLASK_SERVER_SECRET_KEY"), "{}"),
        **dict.fromkeys(
            ("http_proxy", "https_proxy", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_GATEWAY_URI"), ADDRESS
        ),
    }.items()
}
SECRETS = {name: re.findall("planted-[0-9a-f]+", value)[0].encode() for name, value in PLANTED.items()}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the planted proxy is not there
PAGES = (
    "/api/jobs/", "/api/v0/actors?detail=true", "/api/v0/runtime_envs?detail=true", "/api/v0/workers?detail=true",
    "/api/v0/tasks?detail=true", "/nodes?view=summary", "/api/train/v2/runs/v1",
)  # fmt: skip


@dataclass
class Traces:
    """What the demo could be seen by, and what it left."""

    command_lines: set[bytes] = field(default_factory=set)
    environments: dict[bytes, bytes] = field(default_factory=dict)
    """Of the processes of Ray and of the job, by their command lines."""
    pages: dict[str, bytes] = field(default_factory=dict)
    """The longest answer of each page of Ray's dashboard."""
    files: dict[str, bytes] = field(default_factory=dict)
    output: bytes = b""
    token: bytes = b""

    def look_at_processes(self) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # which has ended
                words = (process / "cmdline").read_bytes()
                self.command_lines.add(words)
                if b"jobs/imagenet_deit.py" in words or words.startswith(b"ray::"):
                    self.environments[words] = (process / "environ").read_bytes()

    def look_at_the_dashboard(self, cluster: LocalCluster) -> None:
        header = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
        for page in PAGES:
            request = urllib.request.Request(cluster.dashboard + page, headers=header)
            with contextlib.suppress(urllib.error.URLError, TimeoutError):
                answer = DIRECT.open(request, timeout=10).read()
                self.pages[page] = max(self.pages.get(page, b""), answer, key=len)

    def keep_files(self, folder: Path) -> None:
        self.files |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def places(self) -> Iterator[tuple[str, bytes]]:
        yield from self.files.items()
        yield from self.pages.items()
        yield "the output", self.output
        yield from (("the process list", words) for words in self.command_lines)


def load_demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "jobs/demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def traces(
    tmp_path_factory: pytest.TempPathFactory, capfd_of_module: pytest.CaptureFixture[bytes]
) -> Iterator[Traces]:
    """`make demo`, of one epoch, in an environment full of secrets."""
    home, seen, demo, over = tmp_path_factory.mktemp("home"), Traces(), load_demo(), threading.Event()

    @contextlib.contextmanager
    def watched(**options: Any) -> Iterator[LocalCluster]:
        with local_cluster(**options) as cluster:
            seen.token = cluster.environment["RAY_AUTH_TOKEN"].encode()

            def watch() -> None:
                while not over.wait(0.5):
                    seen.look_at_processes()
                    seen.look_at_the_dashboard(cluster)

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                yield cluster
            finally:
                over.set()
                watcher.join()
            words = Path(f"/proc/{cluster.pid}/cmdline").read_bytes().decode()
            found = re.search(r"--temp-dir=([^\0]+)", words)
            assert found
            seen.keep_files(Path(found[1]))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "no_proxy", "NO_PROXY"):
            patch.delenv(name, raising=False)
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        patch.setattr("lape_ray.cluster.demo.local_cluster", watched)
        options = ["--optim.epochs=1", "--optim.warmup_epochs=0", "--run.wait_s=120"]
        patch.setattr(sys, "argv", ["jobs/demo.py", f"--home={home}", *options])
        code = demo.main()
    captured = capfd_of_module.readouterr()
    seen.output = captured.out + captured.err
    assert code == 0, seen.output.decode()[-3000:]
    seen.keep_files(home)
    yield seen


@pytest.fixture(scope="module")
def capfd_of_module(request: pytest.FixtureRequest) -> Iterator[pytest.CaptureFixture[bytes]]:
    """`capfdbinary`, for a whole module."""
    from _pytest.capture import CaptureFixture, FDCaptureBinary

    manager = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        fixture: CaptureFixture[bytes] = CaptureFixture(FDCaptureBinary, request, _ispytest=True)
        fixture._start()
        yield fixture
        fixture.close()


def test_the_search_looks_where_things_are(traces: Traces) -> None:
    """Each place holds what a run leaves there; and the processes have the secrets, which only their owner can read."""
    names = " ".join(traces.files)
    for file in (
        "raylet.out",
        "runtime_env_agent.log",
        "job-driver",
        "mlflow.db",
        "run.json",
        "meta.json",
        "config.txt",
    ):
        assert file in names, file
    assert b"jobs/imagenet_deit.py" in traces.pages["/api/jobs/"]
    assert b"RayTrainWorker" in traces.pages["/api/v0/actors?detail=true"]
    assert b"LAPE_RAY_HOME" in traces.pages["/api/v0/runtime_envs?detail=true"]
    assert set(traces.pages) == set(PAGES)
    assert b"best checkpoint" in traces.output
    assert any(b"jobs/imagenet_deit.py" in words for words in traces.command_lines)
    for kind in (b"jobs/imagenet_deit.py", b"RayTrainWorker"):
        held = b"".join(text for words, text in traces.environments.items() if kind in words)
        assert all(secret in held for secret in SECRETS.values()), kind


@pytest.mark.parametrize("name", SECRETS)
def test_no_secret_is_left_anywhere(traces: Traces, name: str) -> None:
    assert [place for place, content in traces.places() if SECRETS[name] in content] == []


def test_rays_token_is_left_nowhere(traces: Traces) -> None:
    assert [place for place, content in traces.places() if traces.token in content] == []


def test_a_password_in_the_servers_address_ends_the_job_in_one_line(tmp_path: Path) -> None:
    secret = f"planted-{secrets.token_hex(8)}"
    variables = {"MLFLOW_TRACKING_URI": ADDRESS.format(secret), "LAPE_RAY_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "jobs/imagenet_deit.py"), "smoke"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **variables}, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "error: MLFLOW_TRACKING_URI='https://127.0.0.1:9/' was given with a password" in done.stderr
    assert secret not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


LOCAL = """
    import json, os, pathlib, subprocess, urllib.error, urllib.request
    import ray
    from lape_ray.cluster.connection import connected
    from lape_ray.cluster.local import executable

    def status(**headers):
        request = urllib.request.Request(f"http://{node['webui_url']}/api/jobs/", headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=30).status
        except urllib.error.HTTPError as error:
            return error.code

    before = dict(os.environ)
    with connected(show_logs=False):
        node = ray._private.worker._global_node.address_info
        token = os.environ["RAY_AUTH_TOKEN"]
        found = {"no token": status(), "token": status(Authorization=f"Bearer {token}"),
                 "wrong token": status(Authorization="Bearer wrong"), "fixed": token}
        stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        command = [executable("ray"), "status", "--address", node["gcs_address"]]
        found["stranger"] = subprocess.run(command, env=stranger, capture_output=True).returncode
        found["friend"] = subprocess.run(command, capture_output=True).returncode
        found["task"] = ray.get(ray.remote(lambda: 7).remote())
        files = [f for f in pathlib.Path(node["session_dir"]).rglob("*") if f.is_file()]
        found["files with it"] = [str(f) for f in files if token.encode() in f.read_bytes()]
        found["files"] = len(files)
    found["left"] = os.environ.get("RAY_AUTH_TOKEN") != before.get("RAY_AUTH_TOKEN")
    print("found:" + json.dumps(found))
"""


def run_local(home: Path, **variables: str) -> dict[str, Any]:
    """What a process sees of the Ray that it starts for itself."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", textwrap.dedent(LOCAL)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "found:" in done.stdout, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.rpartition("found:")[2])
    return found


@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": "x" * 40}], ids=str)
def test_a_local_ray_asks_for_a_token_that_is_in_no_file(variables: dict[str, str], tmp_path: Path) -> None:
    found = run_local(tmp_path, **variables)
    assert (found["no token"], found["wrong token"], found["token"]) == (401, 403, 200)
    assert found["stranger"] != 0
    assert (found["friend"], found["task"]) == (0, 7)
    assert found["files"] > 10
    assert found["files with it"] == []
    assert not found["left"]
    assert list(tmp_path.rglob("*auth*")) == [], "Ray would write ~/.ray/auth_token for all to read"
    assert (found["fixed"] == "x" * 40) == ("RAY_AUTH_TOKEN" in variables), "the user's own is used"
