"""A small server that speaks what huggingface_hub's client asks of the Hub, on loopback, with faults to inject.

It knows model repositories: create, branch, validate-yaml, preupload, LFS batch and upload, commit, pull requests,
info, tree, and resolve with ETag. Repositories may be private or gated; who may read and write is told
by the token. Everything is held in memory.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


# As the Hub's .gitattributes for models says.
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png", ".msgpack")


@dataclass
class Fault:
    """What goes wrong with requests of this method whose path fits, so many times."""

    method: str
    path: str
    action: int | str | Callable[[], None]
    """A status code; `drop` (close without an answer), `page` (answer with a web page, as a proxy does), or a function
    that is called before the request is answered as ever."""
    times: int = 1
    message: str = "A fault."
    """It is sent with a status code."""


@dataclass
class Repository:
    """Files by path of each commit, and the commits that names stand for."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: Mapping[str, bytes], message: str) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(repr((len(self.commits), message, ref)).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def at(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


def blob_id(content: bytes) -> str:
    """Git's name of a file with this content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class HubServer:
    """The server as a context manager: `endpoint` is its address, `repositories` what it holds."""

    def __init__(self) -> None:
        self.users = {"hf_good": "user", "hf_other": "other"}
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What lies in a repository."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.refs.get(revision, revision)]

    def put(self, repo_id: str, files: Mapping[str, bytes], ref: str = "main", **options: bool) -> str:
        """Commit files past all protocols; returns the commit."""
        repository = self.repositories.setdefault(repo_id, Repository(**options))
        return repository.commit(ref, files, "put")

    def fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Stop(Exception):
    def __init__(self, status: int, message: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        routes = (
            ("POST", r"/api/repos/create", "create"),
            ("POST", r"/api/validate-yaml", "validate"),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "store"),
            ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
            ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        )

        def answer(self) -> None:
            parts = urlsplit(self.path)
            self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {parts.path}")
            fault = hub.fault(self.command, parts.path)
            action = fault.action if fault else None
            if action == "drop":
                self.hang_up()
                return
            if callable(action):
                action()
            try:
                if action == "page":
                    self.send(200, b"<html>Please log in to the network.</html>", {"Content-Type": "text/html"})
                    return
                if isinstance(action, int):
                    raise _Stop(action, fault.message)
                for method, pattern, name in self.routes:
                    if method == self.command and (match := re.fullmatch(pattern, parts.path)):
                        groups = {key: unquote(value) for key, value in match.groupdict().items()}
                        getattr(self, f"on_{name}")(**groups)
                        return
                raise _Stop(404, f"This server does not know {self.command} {parts.path}.")
            except _Stop as stop:
                headers = {"X-Error-Message": stop.message} | ({"X-Error-Code": stop.code} if stop.code else {})
                self.send(stop.status, {"error": stop.message}, headers)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(2)

        def send(self, status: int, payload: Any, headers: Mapping[str, str] | None = None) -> None:
            body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

        # Who asks, and for what.

        def user(self) -> str | None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token and token not in hub.users:
                raise _Stop(401, "Invalid credentials in Authorization header")
            return hub.users.get(token)

        def readable(self, repo: str) -> Repository:
            found, owner = hub.repositories.get(repo), repo.split("/")[0]
            if found is None or (found.private and self.user() != owner):
                # The Hub does not tell the two apart.
                raise _Stop(404 if self.user() else 401, "Repository not found", "RepoNotFound")
            return found

        def writable(self, repo: str) -> Repository:
            found = self.readable(repo)
            if self.user() is None:
                raise _Stop(401, "Invalid username or password.")
            if self.user() != repo.split("/")[0]:
                raise _Stop(403, "You don't have the rights to write here.")
            return found

        def files_at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
            found = self.readable(repo)
            sha = found.at(revision)
            if sha is None:
                raise _Stop(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return sha, found.commits[sha]

        # What is asked.

        def on_validate(self) -> None:
            self.send(200, {"errors": [], "warnings": []})

        def on_create(self) -> None:
            wanted = json.loads(self.body)
            if self.user() is None:
                raise _Stop(401, "Invalid username or password.")
            owner = wanted.get("organization") or self.user()
            if owner != self.user():
                raise _Stop(403, f"You don't have the rights to create a model under the namespace {owner!r}.")
            repo = f"{owner}/{wanted['name']}"
            there = {"url": f"{hub.endpoint}/{repo}", "name": repo}
            if repo in hub.repositories:
                self.send(409, there | {"error": "You already created this model repo"})
                return
            hub.repositories[repo] = Repository(private=wanted.get("visibility") == "private")
            hub.repositories[repo].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.send(200, there)

        def on_branch(self, repo: str, revision: str) -> None:
            found = self.writable(repo)
            if revision in found.refs:
                raise _Stop(409, "Reference already exists")
            found.refs[revision] = found.refs["main"]
            self.send(200, {})

        def on_preupload(self, repo: str, revision: str) -> None:
            self.writable(repo)
            _, there = self.files_at(repo, revision)
            answers = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                large, content = path.endswith(LARGE), there.get(path)
                oid = None
                if content is not None:
                    oid = hashlib.sha256(content).hexdigest() if large else blob_id(content)
                mode = "lfs" if large else "regular"
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.send(200, {"files": answers})

        def on_batch(self, repo: str) -> None:
            self.writable(repo)
            objects = []
            for item in json.loads(self.body)["objects"]:
                entry = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in hub.large:
                    entry["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}"}}
                objects.append(entry)
            self.send(200, {"transfer": "basic", "objects": objects})

        def on_store(self, oid: str) -> None:
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise _Stop(400, "The content is not that of the object.")
            hub.large[oid] = self.body
            self.send(200, {})

        def on_commit(self, repo: str, revision: str) -> None:
            found = self.writable(repo)
            _, there = self.files_at(repo, revision)
            files, message = dict(there), ""
            for line in self.body.decode().splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    message = value["summary"]
                elif item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    if value["oid"] not in hub.large:
                        raise _Stop(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    files[value["path"]] = hub.large[value["oid"]]
                else:
                    raise _Stop(400, f"This server does not know the operation {item['key']}.")
            answer = {"success": True}
            if self.query.get("create_pr") == "1":
                number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
                revision = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{hub.endpoint}/{repo}/discussions/{number}"
            sha = found.commit(revision, files, message)
            self.send(200, answer | {"commitUrl": f"{hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

        def on_info(self, repo: str, revision: str = "main") -> None:
            sha, files = self.files_at(repo, revision)
            found = hub.repositories[repo]
            siblings = [{"rfilename": path} for path in files]
            about = {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings}
            self.send(200, about | {"gated": "auto" if found.gated else False, "tags": [], "downloads": 0})

        def on_tree(self, repo: str, revision: str) -> None:
            _, files = self.files_at(repo, revision)
            entries = []
            for path, content in files.items():
                size = len(content)
                entry = {"type": "file", "path": path, "size": size, "oid": blob_id(content)}
                if path.endswith(LARGE):
                    sha = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": sha, "size": size, "pointerSize": 130}
                entries.append(entry)
            self.send(200, entries)

        def on_resolve(self, repo: str, revision: str, path: str) -> None:
            sha, files = self.files_at(repo, revision)
            found = hub.repositories[repo]
            if found.gated and self.user() is None:
                raise _Stop(401, f"Access to model {repo} is restricted.", "GatedRepo")
            headers = {"X-Repo-Commit": sha}
            if path not in files:
                self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
                return
            content = files[path]
            etag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else blob_id(content)
            headers["ETag"] = f'"{etag}"'
            self.send(200, content, headers)

    return Handler
