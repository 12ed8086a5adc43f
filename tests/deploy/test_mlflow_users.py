"""The two users of the MLflow server: docker/mlflow-server is run as its image runs it, over sqlite."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException

from lape_ray import tracking
from lape_ray.cluster.local import free_ports
from lape_ray.config import TrackingConfig, replace_fields
from lape_ray.recipes import recipe

SCRIPT = Path(__file__).parent.parent.parent / "docker/mlflow-server"
ADMIN, TRAINER = ("admin", "password-of-the-admin"), ("trainer", "password-of-the-trainer")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def environment(home: Path, **changes: str) -> dict[str, str]:
    """What the container of the server has."""
    variables = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home}/runs.db",
        "MLFLOW_AUTH_DATABASE_URI": f"sqlite:///{home}/users.db",
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN[0],
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
        "MLFLOW_TRACKING_USERNAME": TRAINER[0],
        "MLFLOW_TRACKING_PASSWORD": TRAINER[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "key-of-the-sessions",
        "MLFLOW_ARTIFACTS_DESTINATION": f"{home}/artifacts",
        "MLFLOW_METRICS_DIRECTORY": f"{home}/metrics",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_WORKERS": "1",
        "TMPDIR": str(home),
    }
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, **variables, **changes}


def migrate(home: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(SCRIPT), "migrate"]
    return subprocess.run(command, capture_output=True, text=True, env=environment(home, **changes), cwd=home)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Databases that were migrated twice, as at every deployment; the jobs' password changed in between."""
    folder = tmp_path_factory.mktemp("server")
    first = migrate(folder, MLFLOW_TRACKING_PASSWORD="password-of-yesterday")
    assert first.returncode == 0, first.stderr
    assert "made the user trainer" in first.stdout
    second = migrate(folder)
    assert second.returncode == 0, second.stderr
    assert second.stdout == ""
    return folder


@pytest.fixture(scope="module")
def uri(home: Path) -> Iterator[str]:
    port = free_ports(1)[0]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", str(SCRIPT)], stdout=log, stderr=log, cwd=home, start_new_session=True,
            env=environment(home, MLFLOW_PORT=str(port)),
        )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-2000:]
            time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except urllib.error.URLError:
        return False


@pytest.fixture
def login(uri: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, str]], mlflow.MlflowClient]:
    """Become a user, by the variables that a job has."""

    def become(user: tuple[str, str]) -> mlflow.MlflowClient:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])
        return mlflow.MlflowClient(uri)

    return become


def test_the_jobs_user_writes_and_does_not_delete_what_is_others(
    login: Callable[[tuple[str, str]], mlflow.MlflowClient], uri: str, tmp_path: Path
) -> None:
    """In an experiment that the administrator made, which older jobs did, and in one of its own."""
    admin = login(ADMIN)
    theirs = admin.create_experiment("lape_ray")
    admin.create_registered_model("theirs")
    trainer = login(TRAINER)
    tracking.check_reachable(uri)
    for experiment in ("lape_ray", "new"):
        config = replace_fields(recipe("smoke"), {"tracking.experiment": experiment})
        data = {"train": ("/data/train.beton", "ab" * 32)}
        run_id = tracking.create_run(
            config, name="one", command="python x", tags={"seed": "0"}, datasets=data
        )
        tracker = tracking.open_tracker(TrackingConfig(), uri, run_id, str(tmp_path / "run"))
        tracker.metrics({"train/loss": 1.5}, step=1)
        tracker.close()
        assert not (tmp_path / "run").exists(), "nothing is left to send"
        (tmp_path / "page.html").write_text("page")
        tracking.log_files(uri, run_id, tmp_path, "summary")
        assert tracking.finish_run(uri, run_id, "FINISHED")
        assert tracking.reopen_run(uri, run_id)
        assert tracking.read_run(uri, run_id, ["train/loss"]).history == {"train/loss": [(1, 1.5)]}
        assert [file.path for file in trainer.list_artifacts(run_id, "summary")] == ["summary/page.html"]
    trainer.create_registered_model("ours")
    for model in ("ours", "theirs"):
        trainer.create_model_version(model, f"runs:/{run_id}/summary", run_id)
    for forbidden in (
        lambda: trainer.delete_experiment(theirs),
        lambda: trainer.delete_registered_model("theirs"),
        lambda: trainer.delete_run(next(iter(trainer.search_runs([theirs]))).info.run_id),
    ):
        with pytest.raises(MlflowException, match="403"):
            forbidden()


