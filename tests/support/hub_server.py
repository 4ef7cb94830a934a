"""
A Hub in memory, served over HTTP: what its client asks for to make a repository, commit to it and download it again.

Meets its requests with faults where a test wants them.
"""

import base64
import functools
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


LARGE_FILES = (".safetensors", ".bin", ".pt", ".pth")
LONGEST_SILENCE = 120  # seconds after which a request that hangs is dropped, so that no client outlives its test

ROUTES = []


def route(method, pattern, writes=False):
    """Lets a method of `Hub` answer the requests whose whole path the pattern matches; the groups are arguments."""

    def register(answer):
        ROUTES.append((method, re.compile(pattern), writes, answer))
        return answer

    return register


class HubError(Exception):
    """A request refused. What the answer has besides the error is in `details`."""

    def __init__(self, status, message, code=None, **details):
        super().__init__(message)
        self.status = status
        self.code = code
        self.details = details


@dataclass
class Fault:
    """What becomes of the next `times` requests with `part` in their path: an error, or no answer without a status."""

    part: str
    status: int | None
    times: float = float("inf")


@dataclass
class Commit:
    """A state of a repository: all its files, by path."""

    oid: str
    message: str
    files: dict[str, bytes]


class Hub:
    """Repositories, each a list of commits. `tokens` maps each known token to what it may do, "read" or "write"."""

    def __init__(self, tokens, faults=()):
        self.tokens = tokens
        self.faults = list(faults)
        self.repositories = {}
        self.hangs = threading.Event()  # set from the first request on that gets no answer
        self._large_files = {}
        self._closing = threading.Event()

    @contextmanager
    def serve(self):
        """Answers requests at `self.address` until the end of the block."""
        with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self)) as server:
            self.address = f"http://127.0.0.1:{server.server_port}"
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield self
            finally:
                self._closing.set()
                server.shutdown()

    def environment(self, home):
        """That of a process which is told of the Hub as any user's is, with a token that may write."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return {
            **others,
            "HF_ENDPOINT": self.address,
            "HF_TOKEN": next(token for token, role in self.tokens.items() if role == "write"),
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # else large files go to a service with a protocol of its own
            "NO_PROXY": "127.0.0.1",
        }

    def commit(self, repository, message, files):
        """Adds files to a repository, or overwrites them. A repository that is not there is made."""
        commits = self.repositories.setdefault(repository, [])
        oid = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits.append(Commit(oid, message, {**(commits[-1].files if commits else {}), **files}))
        return commits[-1]

    def find(self, repository, revision):
        """The commit that a revision names."""
        if repository not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        commits = self.repositories[repository]
        if revision == "main":
            return commits[-1]
        for commit in commits:
            if commit.oid == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def authorize(self, token, writes):
        """Refuses a token that is not known, and writing with any but one that may. Everybody may read."""
        if token and token not in self.tokens:
            raise HubError(401, "Invalid username or password.")
        if writes and self.tokens.get(token) != "write":
            raise HubError(403, "You don't have the required permissions to write with this token.")

    def meet_fault(self, path):
        """Does to a request what a fault has in store for it. True if it is not to be answered."""
        for fault in self.faults:
            if fault.part in path and fault.times > 0:
                fault.times -= 1
                if fault.status is not None:
                    raise HubError(fault.status, "Something is wrong on our side.")
                self.hangs.set()
                self._closing.wait(LONGEST_SILENCE)
                return True
        return False

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request):
        front_matter = request.json()["content"].removeprefix("---\n").partition("---\n")[0]
        try:
            yaml.safe_load(front_matter)
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid metadata") from error
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create", writes=True)
    def _create(self, request):
        wanted = request.json()
        repository = f"{wanted['organization'] or 'user'}/{wanted['name']}"
        url = f"{self.address}/{repository}"
        if repository in self.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        self.commit(repository, "initial commit", {".gitattributes": b""})
        return {"url": url}

    @route("GET", "/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
    def _info(self, request, repository, revision):
        commit = self.find(repository, revision or "main")
        return {"id": repository, "sha": commit.oid, "siblings": [{"rfilename": path} for path in commit.files]}

    @route("GET", "/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?")
    def _tree(self, request, repository, revision, folder):
        prefix = f"{folder}/" if folder else ""
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            for path, content in self.find(repository, revision).files.items()
            if path.startswith(prefix)
        ]
        if not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return entries

    @route("GET|HEAD", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    def _file(self, request, repository, revision, path):
        commit = self.find(repository, revision)
        request.answer_headers["X-Repo-Commit"] = commit.oid
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        request.answer_headers["ETag"] = f'"{_git_hash(commit.files[path])}"'
        return commit.files[path]

    @route("POST", "/api/models/([^/]+/[^/]+)/preupload/main", writes=True)
    def _say_how_to_upload(self, request, repository):
        self.find(repository, "main")
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
                    "shouldIgnore": False,
                }
                for file in request.json()["files"]
            ]
        }

    @route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", writes=True)
    def _say_where_to_upload(self, request, repository):
        return {
            "transfer": "basic",
            "objects": [
                {**file, "actions": {"upload": {"href": f"{self.address}/{repository}.git/upload/{file['oid']}"}}}
                for file in request.json()["objects"]
            ],
        }

    # Addresses of uploads carry their own permission: the client sends no token to them.
    @route("PUT", r"/[^/]+/[^/]+\.git/upload/(\w+)")
    def _upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "This is not the file that was announced")
        self._large_files[oid] = request.body
        return {}

    @route("POST", "/api/models/([^/]+/[^/]+)/commit/main", writes=True)
    def _commit(self, request, repository):
        self.find(repository, "main")
        files = {}
        for line in request.body.splitlines():
            match json.loads(line):
                case {"key": "header", "value": {"summary": message}}:
                    pass
                case {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}:
                    files[path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": oid}} if oid in self._large_files:
                    files[path] = self._large_files[oid]
                case operation:
                    raise HubError(400, f"Cannot commit {operation}")
        commit = self.commit(repository, message, files)
        return {"commitUrl": f"{self.address}/{repository}/commit/{commit.oid}", "commitOid": commit.oid}


class _Handler(BaseHTTPRequestHandler):
    """Has the hub answer a request, and sends what it says: JSON, the content of a file, or an error."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def handle_any(self):
        # Read whatever the answer is going to be: the connection's next request follows it.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer_headers = {}
        path = unquote(urlsplit(self.path).path)
        try:
            if self.hub.meet_fault(path):
                self.close_connection = True
            else:
                self._send(200, self._answer(path))
        except HubError as error:
            if error.code is not None:
                self.answer_headers["X-Error-Code"] = error.code
            self._send(error.status, {"error": str(error), **error.details})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def json(self):
        """The body of the request."""
        return json.loads(self.body)

    def _answer(self, path):
        for method, pattern, writes, answer in ROUTES:
            match = pattern.fullmatch(path)
            if match and self.command in method.split("|"):
                self.hub.authorize(self.headers.get("Authorization", "").removeprefix("Bearer "), writes)
                return answer(self.hub, self, *match.groups())
        raise HubError(404, f"There is no {self.command} {path}")

    def _send(self, status, answer):
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in self.answer_headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Says nothing of requests that went well or not: the client does."""


def _git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
