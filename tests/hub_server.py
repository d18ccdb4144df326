"""A stand-in for the Hub on 127.0.0.1, for the real `huggingface_hub` client in a process of its own.

It knows repositories of models and Spaces (the latter as `spaces/owner/name`) with branches and commits, small files
and LFS files, and can be told to fail.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


GOOD_TOKEN = "hf_good"
READ_TOKEN = "hf_read"
USER = "someone"
LFS_ABOVE = 10_000  # bytes; the Hub decides by type and size


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, message: str, files: dict[str, bytes], branch: str) -> Commit:
        content = repr((message, len(self.commits), sorted(files.items())))
        made = Commit(hashlib.sha1(content.encode()).hexdigest(), message, files)
        self.commits.append(made)
        self.branches[branch] = made.oid
        return made

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)


class HubServer:
    """Entered, it serves; `repositories` and `requests` tell what happened, `fail` makes the next request fail."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self._failures: list[tuple[re.Pattern, int | str]] = []
        self.released = threading.Event()  # ends the requests that hang
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, request: str, how: int | str, times: int = 1) -> None:
        """Answer the next requests that match `METHOD path` with a status, or `"drop"` them, or let them `"hang"`."""
        self._failures += [(re.compile(request), how)] * times

    def forgive(self) -> None:
        """Take back every failure that was asked for."""
        self._failures.clear()

    def failure_of(self, request: str) -> int | str | None:
        for index, (pattern, how) in enumerate(self._failures):
            if pattern.search(request):
                del self._failures[index]
                return how
        return None

    def reset(self) -> None:
        self.repositories.clear()
        self.lfs.clear()
        self.requests.clear()
        self._failures.clear()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client that talks to this server and to no other."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        client = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return {**kept, **client}


# Imports once what every client needs, then does each piece of work in a process that is forked off: the real client
# in a process of its own, without the seconds that its imports take.
_CLIENT = """
import json, os, sys, tempfile, traceback
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # importing it fails
sys.argv[1:] = []
exec(sys.stdin.readline().encode().decode("unicode_escape"))
for line in sys.stdin:
    work = json.loads(line)
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.environ.update(work["environment"])
        sys.argv[1:] = work["arguments"]
        status = 0
        try:
            exec(compile(work["code"], "<client>", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = []
    for file in (out, err):
        file.seek(0)
        said.append(file.read().decode())
    print(json.dumps([status, *said]), flush=True)
"""


