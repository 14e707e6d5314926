"""A small Hub on loopback: the HTTP API that huggingface_hub speaks, with faults on demand.

It is written from the protocol, not from our code: repositories with branches and commits,
`resolve` with ETag and commit headers and a redirect to another host for large files, the
Git LFS batch API, commits in ndjson, pull requests, and its own check of a card's metadata.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, HfApi

TOKEN = "hf_" + "Sesame" * 5 + "open"
READ_TOKEN = "hf_" + "Window" * 5 + "look"
LARGE_SUFFIXES = (".safetensors", ".bin")  # what is stored as LFS objects
_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)  # branches and pull requests
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        commit = self.heads.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, head: str, files: dict[str, bytes], message: str) -> str:
        text = f"{len(self.commits)} {head} {message}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = files
        self.heads[head] = oid
        self.messages.append(message)
        return oid


@dataclass
class Fault:
    """What goes wrong with the requests that match, so many times."""

    pattern: str
    action: int | str | Callable[[Handler], None]
    times: int


class Hub(ThreadingHTTPServer):
    """The server and all that it stores."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {TOKEN: ("me", "write"), READ_TOKEN: ("me", "read")}
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.broken: list[BaseException | None] = []
        self.released = threading.Event()  # ends every stall
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, pattern: str, action: Any, times: int = 1000) -> None:
        """Make requests whose "METHOD /path" matches fail.

        An action is a status, "drop" (close without an answer), "stall" (never answer),
        "slow" (answer late), "halfway" (take or send half of the body, then close), or a
        function.
        """
        self.faults.append(Fault(pattern, action, times))

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # clients may hang up
            self.broken.append(error)


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
    assert not hub.broken


