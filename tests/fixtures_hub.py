"""A Hub of our own on 127.0.0.1: a real HTTP server that speaks as much of the Hub's protocol as its client asks for.

It takes uploads (whoami, create, branch, validate-yaml, preupload, LFS batch with PUT and verify, commit), and gives
back what was pushed (info, tree, resolve). It keeps all that it was sent, and fails where a test wants it to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from finetune_kit.system.network import hub_reachable

TOKEN = "hf_CanaryCanaryCanaryCanary12345678"
USER = "ada"
LFS = (".safetensors", ".parquet")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches: a status, "cut" or "slow"."""

    where: str
    what: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        oid = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid


@dataclass
class Hub:
    """The server's state. `requests`: (method, path, the other headers, body) of all it was sent."""

    repos: dict[str, Repo] = field(default_factory=dict)  # "ada/name"; a data set's key begins with "datasets/"
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str, bytes]] = field(default_factory=list)
    who: dict[str, Any] = field(
        default_factory=lambda: {
            "type": "user",
            "name": USER,
            "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}],
            "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
        }
    )
    endpoint: str = ""

    def add(self, name: str, folder: Path | dict[str, bytes], **state: bool) -> Repo:
        """A repository that is there already."""
        files = folder if isinstance(folder, dict) else {path.name: path.read_bytes() for path in folder.iterdir()}
        repo = self.repos[name] = Repo(**state)
        repo.commit(files)
        return repo

    def fail(self, where: str, what: int | str, times: int = 1, **headers: str) -> None:
        self.faults.append(Fault(where, what, times, {key.replace("_", "-"): it for key, it in headers.items()}))

    def asked(self, where: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(where, f"{method} {path}")) for method, path, _, _ in self.requests)

    def received(self) -> bytes:
        """All that came in, but the Authorization headers; base64 undone."""
        whole = b""
        for method, path, headers, body in self.requests:
            whole += f"{method} {path}\n{headers}\n".encode() + body
            for word in re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"', body):
                with contextlib.suppress(ValueError):
                    whole += base64.b64decode(word)
        return whole


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing: a test's output is its own."""

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        others = "\n".join(f"{key}: {it}" for key, it in self.headers.items() if key.lower() != "authorization")
        self.hub.requests.append((self.command, self.path, others, self.body))
        fault = next((f for f in self.hub.faults if f.times and re.search(f.where, f"{self.command} {path}")), None)
        if fault:
            fault.times -= 1
            if fault.what == "cut":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault.what == "slow":
                time.sleep(0.5)
            else:  # a careless server that repeats what it was sent
                said = {"error": f"fault {fault.what} for {self.headers.get('Authorization')}"}
                self.answer(int(fault.what), said, **fault.headers)
                return
        self.route(path)

    def answer(self, status: int, content: Any = None, raw: bytes | None = None, **headers: str) -> None:
        body = json.dumps(content).encode() if raw is None else raw
        self.send_response(status)
        for key, it in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), it)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def route(self, path: str) -> None:
        writes = path.startswith("/api/") and self.command != "GET" and path != "/api/validate-yaml"
        if (writes or path == "/api/whoami-v2") and not self.known and "paths-info" not in path:
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/whoami-v2":
            self.answer(200, self.hub.who)
        elif path == "/api/repos/create":
            self.create(self.json())
        elif path == "/api/validate-yaml":
            self.validate(self.json()["content"])
        elif path.startswith("/lfs/"):
            self.hub.objects[path.removeprefix("/lfs/")] = self.body
            self.answer(200, {})
        elif path == "/verify":
            there = self.hub.objects.get(self.json()["oid"])
            self.answer(200 if there is not None and len(there) == self.json()["size"] else 404, {})
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self.batch(self.json())
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            kind, name, what, revision, rest = match.groups()
            prefix = "datasets/" if kind == "datasets" else ""
            self.api(prefix + name, what or "revision", revision or "main", rest or "")
        else:
            self.answer(404, {"error": "no such page"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"})
            return
        self.hub.add(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        self.answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def validate(self, content: str) -> None:
        try:
            metadata = yaml.safe_load(content.split("---\n")[1])
            wrong = [] if isinstance(metadata["tags"], list) and isinstance(metadata["license"], str) else ["metadata"]
        except (yaml.YAMLError, IndexError, KeyError, TypeError) as error:
            wrong = [str(error)]
        self.answer(400 if wrong else 200, {"errors": [{"message": it} for it in wrong], "warnings": []})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for it in asked["objects"]:
            urls = {
                "upload": {"href": f"{self.hub.endpoint}/lfs/{it['oid']}"},
                "verify": {"href": f"{self.hub.endpoint}/verify"},
            }
            objects.append({**it, **({} if it["oid"] in self.hub.objects else {"actions": urls})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def readable(self, name: str) -> Repo | None:
        """The repository, or None after the refusal that the Hub gives."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.known):
            status = 404 if self.known else 401  # the real one hides what there is from strangers
            self.answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repo

    def api(self, name: str, what: str, revision: str, rest: str) -> None:
        repo = self.readable(name)
        if repo is None:
            return
        if what == "branch":
            repo.branches.setdefault(revision, repo.branches["main"])
            self.answer(200, {})
        elif revision not in repo.branches and revision not in repo.commits:
            self.answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        elif what == "revision":
            listed = [{"rfilename": path} for path in repo.files(revision)]
            sha = repo.branches.get(revision, revision)
            about = {"private": repo.private, "gated": repo.gated and "auto", "tags": [], "siblings": listed}
            self.answer(200, {"id": name.removeprefix("datasets/"), "sha": sha, **about})
        elif what == "tree":
            files = {path: it for path, it in repo.files(revision).items() if path.startswith(rest)}
            self.answer(200, [entry(path, it) for path, it in files.items()])
        elif what == "paths-info":
            paths = self.json()["paths"] if self.body[:1] == b"{" else []
            self.answer(200, [entry(path, it) for path, it in repo.files(revision).items() if path in paths])
        elif what == "preupload":
            there = repo.files(revision)
            self.answer(200, {"files": [upload_mode(it["path"], there) for it in self.json()["files"]]})
        elif what == "commit":
            self.commit(name, repo, revision)
        else:
            self.answer(404, {"error": "no such page"})

    def commit(self, name: str, repo: Repo, branch: str) -> None:
        files, summary = dict(repo.files(branch)), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files, branch, summary)
        self.answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.readable(name)
        if repo is None:
            return
        if repo.gated:
            self.answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
            return
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            self.answer(404, {}, X_Error_Code="RevisionNotFound")
        elif path not in repo.commits[sha]:
            self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        else:
            content = repo.commits[sha][path]
            self.answer(200, raw=content, X_Repo_Commit=sha, ETag=f'"{oid_of(path, content)}"')


def oid_of(path: str, content: bytes) -> str:
    """As the client reckons it: SHA-256 of a large file, git's SHA-1 of another."""
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, Any]:
    oid = oid_of(path, content)
    large = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if path.endswith(LFS) else {}
    return {"type": "file", "path": path, "size": len(content), "oid": oid, **large}


def upload_mode(path: str, there: dict[str, bytes]) -> dict[str, Any]:
    mode = "lfs" if path.endswith(LFS) else "regular"
    oid = oid_of(path, there[path]) if path in there else None
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """What a process needs to take `hub` for the Hub, with its cache in `home`."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        **more,
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process talks to, logged in with TOKEN; the client's waits between its tries take no time."""
    import datasets.config
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _http, close_session

    from finetune_kit.run_folder import upload as kit

    with serving() as served:
        cache = tmp_path / "hf"
        for name, it in environment(served, cache, HF_TOKEN=TOKEN).items():
            monkeypatch.setenv(name, it)
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        # read from the environment when the libraries were imported
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(hf_api.api, "endpoint", served.endpoint)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.endpoint)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        at_once = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
        monkeypatch.setattr(_http, "time", at_once)
        monkeypatch.setattr(kit, "time", at_once)
        close_session()
        hub_reachable.cache_clear()
        yield served
        close_session()
    hub_reachable.cache_clear()
