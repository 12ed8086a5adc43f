"""The compose stack under podman-compose, and ways to look into it. See run.py."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from helpers.browser import chromium, photograph
from images import IMAGES, ROOT

PROJECT = "lape-images-test"


class Stack:
    """Project, secrets, and addresses of the running stack."""

    # Run inside the head, which can reach every node; prints the page, or the code by which it is refused.
    SCRAPE = (
        "import os, sys, socket, urllib.request as u, urllib.error as e\n"
        "from urllib.parse import urlsplit\n"
        "url = urlsplit(sys.argv[1])\n"
        "for a in sorted({i[4][0] for i in socket.getaddrinfo(url.hostname, url.port)}):\n"
        "    r = u.Request(f'http://{a}:{url.port}{url.path}')\n"
        "    if sys.argv[2] == 'token': r.add_header('Authorization', 'Bearer ' + os.environ['RAY_AUTH_TOKEN'])\n"
        "    try: print(u.urlopen(r, timeout=10).read().decode())\n"
        "    except e.HTTPError as error: print(error.code)\n"
    )

    def __init__(self, work: Path, *, fresh: bool) -> None:
        self.work = work
        self.environment = work / "stack.env"
        if fresh:
            self.environment.unlink(missing_ok=True)
        subprocess.run([str(ROOT / "docker/make-env"), str(self.environment)], check=True)
        values = dict(
            line.split("=", 1)
            for line in self.environment.read_text().splitlines()
            if "=" in line and line[0] != "#"
        )
        values |= {"MLFLOW_PORT": "15000", "RAY_PORT": "18265"}
        values |= {f"{name.upper()}_IMAGE": tag for name, (tag, _) in IMAGES.items()}
        self.environment.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        self.secrets = {k: v for k, v in values.items() if k.endswith(("PASSWORD", "KEY", "TOKEN"))}
        self.mlflow, self.ray = "http://127.0.0.1:15000", "http://127.0.0.1:18265"
        self.token = {"Authorization": f"Bearer {values['RAY_AUTH_TOKEN']}"}
        self.user, self.password = values["MLFLOW_ADMIN_USERNAME"], values["MLFLOW_ADMIN_PASSWORD"]
        self.admin = self.basic(self.user, self.password)
        self.trainer = self.basic(values["MLFLOW_TRAINER_USERNAME"], values["MLFLOW_TRAINER_PASSWORD"])
        self.compose = [str(Path(sys.executable).with_name("podman-compose")), "-p", PROJECT]
        self.compose += ["--env-file", str(self.environment), "-f", str(ROOT / "docker/compose.yaml")]

    # --- the stack ---

    def run(self, command: Sequence[str], *, ok: bool = True, timeout_s: float = 1800) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
        if ok and done.returncode:
            raise RuntimeError(
                f"{' '.join(command[:6])} ... ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
            )
        return done.stdout

    def up(self, *, fresh: bool) -> None:
        began = time.monotonic()
        if fresh:
            self.down()
            self.run([*self.compose, "up", "-d", "--no-build"])
        self._wait(lambda: self.status(f"{self.mlflow}/health") == 200, "MLflow", 900)
        self._wait(lambda: self.status(f"{self.ray}/api/jobs/", self.token) == 200, "Ray", 900)
        print(f"stack is up: {time.monotonic() - began:.0f} s", flush=True)

    def down(self) -> None:
        subprocess.run([*self.compose, "down", "-v", "-t", "10"], capture_output=True)

    def containers(self) -> list[str]:
        return self.run(
            [
                "podman",
                "ps",
                "-a",
                "--filter",
                f"label=io.podman.compose.project={PROJECT}",
                "--format",
                "{{.Names}}",
            ]
        ).split()

    def save_logs(self) -> None:
        for name in self.containers():
            done = subprocess.run(["podman", "logs", name], capture_output=True)
            (self.work / f"log-{name}.txt").write_bytes(done.stdout + done.stderr)

    def execute(self, service: str, command: Sequence[str]) -> str:
        return self.run(["podman", "exec", self._container(service), *command])

    def _container(self, service: str) -> str:
        return next(name for name in self.containers() if f"_{service}_" in name)

    def _wait(self, ready: object, what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():  # type: ignore[operator]
            if time.monotonic() > deadline:
                self.save_logs()
                raise SystemExit(f"{what} was not ready after {timeout_s:g} s; logs are in {self.work}")
            time.sleep(1)

    # --- requests ---

    @staticmethod
    def basic(user: str, password: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}

    def status(self, url: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> int:
        request = urllib.request.Request(
            url, headers=dict(headers or {}), method=method, data=b"{}" if method == "POST" else None
        )
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_for_nodes(self, count: int) -> int:
        code = "import ray; ray.init(logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
        found = [0]

        def enough() -> bool:
            with contextlib.suppress(RuntimeError, ValueError):
                found[0] = int(self.execute("ray-head", ["python", "-c", code]).split()[-1])
            return found[0] == count

        self._wait(enough, f"a cluster of {count} nodes", 600)
        return found[0]

    def mlflow_run(self, name: str = "stack-demo") -> dict[str, dict[str, object]]:
        query = {"experiment_ids": self._experiments(), "filter": f"attributes.run_name = '{name}'"}
        return self._post("runs/search", query)["runs"][0]

    def _experiments(self) -> list[str]:
        found = self._post("experiments/search", {"max_results": 100})["experiments"]
        return [one["experiment_id"] for one in found]

    def _post(self, path: str, body: object) -> dict:
        headers = {**self.admin, "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.mlflow}/api/2.0/mlflow/{path}", json.dumps(body).encode(), headers
        )
        return json.load(urllib.request.urlopen(request, timeout=30))

    # --- jobs ---

    def _demo(self, *words: str) -> tuple[list[str], dict[str, str]]:
        environment = {**os.environ, "COMPOSE": " ".join(self.compose)}
        return [str(ROOT / "docker/demo-job"), *words], environment

    def submit_demo(self, *words: str, ok: bool = True) -> str:
        command, environment = self._demo(*words)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
        name = "demo" if ok else "demo-refused"
        (self.work / f"log-{name}.txt").write_text(done.stdout + done.stderr)
        if ok and done.returncode:
            raise RuntimeError(f"the demo failed: {(done.stdout + done.stderr)[-2500:]}")
        return done.stdout + done.stderr

    def log(self, name: str) -> str:
        return (self.work / f"log-{name}.txt").read_text()

    @contextlib.contextmanager
    def demo_in_background(self, *words: str) -> Iterator[None]:
        command, environment = self._demo(*words)
        with (self.work / "log-watched.txt").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            try:
                yield
            finally:
                process.wait(3000)

    def scrape_until(self, patterns: Sequence[str], timeout_s: float) -> None:
        """Read the metrics of both worker nodes, until each pattern is found in them."""

        def found() -> bool:
            address = "http://ray-worker:8080/metrics"
            page = self.execute("ray-head", ["python", "-c", self.SCRAPE, address, "token"])
            return all(re.search(pattern, page) for pattern in patterns)

        self._wait(found, "metrics", timeout_s)

    def staged_copies(self) -> dict[str, list[str]]:
        """Return the complete copies of data from S3 in each worker's container, by its name."""
        code = "from lape_ray import storage; print(*storage.cache().glob('*/.complete'))"
        workers = [name for name in self.containers() if "_ray-worker_" in name]
        return {name: self.run(["podman", "exec", name, "python", "-c", code]).split() for name in workers}

    # --- looking ---

    def picture(self, name: str, page: str, words: Sequence[str]) -> None:
        """What a browser shows of a page of MLflow, in which these words must stand."""
        target = self.work / name
        target.unlink(missing_ok=True)
        with logged_in(self.mlflow, self.admin) as door, chromium(self.work / "chromium", 19222) as browser:
            asyncio.run(photograph(browser, f"{door}/{page}", target, words, timeout_s=300))

    def places_where_secrets_could_be(self) -> dict[str, str]:
        places = {}
        for name in self.containers():
            done = subprocess.run(["podman", "logs", name], capture_output=True, text=True, errors="replace")
            places[f"the log of {name}"] = done.stdout + done.stderr
            if "_ray-" in name:
                logs = [
                    "podman",
                    "exec",
                    name,
                    "bash",
                    "-c",
                    "find /tmp/ray -type f -path '*logs*' -exec cat {} +",
                ]
                places[f"Ray's logs in {name}"] = subprocess.run(
                    logs, capture_output=True, text=True, errors="replace"
                ).stdout
        for log in self.work.glob("log-*demo*.txt"):
            places[str(log)] = log.read_text(errors="replace")
        for name, (tag, _) in IMAGES.items():
            for verb in (["history", "--no-trunc"], ["image", "inspect"]):
                places[f"{verb[0]} of image {name}"] = self.run(["podman", *verb, tag])
        places["MLflow's runs"] = json.dumps(
            self._post("runs/search", {"experiment_ids": self._experiments()})
        )
        dump = ["pg_dump", "-U", "mlflow", "-d", "mlflow"]
        places["MLflow's database"] = self.execute("postgres", dump)
        return places


@contextlib.contextmanager
def logged_in(server: str, headers: Mapping[str, str]) -> Iterator[str]:
    """The address of a proxy that adds a password: pages of an address which holds one may not fetch anything."""

    class Door(http.server.BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            kept = {key: self.headers[key] for key in ("Content-Type", "Accept") if key in self.headers}
            request = urllib.request.Request(
                server + self.path, body, {**kept, **headers}, method=self.command
            )
            try:
                answer = urllib.request.urlopen(request, timeout=120)
            except urllib.error.HTTPError as error:
                answer = error
            content = answer.read()
            self.send_response(answer.status)
            for key in ("Content-Type", "Cache-Control"):
                if key in answer.headers:
                    self.send_header(key, answer.headers[key])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = pass_on

        def log_message(self, *_: object) -> None: ...

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()