class Proxy(BaseHTTPRequestHandler):
    """Hands what is asked below /mlflow/ to the server at `port`, without that beginning; knows no other path."""

    port: int

    def log_message(self, *_: object) -> None:
        pass

    def forward(self) -> None:
        if not self.path.startswith("/mlflow/") or "//" in self.path.partition("?")[0]:
            self.send_error(404, "not below /mlflow/")
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(self.command, self.path.removeprefix("/mlflow"), body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        connection.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = forward


@pytest.fixture
def proxy(uri: str) -> Iterator[str]:
    """The server behind a path of another one, as at http://HOST/mlflow."""
    handler = type("Handler", (Proxy,), {"port": int(uri.rpartition(":")[2])})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/mlflow"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("end", ["", "/"])
def test_a_server_behind_a_path_takes_a_whole_run(
    login: Callable[[tuple[str, str]], mlflow.MlflowClient], proxy: str, end: str, tmp_path: Path
) -> None:
    """Parameters, metrics, pages, the model and its place in the list; and its page's address has the path."""
    login(TRAINER)
    address = proxy + end
    tracking.check_reachable(address)
    config = replace_fields(recipe("smoke"), {"tracking.experiment": "path", "tracking.uri": address})
    data = {"val": ("/data/val.beton", "cd" * 32)}
    run_id = tracking.create_run(config, name="one", command="python x", tags={"seed": "0"}, datasets=data)
    tracker = tracking.open_tracker(TrackingConfig(), address, run_id, str(tmp_path / "run"))
    tracker.metrics({"train/loss": 1.5}, step=1)
    tracker.close()
    assert tracking.read_run(address, run_id, ["train/loss"]).history == {"train/loss": [(1, 1.5)]}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("model.safetensors", "meta.json"):
        (folder / name).write_text(name)
    facts = {"checkpoint": str(folder), "variant": "deit_tiny"}
    assert tracking.log_model(address, run_id, folder, {"val/acc1": 71.5}, facts)
    experiment = mlflow.MlflowClient(address).get_run(run_id).info.experiment_id
    models = mlflow.MlflowClient(address).search_logged_models([experiment], f"source_run_id = '{run_id}'")
    assert [(one.tags["checkpoint"], one.metrics[0].value) for one in models] == [(str(folder), 71.5)]
    back = tracking.download_model(address, run_id, tmp_path / "back")
    assert (back / "model.safetensors").read_text() == "model.safetensors"
    tracking.log_files(address, run_id, folder, "summary")
    assert tracking.finish_run(address, run_id, "FINISHED")
    assert tracking.run_page(address, run_id).startswith(f"{proxy}/#/experiments/{experiment}/runs/{run_id}?")


USERS = [
    ("POST", "2.0/mlflow/users/create", {"username": "other", "password": "password-of-another"}),
    ("PATCH", "2.0/mlflow/users/update-admin", {"username": "trainer", "is_admin": True}),
    ("PATCH", "2.0/mlflow/users/update-password", {"username": "admin", "password": "password-of-mine"}),
    ("DELETE", "2.0/mlflow/users/delete", {"username": "admin"}),
    (
        "POST",
        "3.0/mlflow/users/permissions/grant",
        {"username": "trainer", "resource_type": "experiment", "resource_id": "0", "permission": "MANAGE"},
    ),
]


@pytest.mark.parametrize(("method", "path", "body"), USERS, ids=[path for _, path, _ in USERS])
def test_the_jobs_user_makes_no_users_and_no_rights(
    uri: str, method: str, path: str, body: dict[str, object]
) -> None:
    assert requests.request(method, f"{uri}/api/{path}", json=body, auth=TRAINER).status_code == 403


@pytest.mark.parametrize(
    "user",
    [None, ("trainer", "password-of-yesterday"), ("admin", TRAINER[1])],
    ids=["nobody", "old", "mixed"],
)
def test_others_are_not_let_in(uri: str, user: tuple[str, str] | None) -> None:
    address = f"{uri}/api/2.0/mlflow/experiments/search?max_results=1"
    assert requests.get(address, auth=user).status_code == 401
    assert requests.get(address, auth=TRAINER).status_code == 200


def test_no_password_is_on_a_command_line_or_in_the_log(uri: str, home: Path) -> None:
    shown = b"".join(
        file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.parent.exists()
    )
    assert b"basic-auth" in shown
    for secret in (ADMIN[1], TRAINER[1], "key-of-the-sessions"):
        assert secret.encode() not in shown + (home / "log").read_bytes()


def test_the_administrator_is_no_user_of_jobs(home: Path) -> None:
    done = migrate(home, MLFLOW_TRACKING_USERNAME="admin")
    assert done.returncode != 0
    assert "'admin' is an administrator; give jobs another user in MLFLOW_TRACKING_USERNAME" in done.stderr
    done = migrate(home, MLFLOW_TRACKING_PASSWORD="")
    assert done.returncode == 2
    assert "MLFLOW_TRACKING_PASSWORD is not set" in done.stderr
