"""A stand-in for the Hugging Face hub: the part of its HTTP API that downloads and uploads of models use."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from lape_ray.storage import hub

TOKEN = "hf_token-that-may-do-all"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """Repositories by their names, large objects by their sha256, and what was asked: method, path, token."""

    uri: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path, token))
        for method, pattern, call in _ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                parts = match.groupdict()
                name = parts.pop("repo", None)
                repo = self.hub.repos.get(name or "")
                if name and (repo is None or (repo.private and token != TOKEN)):
                    return self.answer(
                        401, {"error": "no"}, X_Error_Code="RepoNotFound", X_Error_Message="no"
                    )
                if self.command in ("POST", "PUT") and token != TOKEN and "upload" not in path:
                    return self.answer(403, {"error": "read only"})
                return call(self, body, repo, **parts)
        return self.answer(404, {"error": f"the stand-in does not know {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def info(self, _: bytes, repo: Repo, revision: str | None = None, **__: str) -> None:
        if revision not in (None, "main", repo.commit):
            return self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound", X_Error_Message="no")
        name = next(name for name, one in self.hub.repos.items() if one is repo)
        siblings = [{"rfilename": file} for file in repo.files]
        return self.answer(
            200, {"id": name, "sha": repo.commit, "private": repo.private, "siblings": siblings}
        )

    def tree(self, _: bytes, repo: Repo, **__: str) -> None:
        self.answer(200, [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in repo.files.items()
        ])  # fmt: skip

    def resolve(self, _: bytes, repo: Repo, file: str = "", **__: str) -> None:
        if repo.gated:
            return self.answer(403, {"error": "no"}, X_Error_Code="GatedRepo", X_Error_Message="no")
        if (content := repo.files.get(file)) is None:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(200, content, ETag=etag, X_Repo_Commit=repo.commit)

    def create(self, body: bytes, _: None) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repos
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos.setdefault(name, Repo(private=private))
        self.answer(409 if known else 200, {"url": f"{self.hub.uri}/{name}", "name": name})

    def preupload(self, body: bytes, _: Repo, **__: str) -> None:
        files = [
            {"path": one["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
            for one in json.loads(body)["files"]
        ]  # fmt: skip
        self.answer(200, {"files": files})

    def batch(self, body: bytes, _: Repo, **__: str) -> None:
        objects = [
            one | {"actions": {"upload": {"href": f"{self.hub.uri}/upload/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, _: None, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer(200, b"")

    def commit(self, body: bytes, repo: Repo, **__: str) -> None:
        name = next(name for name, one in self.hub.repos.items() if one is repo)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
        self.answer(
            200, {"commitUrl": f"{self.hub.uri}/{name}/commit/{repo.commit}", "commitOid": repo.commit}
        )

    def validate(self, _: bytes, __: None) -> None:
        self.answer(200, {"warnings": [], "errors": []})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/.+", _Handler.tree),
    ("GET HEAD", rf"/{_REPO}/resolve/[^/]+/(?P<file>.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_REPO}/preupload/.+", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/upload/(?P<oid>.+)", _Handler.upload),
    ("POST", rf"/api/models/{_REPO}/commit/.+", _Handler.commit),
    ("POST", "/api/validate-yaml", _Handler.validate),
)


@contextlib.contextmanager
def stand_in(cache: Path) -> Iterator[Hub]:
    """A hub that this process uses until the block ends, with copies in `cache` and no token."""
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": made}))
    made.uri = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # which the package reads in the environment when it is imported
        patch.setattr(constants, "ENDPOINT", made.uri)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.uri + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        hub._fetch.cache_clear()
        try:
            yield made
        finally:
            server.shutdown()
            server.server_close()
