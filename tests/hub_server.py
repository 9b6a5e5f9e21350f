"""A Hub on loopback, of the standard library: what huggingface_hub's own client needs to create, upload, read and fail.

One `Hub` is a server thread with its repositories in memory. Tokens belong to users and may be read-only. Faults are
planned with `hub.fail(...)`; `hub.received` counts the bytes of each stored object, so that a test can say what was sent
twice. Protocol: the requests that `huggingface_hub` 2.4 makes (its `hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`), and git-lfs' batch API.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_ABOVE = 2_000  # bytes; the real Hub decides by .gitattributes and size
PART = 5_000_000  # objects above this go up in parts
WHEN = "2026-01-01T00:00:00.000Z"


def git_blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Commits by id: each is a whole tree of path -> (content, is LFS)."""

    private: bool
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def add(self, ref, tree, message):
        oid = hashlib.sha1(f"{message}{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits[oid] = tree
        self.refs[ref] = oid
        self.messages.append((ref, message))
        return oid

    def find(self, revision):
        """The commit of a branch, a pull request's ref or a commit id."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        return revision if revision in self.commits else None


class Hub:
    """The server's state, and what tests ask of it."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.users = {"me-writes": ("me", "write"), "me-reads": ("me", "read"), "you-writes": ("you", "write")}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.received: Counter = Counter()
        self.requests: list[tuple[str, str]] = []
        self.faults: list[list] = []
        self.quota = None
        self.part = PART
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    def fail(self, method, path, times=1, status=None, drop_after=None, retry_after=None):
        """The next `times` requests whose path matches are answered with `status`, or cut off after so many bytes of body."""
        self.faults.append([method, re.compile(path), times, status, drop_after, retry_after])

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and fault[2] > 0 and fault[1].search(path):
                    fault[2] -= 1
                    return fault
        return None

    def files(self, repo_id, revision="main"):
        """Path -> content of a revision."""
        repo = self.repos[repo_id]
        return {path: content for path, (content, _) in repo.commits[repo.find(revision)].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        """Stay quiet; what was asked is kept in `hub.requests`."""

    # --- answers

    def answer(self, status, content=b"", headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code=None, message="refused", headers=()):
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **dict(headers)}
        self.answer(status, {"error": message}, named)

    def body(self, limit=None):
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if limit is None else min(limit, length))

    def user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.users.get(token, (None, None))

    # --- routing

    def handle_any(self):
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        if fault := self.hub.fault(self.command, path):
            _, _, _, status, drop_after, retry_after = fault
            if status is None:
                content = self.body(drop_after)
                if path.startswith("/storage/"):
                    self.hub.received[path.split("/")[2]] += len(content)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.body()
            self.refuse(status, message="planned fault", headers={"Retry-After": retry_after} if retry_after else {})
            return
        for method, pattern, name in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, address.path)):
                getattr(self, name)(*(group and unquote(group) for group in match.groups()))
                return
        self.body()
        self.refuse(404, message=f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # --- who and where

    def repo(self, repo_id, write=False):
        """The repository if the user may see (or change) it; otherwise the refusal is sent and None returned."""
        name, role = self.user()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and name != repo_id.split("/")[0]):
            self.body()
            self.refuse(401 if name is None else 404, "RepoNotFound", "Repository not found")
        elif write and (name != repo_id.split("/")[0] or role != "write"):
            self.body()
            self.refuse(403, message="You don't have the required permissions: this token is read-only or not of the owner")
        else:
            return repo
        return None

    def commit_of(self, repo, revision):
        oid = repo.find(revision)
        if oid is None:
            self.body()
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def whoami(self):
        name, role = self.user()
        if name is None:
            self.refuse(401, message="Invalid credentials in Authorization header")
            return
        self.answer(200, {"type": "user", "name": name, "fullname": name, "orgs": [],
                          "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}})

    def create(self):
        wish, (name, role) = json.loads(self.body()), self.user()
        owner = wish.get("organization") or name
        if name is None or role != "write" or owner != name:
            self.refuse(401 if name is None else 403, message="You don't have the rights to create a model under this namespace")
            return
        repo_id = f"{owner}/{wish['name']}"
        with self.hub.lock:
            if repo_id in self.hub.repos:
                self.refuse(409, message="You already created this model repo")
                return
            made = self.hub.repos[repo_id] = Repo(wish.get("private", wish.get("visibility") == "private"))
            made.add("refs/heads/main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.answer(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    # --- reading

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if oid:
            blobs = "blobs" in self.query
            siblings = [{"rfilename": path, **(self.blob(content, lfs) if blobs else {})}
                        for path, (content, lfs) in sorted(repo.commits[oid].items())]
            self.answer(200, {"_id": "1", "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": oid,
                              "private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0,
                              "likes": 0, "lastModified": WHEN, "createdAt": WHEN, "siblings": siblings})

    @staticmethod
    def blob(content, lfs):
        found = {"blobId": git_blob_id(content), "size": len(content)}
        return found | ({"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}} if lfs else {})

    @staticmethod
    def entry(path, content, lfs):
        found = {"type": "file", "path": path, "oid": git_blob_id(content), "size": len(content)}
        return found | ({"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}} if lfs else {})

    def tree(self, repo_id, revision, _=None, folder=""):
        repo = self.repo(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if oid:
            self.answer(200, [self.entry(path, *what) for path, what in sorted(repo.commits[oid].items())
                              if path.startswith(folder or "")])

    def paths_info(self, repo_id, revision):
        repo = self.repo(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if oid:
            sent = self.body().decode()
            paths = parse_qs(sent).get("paths") or json.loads(sent)["paths"]
            self.answer(200, [self.entry(path, *repo.commits[oid][path]) for path in paths if path in repo.commits[oid]])

    def refs(self, repo_id):
        if repo := self.repo(repo_id):
            branches = [{"name": ref.removeprefix("refs/heads/"), "ref": ref, "targetCommit": oid}
                        for ref, oid in repo.refs.items() if ref.startswith("refs/heads/")]
            pulls = [{"name": ref, "ref": ref, "targetCommit": oid} for ref, oid in repo.refs.items() if "/pr/" in ref]
            self.answer(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def resolve(self, repo_id, revision, path):
        repo = self.repo(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if not oid:
            return
        if path not in repo.commits[oid]:
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": oid})
            return
        content, lfs = repo.commits[oid][path]
        etag = hashlib.sha256(content).hexdigest() if lfs else git_blob_id(content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            self.answer(206, content[first:last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})
        else:
            self.answer(200, content, headers)

    # --- writing

    def branch(self, repo_id, name):
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return
        start = json.loads(self.body() or b"{}").get("startingPoint") or "main"
        if f"refs/heads/{name}" in repo.refs:
            self.refuse(409, message="Reference already exists")
        elif (oid := repo.find(start)) is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        else:
            repo.refs[f"refs/heads/{name}"] = oid
            self.answer(200, {})

    def may_commit(self, repo_id):
        """The repository, if the user may commit to it or propose to."""
        return self.repo(repo_id, write="create_pr" not in self.query)

    def preupload(self, repo_id, revision):
        repo = self.may_commit(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if not oid:
            return
        files = []
        for file in json.loads(self.body())["files"]:
            there = repo.commits[oid].get(file["path"])
            large = file["size"] > LFS_ABOVE or file["path"].endswith((".safetensors", ".gguf", ".png"))
            known = {"oid": hashlib.sha256(there[0]).hexdigest() if there[1] else git_blob_id(there[0])} if there else {}
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
        self.answer(200, {"files": files})

    def batch(self, repo_id):
        if self.repo(repo_id) is None:
            return
        answers = []
        for wish in json.loads(self.body())["objects"]:
            oid, size = wish["oid"], wish["size"]
            if self.hub.quota is not None and sum(map(len, self.hub.objects.values())) + size > self.hub.quota:
                answers.append({**wish, "error": {"code": 403, "message": "Private repository storage limit reached"}})
            elif oid in self.hub.objects:
                answers.append(wish)
            elif size > self.hub.part:
                count = -(-size // self.hub.part)
                urls = {str(i): f"{self.hub.url}/storage/{oid}/{i}" for i in range(1, count + 1)}
                header = {"chunk_size": str(self.hub.part), **urls}
                answers.append({**wish, "actions": {"upload": {"href": f"{self.hub.url}/complete/{oid}", "header": header}}})
            else:
                answers.append({**wish, "actions": {"upload": {"href": f"{self.hub.url}/storage/{oid}"},
                                                    "verify": {"href": f"{self.hub.url}/verify/{oid}"}}})
        self.answer(200, {"transfer": "basic", "objects": answers})

    def store(self, oid, _=None, part=None):
        content = self.body()
        self.hub.received[oid] += len(content)
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = content
        elif hashlib.sha256(content).hexdigest() == oid:
            self.hub.objects[oid] = content
        else:
            self.refuse(400, message="content and name differ")
            return
        self.answer(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def complete(self, oid):
        self.body()
        whole = b"".join(content for _, content in sorted(self.hub.parts.pop(oid).items()))
        if hashlib.sha256(whole).hexdigest() != oid:
            self.refuse(400, message="content and name differ")
            return
        self.hub.objects[oid] = whole
        self.answer(200, {})

    def verify(self, oid):
        size = json.loads(self.body())["size"]
        there = len(self.hub.objects.get(oid, b"")) == size
        self.answer(200, {}) if there else self.refuse(404, message="no such object")

    def commit(self, repo_id, revision):
        repo = self.may_commit(repo_id)
        head = repo and self.commit_of(repo, revision)
        if not head:
            return
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            if header.get("parentCommit") not in (None, repo.find(revision)):
                self.refuse(412, message="A commit has happened since. Please refresh and try again.")
                return
            tree = dict(repo.commits[head])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    tree[value["path"]] = (base64.b64decode(value["content"]), False)
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        self.refuse(422, message=f"LFS object {value['oid']} is missing")
                        return
                    tree[value["path"]] = (self.hub.objects[value["oid"]], True)
                elif line["key"] == "deletedFile":
                    tree.pop(value["path"], None)
                elif line["key"] == "deletedFolder":
                    tree = {path: what for path, what in tree.items() if not path.startswith(value["path"].rstrip("/") + "/")}
            number = 1 + sum("/pr/" in ref for ref in repo.refs)
            ref = f"refs/pr/{number}" if "create_pr" in self.query else revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            oid = repo.add(ref, tree, header["summary"])
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}",
                          "hookOutput": "", "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}"
                          if "create_pr" in self.query else None})


_ID, _REV = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"/api/models/{_ID}", "info"),
    ("GET", f"/api/models/{_ID}/revision/{_REV}", "info"),
    ("GET", f"/api/models/{_ID}/tree/{_REV}(/(.*))?", "tree"),
    ("POST", f"/api/models/{_ID}/paths-info/{_REV}", "paths_info"),
    ("GET", f"/api/models/{_ID}/refs", "refs"),
    ("POST", f"/api/models/{_ID}/branch/{_REV}", "branch"),
    ("POST", f"/api/models/{_ID}/preupload/{_REV}", "preupload"),
    ("POST", f"/api/models/{_ID}/commit/{_REV}", "commit"),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/storage/([0-9a-f]{64})(/([0-9]+))?", "store"),
    ("POST", "/complete/([0-9a-f]{64})", "complete"),
    ("POST", "/verify/([0-9a-f]{64})", "verify"),
    ("GET", f"/{_ID}/resolve/{_REV}/(.+)", "resolve"),
    ("HEAD", f"/{_ID}/resolve/{_REV}/(.+)", "resolve"),
]


def _validate_yaml(self):
    self.body()
    self.answer(200, {"errors": [], "warnings": []})


Handler.validate_yaml = _validate_yaml


@contextlib.contextmanager
def running():
    """Context with a running `Hub`."""
    made = Hub()
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def used_by_this_process(hub, monkeypatch, cache, token="me-writes"):
    """Let `huggingface_hub` in this process talk to `hub` (its constants were read from the environment at import)."""
    from huggingface_hub import constants

    for name, value in environment_of(hub, cache, token).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    yield hub


def environment_of(hub, cache, token="me-writes"):
    """What a fresh process needs to talk to `hub`."""
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