@dataclass
class Place:
    """A Hub, and an account there."""

    user: str
    used: list[str] = field(default_factory=list)

    def name(self, stem: str = "merged") -> str:
        """Return a name for a repository that is not there yet."""
        self.used.append(f"{self.user}/gam-merge-test-{stem}-{secrets.token_hex(4)}")
        return self.used[-1]

    def upload(self, folder: Path | Mapping[str, bytes], stem: str, prefix: str = "") -> str:
        """Put files into a new repository and return its name."""
        files = folder if isinstance(folder, Mapping) else contents(folder)
        repo = self.name(stem)
        HfApi().create_repo(repo, private=True)
        self.commit(repo, {prefix + path: data for path, data in files.items()})
        return repo

    def commit(self, repo: str, files: Mapping[str, bytes]) -> None:
        """Add files to a repository."""
        added = [CommitOperationAdd(path, data) for path, data in files.items()]
        HfApi().create_commit(repo, added, commit_message="add")

    def files(self, repo: str, revision: str | None = None) -> dict[str, bytes]:
        """Return what a repository holds, without what the Hub itself put there."""
        listed = HfApi().model_info(repo, revision=revision).siblings or ()
        paths = [sibling.rfilename for sibling in listed]
        return {
            path: Path(huggingface_hub.hf_hub_download(repo, path, revision=revision)).read_bytes()
            for path in paths
            if path != ".gitattributes"
        }

    def commits(self, repo: str, revision: str | None = None) -> list[str]:
        return [c.title for c in reversed(HfApi().list_repo_commits(repo, revision=revision))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do_get(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        line = f"{self.command} {unquote(url.path)}"
        with self.server.lock:
            self.server.seen.append(line)
            fault = next(
                (f for f in self.server.faults if f.times > 0 and re.search(f.pattern, line)), None
            )
            if fault is not None:
                fault.times -= 1
        self.halfway = fault is not None and fault.action == "halfway"
        body = self.body = self._read_body()
        if fault is not None and fault.action == "slow":
            self.server.released.wait(0.05)
        elif fault is not None and not (self.halfway and self.command == "GET"):
            self._misbehave(fault.action)
            return
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {url.path}"):
                groups = {key: unquote(value) for key, value in found.groupdict().items() if value}
                with self.server.lock:
                    answer = getattr(self, method)(body, **groups)
                answer()
                return
        self._send(404, {"error": f"no route for {line}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_get  # noqa: N815

    def _misbehave(self, action: Any) -> None:
        self.close_connection = True
        if callable(action):
            action(self)
        elif action == "stall":
            self.server.released.wait(20)
        elif isinstance(action, int):
            self._send(action, {"error": "as the test asked"})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length // 2 if self.halfway else length)

    def _send(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")  # or the client would use it once more
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.halfway:
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)

    # Routes return what answers, so that nothing is sent while the lock is held.

    def _answer(self, status: int, content: Any = None, **headers: str) -> Callable[[], None]:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return lambda: self._send(status, content, named)

    def _error(self, status: int, code: str, message: str) -> Callable[[], None]:
        headers = {"X_Error_Code": code, "X_Error_Message": message}
        return self._answer(status, {"error": message}, **headers)

    def _account(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.server.tokens.get(token)

    def _refusal(self, repo: str, write: bool = False) -> Callable[[], None] | None:
        """Return the answer to somebody who may not see or change a repository."""
        if "Authorization" in self.headers and self._account() is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        account = self._account()
        found = self.server.repos.get(repo)
        mine = account is not None and repo.startswith(f"{account[0]}/")
        if found is None or (found.private and not mine):
            if account is None:
                return self._error(401, "RepoNotFound", "Invalid username or password.")
            return self._error(404, "RepoNotFound", "Repository not found")
        if write and (account is None or account[1] != "write"):
            return self._error(403, "", "Your token has no write permission")
        return None

    def whoami(self, _: bytes) -> Callable[[], None]:
        account = self._account()
        if account is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        name, role = account
        token = {"displayName": "test", "role": role}
        return self._answer(
            200, {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": token}}
        )

    def info(self, _: bytes, repo: str, revision: str = "main") -> Callable[[], None]:
        if refusal := self._refusal(repo):
            return refusal
        found = self.server.repos[repo]
        commit = found.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self._answer(
            200,
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(found.commits[commit])],
            },
        )

    def history(self, _: bytes, repo: str, revision: str) -> Callable[[], None]:
        if refusal := self._refusal(repo):
            return refusal
        messages = self.server.repos[repo].messages
        date = "2026-01-01T00:00:00.000Z"
        entry = {"id": "0", "message": "", "authors": [], "date": date}
        return self._answer(200, [{**entry, "title": title} for title in reversed(messages)])

    def resolve(self, _: bytes, repo: str, revision: str, path: str) -> Callable[[], None]:
        if refusal := self._refusal(repo):
            return refusal
        found = self.server.repos[repo]
        if found.gated:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        commit = found.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        data = found.commits[commit].get(path)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        if not path.endswith(LARGE_SUFFIXES):
            etag = f'"{_git_oid(data)}"'
            return self._answer(200, data, ETag=etag, X_Repo_Commit=commit)
        oid = hashlib.sha256(data).hexdigest()
        self.server.objects[oid] = data
        return self._answer(
            302,
            b"",
            # Another host name, as the Hub has for its storage: it must not get the token.
            Location=f"http://localhost:{self.server.server_port}/storage/{oid}",
            X_Linked_Etag=f'"{oid}"',
            X_Linked_Size=str(len(data)),
            X_Repo_Commit=commit,
        )

    def storage(self, _: bytes, oid: str) -> Callable[[], None]:
        assert "Authorization" not in self.headers
        data = self.server.objects[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not wanted:
            return self._answer(200, data, ETag=f'"{oid}"')
        start = int(wanted[1])
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._answer(206, data[start:], Content_Range=span)

    def create(self, body: bytes) -> Callable[[], None]:
        account = self._account()
        wanted = json.loads(body)
        owner = wanted.get("organization") or "me"
        if account is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if account != (owner, "write"):
            return self._error(403, "", f"You may not create a model in {owner}")
        repo = f"{owner}/{wanted['name']}"
        url = f"{self.server.endpoint}/{repo}"
        if repo in self.server.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        new = self.server.repos[repo] = Repo(private)
        new.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._answer(200, {"url": url, "name": repo, "id": "0"})

    def branch(self, body: bytes, repo: str, branch: str) -> Callable[[], None]:
        if refusal := self._refusal(repo, write=True):
            return refusal
        found = self.server.repos[repo]
        if branch in found.heads:
            return self._answer(409, {"error": "Reference already exists"})
        start = json.loads(body).get("startingPoint", "main")
        found.heads[branch] = found.heads.get(start, start)
        return self._answer(200, {})

    def validate(self, body: bytes) -> Callable[[], None]:
        problems = _card_problems(json.loads(body)["content"])
        if problems:
            return self._answer(400, {"errors": [{"message": text} for text in problems]})
        return self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> Callable[[], None]:
        if refusal := self._refusal(repo, write=True):
            return refusal
        found = self.server.repos[repo]
        commit = found.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        there = found.commits[commit]
        files = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            large = path.endswith(LARGE_SUFFIXES)
            old = there.get(path)
            oid = old and (hashlib.sha256(old).hexdigest() if large else _git_oid(old))
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._answer(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> Callable[[], None]:
        if refusal := self._refusal(repo, write=True):
            return refusal
        objects: list[dict[str, Any]] = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.server.objects:
                storage = f"http://localhost:{self.server.server_port}/storage/{entry['oid']}"
                verify = f"{self.server.endpoint}/{repo}.git/verify"
                answer["actions"] = {"upload": {"href": storage}, "verify": {"href": verify}}
            objects.append(answer)
        return self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> Callable[[], None]:
        assert "Authorization" not in self.headers
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "the content is not what was announced"})
        self.server.objects[oid] = body
        return self._answer(200, b"")

    def verify(self, body: bytes, repo: str) -> Callable[[], None]:
        wanted = json.loads(body)
        data = self.server.objects.get(wanted["oid"])
        good = data is not None and len(data) == wanted["size"]
        return self._answer(200 if good else 404, {})

    def commit(self, body: bytes, repo: str, revision: str) -> Callable[[], None]:
        if refusal := self._refusal(repo, write=True):
            return refusal
        found = self.server.repos[repo]
        base = found.heads.get(revision)
        if base is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != base:
            return self._answer(412, {"error": "A commit has happened since. Please refresh."})
        files = dict(found.commits[base])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._answer(400, {"error": f"unknown operation {operation['key']}"})
        head, pull = revision, None
        if self.query.get("create_pr") == ["1"]:
            number = sum(name.startswith("refs/pr/") for name in found.heads) + 1
            head = f"refs/pr/{number}"
            pull = f"{self.server.endpoint}/{repo}/discussions/{number}"
        oid = found.commit(head, files, header["value"]["summary"])
        url = f"{self.server.endpoint}/{repo}/commit/{oid}"
        return self._answer(
            200, {"success": True, "commitUrl": url, "commitOid": oid, "pullRequestUrl": pull}
        )


_R = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (rf"GET /api/models/{_R}", "info"),
    (rf"GET /api/models/{_R}/revision/(?P<revision>[^/]+)", "info"),
    (rf"GET /api/models/{_R}/commits/(?P<revision>[^/]+)", "history"),
    (rf"(GET|HEAD) /{_R}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    (r"(GET|HEAD) /storage/(?P<oid>\w+)", "storage"),
    (r"POST /api/repos/create", "create"),
    (rf"POST /api/models/{_R}/branch/(?P<branch>[^/]+)", "branch"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{_R}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"POST /{_R}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /storage/(?P<oid>\w+)", "store"),
    (rf"POST /{_R}\.git/verify", "verify"),
    (rf"POST /api/models/{_R}/commit/(?P<revision>[^/]+)", "commit"),
)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card_problems(text: str) -> list[str]:
    """Return what the Hub would not accept in a card's metadata."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    if not found:
        return ["no metadata"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    problems = []
    bases = data.get("base_model", [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and _ID.fullmatch(base) for base in bases):
        problems.append(f'"base_model" with value {bases!r} is not valid')
    relation = data.get("base_model_relation", "adapter")
    if relation not in ("adapter", "merge", "quantized", "finetune"):
        problems.append(f'"base_model_relation" {relation!r} is not valid')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be a list of strings')
    if not isinstance(data.get("library_name", ""), str):
        problems.append('"library_name" must be a string')
    return problems
