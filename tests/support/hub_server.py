"""A Hub on the loopback interface: push and pull through the real client, without a network.

Speaks what `huggingface_hub` asks of the Hub with Xet switched off: repositories, tokens, uploads (regular, LFS in one
piece or in parts), commits, branches, tags, pull requests, listings and downloads. Large files come from a second
host name that refuses a token, as the Hub's own storage does. Faults are ordered with `HubServer.fault`. Everything is
kept in memory and forgotten with the server.

    with HubServer() as hub:
        hub.add_user("me", token="hf_me")
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path, token="hf_me"), check=True)
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


DATE = "2024-01-01T00:00:00.000Z"
GIT_ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_SUFFIXES = {".safetensors", ".bin", ".npz", ".onnx", ".pt", ".pth", ".parquet", ".png", ".jpg"}
LFS_THRESHOLD = 10 * 2**20  # bytes


@dataclass(frozen=True)
class Blob:
    """The content of one file in one commit."""

    data: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def in_git(self) -> bytes:
        """What git itself stores: the content, or the pointer to a large file."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return pointer.encode() if self.is_lfs else self.data

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()


@dataclass(frozen=True)
class Commit:
    files: dict[str, Blob]
    title: str
    description: str = ""
    author: str = ""
    parent: "Commit | None" = None

    @cached_property
    def oid(self) -> str:
        parent = self.parent.oid if self.parent else None
        listing = sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(json.dumps([listing, self.title, self.author, parent]).encode()).hexdigest()

    def history(self) -> "Iterator[Commit]":
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repository:
    name: str  # owner/name
    private: bool
    branches: dict[str, Commit]
    tags: dict[str, Commit] = field(default_factory=dict)
    pull_requests: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def commit(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, `refs/...` name or commit id stands for."""
        named = self.branches | self.tags | self.pull_requests
        heads = {f"refs/heads/{name}": commit for name, commit in self.branches.items()}
        known = {past.oid: past for commit in named.values() for past in commit.history()}
        return (known | heads | named).get(revision)


@dataclass(frozen=True)
class User:
    name: str
    can_write: bool


@dataclass
class Fault:
    """One disturbance of the next `times` requests whose method and path match."""

    pattern: re.Pattern[str]
    method: str | None = None
    times: int = 1
    status: int | None = None  # answer with this error; 429 comes with `Retry-After: 0`
    drop_after: int | None = None  # break the connection after so many bytes of the answer, or of the upload
    corrupt: bool = False  # invert one byte of the answer; the size stays
    delay: float = 0.0  # seconds before the answer


@dataclass
class Request:
    """What a test may ask about a request; its status is 0 until it is answered, and stays so if it is broken off."""

    method: str
    path: str
    host: str
    token: str | None
    range: str | None
    status: int = 0


@dataclass(frozen=True)
class Answer:
    content: object = b""  # bytes as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


class RefusalError(Exception):
    """An error answer, with the headers by which the client tells one from another."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message}, status, named | headers)


class HubServer:
    """The server and all it keeps. A context manager; requests are answered in threads of this process.

    Args:
        multipart_chunk_size: bytes from which on an LFS upload is asked for in parts of this size; None for one piece.
    """

    def __init__(self, *, multipart_chunk_size: int | None = None):
        self.multipart_chunk_size = multipart_chunk_size
        self.repositories: dict[str, Repository] = {}
        self.users: dict[str, User] = {}
        self.large_files: dict[str, bytes] = {}  # sha256 -> content
        self.parts: dict[tuple[str, int], bytes] = {}  # (sha256, part number) -> content
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.storage_url = f"http://localhost:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def add_user(self, name: str, *, token: str, can_write: bool = True) -> None:
        """Let `token` act for `name`; with `can_write=False` it is a read token."""
        self.users[token] = User(name, can_write)

    def add_repository(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repository:
        """Create a model repository with these files, as if it had been there before the test."""
        blobs = {path: Blob(data, is_large(path, data)) for path, data in (files or {}).items()}
        first = Commit({".gitattributes": Blob(GIT_ATTRIBUTES.encode())} | blobs, "initial commit")
        repository = Repository(name, private, {"main": first})
        self.repositories[name] = repository
        self.large_files |= {blob.sha256: blob.data for blob in blobs.values() if blob.is_lfs}
        return repository

    def fault(self, pattern: str, **settings: Any) -> None:
        """Disturb the next requests whose path contains the regular expression `pattern`; `settings` as in `Fault`."""
        self.faults.append(Fault(re.compile(pattern), **settings))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path of a model repository at a revision."""
        commit = self.repositories[name].commit(revision)
        if commit is None:
            raise KeyError(f"{name} has no revision {revision}")
        return {path: blob.data for path, blob in commit.files.items()}

    def requested(self, pattern: str, method: str | None = None) -> list[Request]:
        """The requests so far whose path contains the regular expression `pattern`."""
        return [r for r in self.requests if re.search(pattern, r.path) and method in (None, r.method)]

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """The variables under which a new process takes this server for the Hub, with its caches under `home`."""
        inherited = {name: value for name, value in os.environ.items() if not re.match(r"HF_|.*_PROXY$", name, re.I)}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        }
        return inherited | settings | ({"HF_TOKEN": token} if token else {})

    def attach(self, monkeypatch: Any, cache: Path) -> None:
        """Let this process's client take the server for the Hub, until the pytest `monkeypatch` is undone."""
        settings = {
            "ENDPOINT": self.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in settings.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        impatient = SimpleNamespace(sleep=lambda seconds: None)  # between the client's retries
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", impatient)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which keeps the address that it was made with
        monkeypatch.setenv("NO_PROXY", "*")

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (None, method) and fault.pattern.search(path):
                    fault.times -= 1
                    return fault
        return None


def is_large(path: str, data: bytes, size: int | None = None) -> bool:
    """Whether a file goes to large-file storage: by suffix, by size, or by a zero byte as git tells binary files."""
    size = len(data) if size is None else size
    return PurePosixPath(path).suffix in LFS_SUFFIXES or size >= LFS_THRESHOLD or b"\0" in data[:512]


ROUTES: list[tuple[str, re.Pattern[str], Callable]] = []
API = r"/api/models/(?P<name>[^/]+/[^/]+)"
REPOSITORY = r"/(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent; `HubServer.requests` is the log."""

    # one request

    def serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        fault, request = self.hub.take_fault(self.command, url.path), self.log(url.path)
        drop_upload = fault is not None and fault.drop_after is not None and self.command in ("PUT", "POST")
        self.data = self.read_body(fault.drop_after if fault and drop_upload else None)
        if drop_upload:
            self.close_connection = True
            return
        time.sleep(fault.delay if fault else 0)
        answer = self.part_asked_for(self.answer(url.path, fault))
        request.status = answer.status
        self.send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def read_body(self, limit: int | None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            size = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(size if limit is None else min(size, limit))
        body = b""
        while limit is None or len(body) < limit:
            size = int(self.rfile.readline().split(b";")[0], 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return body

    def answer(self, path: str, fault: Fault | None) -> Answer:
        if fault and fault.status:
            headers = {"Retry-After": "0"} if fault.status == 429 else {}
            return Answer({"error": "ordered by the test"}, fault.status, headers)
        method = "GET" if self.command == "HEAD" else self.command
        for known_method, pattern, function in ROUTES:
            match = pattern.fullmatch(path) if method == known_method else None
            if match:
                named = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                try:
                    with self.hub.lock:
                        return function(self, **named)
                except RefusalError as refusal:
                    return refusal.answer
        return Answer({"error": "Sorry, we can't find the page you are looking for."}, 404)

    def part_asked_for(self, answer: Answer) -> Answer:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or answer.status != 200:
            return answer
        size = len(answer.body)
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        if first > last:
            return Answer(b"", 416, {"Content-Range": f"bytes */{size}"})
        place = {"Content-Range": f"bytes {first}-{last}/{size}"}
        return Answer(answer.body[first : last + 1], 206, answer.headers | place)

    def send(self, answer: Answer, fault: Fault | None) -> None:
        body = answer.body
        if fault and fault.corrupt and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        dropped = fault.drop_after if fault else None
        self.wfile.write(body[:dropped])
        self.close_connection |= dropped is not None

    def log(self, path: str) -> Request:
        host, token = self.headers.get("Host", "").split(":")[0], self.headers.get("Authorization")
        request = Request(self.command, unquote(path), host, token, self.headers.get("Range"))
        with self.hub.lock:
            self.hub.requests.append(request)
        return request

    # who asks, and for what

    @property
    def json(self) -> dict:
        return json.loads(self.data or b"{}")

    def user(self) -> User | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusalError(401, None, "Invalid credentials in Authorization header")
        return user

    def writer(self) -> User:
        user = self.user()
        if user is None:
            raise RefusalError(401, None, "Invalid username or password.")
        if not user.can_write:
            raise RefusalError(403, None, "Forbidden: you must use a token with write access")
        return user

    def repository(self, name: str, *, write: bool = False) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(name)
        if repository is None or (repository.private and (user is None or user.name != repository.owner)):
            raise RefusalError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and self.writer().name != repository.owner:
            raise RefusalError(403, None, f"Forbidden: you have no write access to {name}")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.commit(revision)
        if commit is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        user = self.user()
        if user is None:
            raise RefusalError(401, None, "Invalid username or password.")
        role = {"accessToken": {"displayName": "test", "role": "write" if user.can_write else "read"}}
        return Answer({"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "auth": role})

    @route("POST", "/api/repos/create")
    def create_repository(self) -> Answer:
        user = self.writer()
        name = f"{self.json.get('organization') or user.name}/{self.json['name']}"
        url = f"{self.hub.url}/{name}"
        if not name.startswith(f"{user.name}/"):
            raise RefusalError(403, None, "You don't have the rights to create a model under this namespace")
        if name in self.hub.repositories:
            return Answer({"error": "You already created this repo", "url": url}, 409)
        private = self.json.get("visibility") == "private" or bool(self.json.get("private"))
        self.hub.add_repository(name, private=private)
        return Answer({"url": url, "name": name})

    @route("DELETE", "/api/repos/delete")
    def delete_repository(self) -> Answer:
        owner = self.json.get("organization") or self.writer().name
        repository = self.repository(f"{owner}/{self.json['name']}", write=True)
        del self.hub.repositories[repository.name]
        return Answer({})

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> Answer:
        card = self.json["content"]
        if not card.startswith("---\n"):
            return Answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        if "\n---" not in card[4:]:
            return Answer({"errors": [{"message": "the metadata block is not closed"}], "warnings": []}, 400)
        return Answer({"errors": [], "warnings": []})

    # uploads and commits

    @route("POST", f"{API}/preupload/{REVISION}")
    def preupload(self, name: str, revision: str) -> Answer:
        repository = self.repository(name, write="create_pr" not in self.query)
        known, files = self.commit_of(repository, revision).files, []
        for file in self.json["files"]:
            path, blob = file["path"], known.get(file["path"])
            lfs = is_large(path, base64.b64decode(file["sample"]), file["size"])
            oid = None if blob is None or blob.is_lfs != lfs else blob.sha256 if lfs else blob.oid
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return Answer({"files": files})

    @route("POST", rf"{REPOSITORY}\.git/info/lfs/objects/batch")
    def lfs_batch(self, name: str) -> Answer:
        self.repository(name), self.writer()
        return Answer({"transfer": "basic", "objects": [self.lfs_actions(asked) for asked in self.json["objects"]]})

    def lfs_actions(self, asked: dict) -> dict:
        oid, size, chunk = asked["oid"], asked["size"], self.hub.multipart_chunk_size
        known = {"oid": oid, "size": size}
        if oid in self.hub.large_files:
            return known  # nothing to do
        upload = {"href": f"{self.hub.storage_url}/storage/{oid}", "header": {}}
        if chunk and size > chunk:
            parts = range(1, -(-size // chunk) + 1)
            urls = {str(part): f"{self.hub.storage_url}/storage/{oid}?part={part}" for part in parts}
            upload = {"href": f"{self.hub.url}/lfs/complete", "header": {"chunk_size": str(chunk)} | urls}
        return known | {"actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}}

    @route("PUT", "/storage/(?P<oid>[0-9a-f]{64})")
    def store(self, oid: str) -> Answer:
        if "part" in self.query:
            part = int(self.query["part"][0])
            self.hub.parts[oid, part] = self.data
            return Answer(headers={"ETag": f'"{hashlib.md5(self.data).hexdigest()}"'})
        return self.keep(oid, self.data)

    @route("POST", "/lfs/complete")
    def complete_upload(self) -> Answer:
        oid, parts = self.json["oid"], self.json["parts"]
        return self.keep(oid, b"".join(self.hub.parts.pop((oid, part["partNumber"])) for part in parts))

    def keep(self, oid: str, data: bytes) -> Answer:
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusalError(400, None, "The provided content does not match its sha256")
        self.hub.large_files[oid] = data
        return Answer({})

    @route("POST", "/lfs/verify")
    def verify_upload(self) -> Answer:
        stored = self.hub.large_files.get(self.json["oid"])
        if stored is None or len(stored) != self.json["size"]:
            raise RefusalError(404, None, "Object not found")
        return Answer({})

    @route("POST", f"{API}/commit/{REVISION}")
    def create_commit(self, name: str, revision: str) -> Answer:
        as_pull_request = "create_pr" in self.query
        repository, user = self.repository(name, write=not as_pull_request), self.writer()
        parent = self.commit_of(repository, revision)
        header, *operations = [json.loads(line) for line in self.data.splitlines()]
        if header["value"].get("parentCommit") not in (None, parent.oid):
            raise RefusalError(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        commit = Commit(files, header["value"]["summary"], header["value"].get("description", ""), user.name, parent)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}"}
        if as_pull_request:
            number = len(repository.pull_requests) + 1
            repository.pull_requests[f"refs/pr/{number}"] = commit
            return Answer(answer | {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"})
        heads = repository.pull_requests if revision in repository.pull_requests else repository.branches
        if revision not in heads:
            raise RefusalError(400, None, f"{revision} is not a branch")
        heads[revision] = commit
        return Answer(answer)

    def apply(self, key: str, value: dict, files: dict[str, Blob]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise RefusalError(400, None, f"LFS pointer of {path} points to a file that does not exist")
            files[path] = Blob(self.hub.large_files[value["oid"]], is_lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [p for p in files if (p.startswith(folder) if key == "deletedFolder" else p == path)]
            if not gone:
                raise RefusalError(404, "EntryNotFound", "A file with this name doesn't exist")
            for each in gone:
                del files[each]
        else:
            raise RefusalError(400, None, f"unknown operation {key}")

    # branches and tags

    @route("GET", f"{API}/refs")
    def list_references(self, name: str) -> Answer:
        repository = self.repository(name)
        named = {
            "branches": {f"refs/heads/{branch}": commit for branch, commit in repository.branches.items()},
            "tags": {f"refs/tags/{tag}": commit for tag, commit in repository.tags.items()},
            "pullRequests": repository.pull_requests,
        }
        listed = {
            group: [{"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": c.oid} for ref, c in refs.items()]
            for group, refs in named.items()
        }
        return Answer(listed | {"converts": []})

    @route("POST", f"{API}/branch/(?P<branch>[^/]+)")
    def create_branch(self, name: str, branch: str) -> Answer:
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise RefusalError(409, None, f"Reference already exists: {branch}")
        repository.branches[branch] = self.commit_of(repository, self.json.get("startingPoint", "main"))
        return Answer({})

    @route("POST", f"{API}/tag/{REVISION}")
    def create_tag(self, name: str, revision: str) -> Answer:
        repository, tag = self.repository(name, write=True), self.json["tag"]
        if tag in repository.tags:
            raise RefusalError(409, None, f"Tag already exists: {tag}")
        repository.tags[tag] = self.commit_of(repository, revision)
        return Answer({})

    @route("DELETE", f"{API}/(?P<group>branch|tag)/(?P<reference>[^/]+)")
    def delete_reference(self, name: str, group: str, reference: str) -> Answer:
        repository = self.repository(name, write=True)
        references = repository.branches if group == "branch" else repository.tags
        if reference == "main" or references.pop(reference, None) is None:
            raise RefusalError(404, "RevisionNotFound", f"no {group} {reference} that may be deleted")
        return Answer({})

    # listings and downloads

    @route("GET", f"{API}(?:/revision/{REVISION})?")
    def describe(self, name: str, revision: str) -> Answer:
        repository = self.repository(name)
        commit = self.commit_of(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            entries = [_entry(path, blob) for path, blob in sorted(commit.files.items())]
            siblings = [entry | {"rfilename": entry["path"], "blobId": entry["oid"]} for entry in entries]
        facts = {"id": name, "author": repository.owner, "sha": commit.oid, "private": repository.private}
        dates = {"createdAt": DATE, "lastModified": DATE}
        return Answer(facts | dates | {"gated": False, "disabled": False, "tags": [], "siblings": siblings})

    @route("GET", f"{API}/commits/{REVISION}")
    def list_commits(self, name: str, revision: str) -> Answer:
        history = self.commit_of(self.repository(name), revision).history()
        shown = [{"id": c.oid, "title": c.title, "message": c.description, "by": c.author} for c in history]
        return Answer([entry | {"date": DATE, "authors": [{"user": entry.pop("by")}]} for entry in shown])

    @route("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?")
    def list_tree(self, name: str, revision: str, path: str) -> Answer:
        commit = self.commit_of(self.repository(name), revision)
        folder = path.rstrip("/") + "/" if path else ""
        inside = {p: blob for p, blob in sorted(commit.files.items()) if p.startswith(folder)}
        if not inside:
            raise RefusalError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {str(parent) for p in inside for parent in PurePosixPath(p).parents if str(parent) != "."}
        entries = [_entry(p, blob) for p, blob in inside.items()]
        entries += [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(folders)]
        shown = [
            e for e in entries if e["path"].startswith(folder) and (recursive or "/" not in e["path"][len(folder) :])
        ]
        return Answer(shown)

    @route("GET", rf"{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str) -> Answer:
        commit = self.commit_of(self.repository(name), revision)
        blob, at = commit.files.get(path), {"X-Repo-Commit": commit.oid}
        if blob is None:
            raise RefusalError(404, "EntryNotFound", "Entry not found", **at)
        if not blob.is_lfs:
            return Answer(blob.data, 200, at | {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"})
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data)), "ETag": f'"{blob.oid}"'}
        location = f"{self.hub.storage_url}/storage/{blob.sha256}?signed=for/{quote(path)}"
        return Answer(b"", 302, at | linked | {"Location": location})

    @route("GET", "/storage/(?P<oid>[0-9a-f]{64})")
    def download(self, oid: str) -> Answer:
        if self.headers.get("Authorization"):
            raise RefusalError(400, None, "Only one auth mechanism allowed: the address is signed, send no token")
        if oid not in self.hub.large_files:
            raise RefusalError(404, None, "NoSuchKey")
        return Answer(self.hub.large_files[oid], 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
    pointer = {"oid": blob.sha256, "sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.in_git)}
    return entry | ({"lfs": pointer} if blob.is_lfs else {})