class HubClient:
    """Runs Python code in processes that talk to a `HubServer`.

    Args:
        server: that they talk to.
        home: folder for the client's cache.
        preload: code that is run once for all of them.
        blocked: modules that they can't import.
    """

    def __init__(self, server: HubServer, home: Path, preload: str, blocked: tuple[str, ...] = ()):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT, json.dumps(blocked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=server.environment(home),
        )
        self._send(preload.encode("unicode_escape").decode())

    def __call__(
        self, code: str, *arguments: object, token: str | None = GOOD_TOKEN
    ) -> subprocess.CompletedProcess[str]:
        environment = {} if token is None else {"HF_TOKEN": token}
        self._send(json.dumps({"code": code, "arguments": [*map(str, arguments)], "environment": environment}))
        return subprocess.CompletedProcess(arguments, *json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()  # it holds nothing, and tearing torch down takes seconds
        self._process.communicate()

    def _send(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def _answer(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server_of.requests.append((self.command, path))
        failure = self.server_of.failure_of(request)
        if failure == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if failure == "hang":
            self.server_of.released.wait(60)
            return
        if failure is not None:
            self._error(int(failure), f"told to fail with {failure}")
            return
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                found = match.groupdict()
                if found.pop("kind", None) == "spaces":
                    found["repo"] = f"spaces/{found['repo']}"
                getattr(self, method)(**found)
                return
        self._error(404, f"the stand-in has no {request}", "EntryNotFound")

    # What the routes do

    def whoami(self) -> None:
        if self._token() not in (GOOD_TOKEN, READ_TOKEN):
            return self._error(401, "Invalid user token.")
        role = "write" if self._token() == GOOD_TOKEN else "read"
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self) -> None:
        if not self._may_write():
            return
        asked = json.loads(self._body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if asked.get("type") == "space":
            if asked.get("sdk") not in ("gradio", "docker", "static"):
                return self._error(400, "a Space needs an sdk")
            name = f"spaces/{name}"
        answer = {"url": f"{self.server_of.url}/{name}", "name": name}
        if name in self.server_of.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repository = self.server_of.repositories[name] = Repository(name, private)
        repository.commit("initial commit", {".gitattributes": b""}, "main")
        self._json(answer)

    def branch(self, repo: str, branch: str) -> None:
        repository = self._repository(repo) if self._may_write() else None
        if repository is not None:
            repository.branches[branch] = repository.branches["main"]
            self._json({})

    def preupload(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision) if self._may_write() else None
        if commit is None:
            return
        answers = []
        for file in json.loads(self._body)["files"]:
            mode = "lfs" if file["size"] > LFS_ABOVE or file["path"].endswith(".safetensors") else "regular"
            there = commit.files.get(file["path"])
            oid = None if there is None else _sha256(there) if mode == "lfs" else _git_sha1(there)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        if not self._may_write():
            return
        objects = []
        for asked in json.loads(self._body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server_of.lfs:
                entry["actions"] = {"upload": {"href": f"{self.server_of.url}/lfs/{asked['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if _sha256(self._body) != oid:
            return self._error(400, "wrong content")
        self.server_of.lfs[oid] = self._body
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        before = self._commit(repo, revision) if self._may_write() else None
        if before is None:
            return
        files, message = dict(before.files), ""
        for line in map(json.loads, self._body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server_of.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {name: content for name, content in files.items() if not name.startswith(value["path"])}
        made = self.server_of.repositories[repo].commit(message, files, revision)
        self._json({"commitOid": made.oid, "commitUrl": f"{self.server_of.url}/{repo}/commit/{made.oid}"})

    def info(self, repo: str, revision: str = "main") -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        private = self.server_of.repositories[repo].private
        name = repo.removeprefix("spaces/")
        about = {"id": name, "modelId": name, "sha": commit.oid, "private": private, "siblings": siblings, "tags": []}
        self._json({**about, "gated": False, "disabled": False, "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        entries = [
            {"type": "file", "path": name, "oid": _git_sha1(content), "size": len(content)}
            for name, content in sorted(commit.files.items())
            if name.startswith(f"{folder}/" if folder else "")
        ]
        if folder and not entries:
            return self._error(404, "no such folder", "EntryNotFound")
        self._json(entries)

    def resolve(self, repo: str, revision: str, file: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        if file not in commit.files:
            return self._error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        content = commit.files[file]
        self._send(200, content, {"X-Repo-Commit": commit.oid, "ETag": f'"{_sha256(content)}"'})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    # What they need

    def _token(self) -> str | None:
        said = self.headers.get("Authorization") or ""
        return said.removeprefix("Bearer ") or None

    def _may_write(self) -> bool:
        if self._token() == GOOD_TOKEN:
            return True
        known = self._token() == READ_TOKEN
        self._error(403 if known else 401, "You don't have the rights" if known else "Invalid username or password.")
        return False

    def _repository(self, repo: str) -> Repository | None:
        repository = self.server_of.repositories.get(repo)
        if repository is None or (repository.private and self._token() is None):
            # The Hub does not tell a stranger whether a private repository exists.
            self._error(401 if self._token() is None else 404, "Repository not found", "RepoNotFound")
            return None
        return repository

    def _commit(self, repo: str, revision: str) -> Commit | None:
        repository = self._repository(repo)
        commit = None if repository is None else repository.at(revision)
        if repository is not None and commit is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _json(self, content, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str | None = None, headers: dict | None = None) -> None:
        about = {"X-Error-Message": message, **({} if code is None else {"X-Error-Code": code}), **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **about})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_REPO = r"(?P<repo>(?:spaces/)?[^/]+/[^/]+)"
_API = r"/api/(?P<kind>models|spaces)/(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST {_API}/branch/(?P<branch>.+)", "branch"),
    (rf"POST {_API}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST {_API}/commit/(?P<revision>.+)", "commit"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>\w+)", "lfs_put"),
    (rf"GET {_API}", "info"),
    (rf"GET {_API}/revision/(?P<revision>[^/]+)", "info"),
    (rf"GET {_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
