"""A Hub on loopback, of the standard library: what huggingface_hub's own client needs to create, upload, read and fail.

One `Hub` is a server with its contents in a folder of its own. Tokens belong to accounts with roles, organisations and
scopes; faults are planned with `hub.fail(...)`; `hub.received` counts the bytes that arrived for each stored object, so
that a test can say what was sent twice. Protocol: the requests that `huggingface_hub` 2.4 makes (its `hf_api.py`,
`_commit_api.py`, `lfs.py`, `file_download.py`) and git-lfs' batch API
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md); errors carry the Hub's `X-Error-Code`.

As a program (`python tests/hub_server.py FOLDER`) it prints its address and serves until its input ends.
"""

import base64
import contextlib
import hashlib
import io
import json
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_ABOVE = 2_000  # bytes; the real Hub decides by .gitattributes, content and 10 MB
LFS_NAMES = (".safetensors", ".gguf", ".bin", ".png")
PART = 5_000_000  # objects above this go up in parts; the real Hub's limit for one request is 5 GB
BLOCK = 1 << 16
WHEN = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Account:
    """Who a token belongs to; `role` is `read`, `write` or `fineGrained` (then `scopes` maps a name to permissions)."""

    name: str
    role: str = "write"
    organisations: dict = field(default_factory=dict)
    scopes: dict = field(default_factory=dict)

    def may_write(self, repo_id):
        owner = repo_id.split("/")[0]
        if self.role == "fineGrained":
            return any("repo.write" in self.scopes.get(name, ()) for name in (owner, repo_id))
        return self.role == "write" and (owner == self.name or self.organisations.get(owner) in ("write", "admin"))

    def may_read(self, repo_id):
        return repo_id.split("/")[0] in (self.name, *self.organisations)


@dataclass(frozen=True)
class Blob:
    """A file's content, by its hashes."""

    sha256: str
    git: str
    size: int
    lfs: bool


@dataclass
class Repo:
    """Commits by id, each a whole tree of path -> `Blob`; refs by their full names."""

    private: bool
    gated: str | bool = False
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def add(self, ref, tree, message, description=""):
        content = json.dumps([message, len(self.commits), sorted((path, blob.sha256) for path, blob in tree.items())])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = tree
        self.refs[ref] = oid
        self.messages.append((ref, message + (f"\n\n{description}" if description else "")))
        return oid

    def find(self, revision):
        """The commit of a branch, a tag, a pull request's ref or a commit id; None if there is none."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        return revision if revision in self.commits else None


@dataclass
class Fault:
    """What happens to the next requests that match; see `Hub.fail`."""

    method: str
    pattern: re.Pattern
    times: int
    after: int
    status: int | None
    drop_after: int | None
    lose_answer: bool
    before: Callable | None
    headers: dict


class Hub:
    """The server's state, and what tests ask of it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.users = {"me-writes": Account("me"), "me-reads": Account("me", "read"), "you-writes": Account("you")}
        self.objects: set[str] = set()  # what is in the large-file store
        self.received: Counter = Counter()
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.quota = None
        self.part = PART
        self.lock = threading.RLock()
        self.news = threading.Condition(self.lock)  # told when an object is stored
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.errors: list[BaseException] = []  # bugs of this server; clients that go away are part of the tests
        self.server.handle_error = lambda request, address: self.errors.append(sys.exc_info()[1])
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)
        for error in self.errors:
            if not isinstance(error, ConnectionError):
                raise error

    def fail(self, method, path, times=1, *, status=None, drop_after=None, retry_after=None, after=0, lose_answer=False,
             before=None, headers=None):
        """Plan a fault for the next `times` requests whose path matches, once `after` of them have passed unharmed.

        Args:
            status: answer with it.
            drop_after: cut the connection after so many bytes of the body.
            lose_answer: do what was asked, then cut the connection instead of answering.
            before: called first (after the bytes of `drop_after`); with nothing else the request then goes its way.
            retry_after, headers: of the answer.
        """
        headers = {**(headers or {}), **({"Retry-After": str(retry_after)} if retry_after is not None else {})}
        with self.lock:
            self.faults.append(Fault(method, re.compile(path), times, after, status, drop_after, lose_answer, before, headers))

    def slow(self, method, path, seconds, times=1):
        """The next `times` matching requests take so many seconds longer."""
        self.fail(method, path, times, before=lambda: self.closing.wait(seconds))

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and fault.pattern.search(path):
                    if fault.after > 0:
                        fault.after -= 1
                    else:
                        fault.times -= 1
                        return fault
        return None

    def hold(self, method, path, drop_after=0):
        """Stop the next matching request after so many bytes; return two events: it has stopped, and let it go (cut off)."""
        reached, release = threading.Event(), threading.Event()

        def wait():
            reached.set()
            release.wait(120)

        self.fail(method, path, drop_after=drop_after, before=wait)
        return reached, release

    def wait_for(self, oid, seconds=60):
        """Whether an object is stored, within so many seconds."""
        with self.news:
            return self.news.wait_for(lambda: oid in self.objects, seconds)

    def keep(self, content, lfs=False):
        """Store a file's content (bytes) and return its `Blob`."""
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / "objects" / digest).write_bytes(content)
        return Blob(digest, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content), lfs)

    def content(self, blob):
        return (self.folder / "objects" / blob.sha256).read_bytes()

    def make(self, repo_id, files=None, private=True, message="initial commit", **settings):
        """Make a repository as somebody else would have."""
        repo = self.repos[repo_id] = Repo(private, **settings)
        tree = {".gitattributes": self.keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        repo.add("refs/heads/main", tree | {path: self.keep(text) for path, text in (files or {}).items()}, message)
        return repo

    def write(self, repo_id, files, branch="main", message="theirs"):
        """Commit as somebody else would have: path -> bytes, None deletes."""
        with self.lock:
            repo = self.repos[repo_id]
            tree = dict(repo.commits[repo.find(branch)]) | {path: text and self.keep(text) for path, text in files.items()}
            return repo.add(f"refs/heads/{branch}", {path: blob for path, blob in tree.items() if blob}, message)

    def files(self, repo_id, revision="main"):
        """Path -> content of a revision."""
        repo = self.repos[repo_id]
        return {path: self.content(blob) for path, blob in repo.commits[repo.find(revision)].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        """Stay quiet; what was asked is kept in `hub.requests`."""

    # --- reading a request, sending an answer

    def answer(self, status, content=b"", headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.lose:
            self.cut()
            return
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code=None, message="refused", headers=()):
        self.body()
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **dict(headers)}
        self.answer(status, {"error": message}, named)

    def cut(self):
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may have gone first
            self.connection.shutdown(socket.SHUT_RDWR)

    def blocks(self, limit=None):
        """The body as it arrives; once, and at most `limit` bytes of it."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            left = 0 if self.is_read else None
            self.is_read = True
            while left is None and (size := int(self.rfile.readline().strip() or b"0", 16)):
                yield self.rfile.read(size)
                self.rfile.readline()
            return
        left = 0 if self.is_read else int(self.headers.get("Content-Length") or 0)
        left = left if limit is None else min(limit, left)
        self.is_read = True
        while left and (block := self.rfile.read1(min(BLOCK, left))):
            left -= len(block)
            yield block

    def body(self, limit=None):
        return b"".join(self.blocks(limit))

    def asked(self):
        return json.loads(self.body() or b"{}")

    def account(self):
        return self.hub.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    # --- routing

    def handle_any(self):
        self.is_read = self.lose = False
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query, keep_blank_values=True)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        if (fault := self.hub.fault(self.command, path)) and self.suffers(fault, path):
            return
        for method, pattern, name in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, address.path)):
                getattr(self, name)(*(group and unquote(group) for group in match.groups()))
                self.body()  # what nobody read must not be taken for the next request
                return
        self.refuse(404, message=f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def suffers(self, fault, path):
        """Whether the planned fault was all that happens to this request."""
        if fault.drop_after is not None:
            content = self.body(fault.drop_after)
            if path.startswith("/storage/"):
                self.hub.received[path.split("/")[2]] += len(content)
        if fault.before:
            fault.before()
        self.lose = fault.lose_answer
        if fault.status is not None:
            self.refuse(fault.status, message="planned fault", headers=fault.headers)
        elif fault.drop_after is not None:
            self.cut()
        return fault.status is not None or fault.drop_after is not None

    # --- who and where

    def repo(self, repo_id, write=False, propose=False):
        """The repository if the account may see it (or change it, or propose to); otherwise refuse and return None."""
        account, repo = self.account(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not (account and account.may_read(repo_id))):
            self.refuse(401 if account is None else 404, "RepoNotFound", "Repository not found")
        elif write and not (account and account.may_write(repo_id)):
            self.refuse(403, message="You don't have the required permissions: this token is read-only or not of the owner")
        elif propose and (account is None or account.role == "read"):
            self.refuse(403, message="This token may not open pull requests")
        else:
            return repo
        return None

    def commit_of(self, repo, revision):
        oid = repo.find(revision)
        if oid is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def whoami(self):
        account = self.account()
        if account is None:
            self.refuse(401, message="Invalid credentials in Authorization header")
            return
        token = {"displayName": "test", "role": account.role, "createdAt": WHEN}
        if account.role == "fineGrained":
            token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": [
                {"entity": {"_id": name, "type": "model" if "/" in name else "user", "name": name}, "permissions": list(allowed)}
                for name, allowed in account.scopes.items()]}
        organisations = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.organisations.items()]
        self.answer(200, {"type": "user", "id": account.name, "name": account.name, "fullname": account.name,
                          "orgs": organisations, "auth": {"type": "access_token", "accessToken": token}})

    def create(self):
        wish, account = self.asked(), self.account()
        if account is None:
            self.refuse(401, message="Invalid username or password.")
            return
        repo_id = f"{wish.get('organization') or account.name}/{wish['name']}"
        if not account.may_write(repo_id):
            self.refuse(403, message=f"You don't have the rights to create a model under the namespace {repo_id.split('/')[0]}")
            return
        with self.hub.lock:
            if repo_id in self.hub.repos:
                self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"})
                return
            self.hub.make(repo_id, private=wish.get("private", wish.get("visibility") == "private"))
        self.answer(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def delete(self):
        wish, account = self.asked(), self.account()
        repo_id = f"{wish.get('organization') or account.name}/{wish['name']}"
        if self.repo(repo_id, write=True):
            del self.hub.repos[repo_id]
            self.answer(200, {})

    def settings(self, repo_id):
        if repo := self.repo(repo_id, write=True):
            wish = self.asked()
            repo.private = wish.get("private", wish.get("visibility", "private" if repo.private else "public") == "private")
            repo.gated = wish.get("gated", repo.gated)
            self.answer(200, {})

    # --- reading

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if oid:
            siblings = [{"rfilename": path, **(self.sibling(blob) if "blobs" in self.query else {})}
                        for path, blob in sorted(repo.commits[oid].items())]
            self.answer(200, {"_id": "1", "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": oid,
                              "private": repo.private, "gated": repo.gated, "disabled": False, "tags": [], "downloads": 0,
                              "likes": 0, "lastModified": WHEN, "createdAt": WHEN, "siblings": siblings})

    @staticmethod
    def sibling(blob):
        found = {"blobId": blob.git, "size": blob.size}
        return found | ({"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {})

    @staticmethod
    def entry(path, blob):
        found = {"type": "file", "path": path, "oid": blob.git, "size": blob.size}
        return found | ({"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {})

    def tree(self, repo_id, revision, _=None, folder=""):
        repo = self.repo(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if not oid:
            return
        start = f"{folder.strip('/')}/" if folder else ""
        inside = {path: blob for path, blob in sorted(repo.commits[oid].items()) if path.startswith(start)}
        if start and not inside:
            self.refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}", {"X-Repo-Commit": oid})
            return
        if self.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
            entries = [self.entry(path, blob) for path, blob in inside.items()]
        else:
            entries = [self.entry(path, blob) for path, blob in inside.items() if "/" not in path.removeprefix(start)]
            folders = {start + path.removeprefix(start).split("/")[0] for path in inside if "/" in path.removeprefix(start)}
            entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        self.answer(200, entries)

    def paths_info(self, repo_id, revision):
        repo = self.repo(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if oid:
            sent = self.body().decode()
            paths = parse_qs(sent).get("paths") or json.loads(sent)["paths"]
            self.answer(200, [self.entry(path, repo.commits[oid][path]) for path in paths if path in repo.commits[oid]])

    def refs(self, repo_id):
        if repo := self.repo(repo_id):
            kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
            named = {kind: [{"name": ref.removeprefix(start) if kind != "pullRequests" else ref, "ref": ref, "targetCommit": oid}
                            for ref, oid in repo.refs.items() if ref.startswith(start)] for kind, start in kinds.items()}
            self.answer(200, {**named, "converts": []})

    def commits(self, repo_id, revision):
        repo = self.repo(repo_id)
        if repo and self.commit_of(repo, revision):
            self.answer(200, [{"id": oid, "authors": [], "date": WHEN, "title": message.splitlines()[0], "message": message}
                              for oid, (_, message) in reversed(list(zip(repo.commits, repo.messages, strict=True)))])

    def resolve(self, repo_id, revision, path):
        repo = self.repo(repo_id)
        oid = repo and self.commit_of(repo, revision)
        if not oid:
            return
        account = self.account()
        if repo.gated and not (account and account.may_read(repo_id)):
            self.refuse(401 if account is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted")
            return
        if path not in repo.commits[oid]:
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": oid})
            return
        blob = repo.commits[oid][path]
        etag = f'"{blob.sha256 if blob.lfs else blob.git}"'
        headers = {"X-Repo-Commit": oid, "ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(blob.size)}
        self.send_content(blob, headers)

    def send_content(self, blob, headers):
        first, last, status = 0, blob.size - 1, 200
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            if first > last:
                self.refuse(416, message="no such range", headers={"Content-Range": f"bytes */{blob.size}"})
                return
            headers, status = headers | {"Content-Range": f"bytes {first}-{last}/{blob.size}"}, 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(last - first + 1)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with (self.hub.folder / "objects" / blob.sha256).open("rb") as file:
            file.seek(first)
            left = last - first + 1
            while left and (block := file.read(min(BLOCK, left))):
                self.wfile.write(block)
                left -= len(block)

    # --- writing

    def branch(self, repo_id, name, kind="heads"):
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return
        start = self.asked().get("startingPoint") or "main"
        if f"refs/{kind}/{name}" in repo.refs:
            self.refuse(409, message="Reference already exists")
        elif (oid := repo.find(start)) is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        else:
            repo.refs[f"refs/{kind}/{name}"] = oid
            self.answer(200, {})

    def delete_branch(self, repo_id, name):
        if (repo := self.repo(repo_id, write=True)) and self.commit_of(repo, f"refs/heads/{name}"):
            del repo.refs[f"refs/heads/{name}"]
            self.answer(200, {})

    def tag(self, repo_id, revision):
        if (repo := self.repo(repo_id, write=True)) and (oid := self.commit_of(repo, revision)):
            repo.refs[f"refs/tags/{self.asked()['tag']}"] = oid
            self.answer(200, {})

    def may_commit(self, repo_id, revision):
        """The repository, if the account may commit to it or propose to."""
        propose = "create_pr" in self.query or revision.startswith("refs/pr/")
        return self.repo(repo_id, write=not propose, propose=propose)

    def preupload(self, repo_id, revision):
        repo = self.may_commit(repo_id, revision)
        oid = repo and self.commit_of(repo, revision)
        if not oid:
            return
        tree, wish, files = repo.commits[oid], self.asked(), []
        rules = wish.get("gitIgnore") or (self.hub.content(tree[".gitignore"]).decode() if ".gitignore" in tree else "")
        for file in wish["files"]:
            there = tree.get(file["path"])
            large = file["size"] > LFS_ABOVE or file["path"].endswith(LFS_NAMES)
            known = {"oid": there.sha256 if there.lfs else there.git} if there else {}
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular",
                          "shouldIgnore": file["path"] in rules.splitlines(), **known})
        self.answer(200, {"files": files})

    def batch(self, repo_id):
        if self.repo(repo_id, propose=True) is None:
            return
        used, answers = sum((self.hub.folder / "objects" / name).stat().st_size for name in self.hub.objects), []
        for wish in self.asked()["objects"]:
            used += 0 if wish["oid"] in self.hub.objects else wish["size"]
            answers.append(self.instruction(wish, wish["oid"], wish["size"], used))
        self.answer(200, {"transfer": "basic", "objects": answers})

    def instruction(self, wish, oid, size, used):
        """How an object is to be sent; nothing, if it is here. With it the account would use `used` bytes."""
        if oid in self.hub.objects:
            return wish
        if self.hub.quota is not None and used > self.hub.quota:
            return {**wish, "error": {"code": 403, "message": "Private repository storage limit reached"}}
        if size > self.hub.part:
            urls = {str(i): f"{self.hub.url}/storage/{oid}/{i}" for i in range(1, -(-size // self.hub.part) + 1)}
            header = {"chunk_size": str(self.hub.part), **urls}
            return {**wish, "actions": {"upload": {"href": f"{self.hub.url}/complete/{oid}", "header": header}}}
        return {**wish, "actions": {"upload": {"href": f"{self.hub.url}/storage/{oid}"},
                                    "verify": {"href": f"{self.hub.url}/verify/{oid}"}}}

    def store(self, oid, _=None, part=None):
        digest, etag = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, delete=False) as file:
            for block in self.blocks():
                self.hub.received[oid] += len(block)
                digest.update(block)
                etag.update(block)
                file.write(block)
            size = file.tell()
        if size < int(self.headers.get("Content-Length") or size):  # the client went away in the middle
            Path(file.name).unlink()
            self.cut()
            return
        if part:
            Path(file.name).replace(self.hub.folder / f"{oid}.{part}")
        elif not self.accept(oid, Path(file.name), digest.hexdigest()):
            return
        self.answer(200, b"", {"ETag": f'"{etag.hexdigest()}"'})

    def accept(self, oid, path, digest):
        """Whether a file has the content its name promises; then it is in the store."""
        if digest != oid:
            path.unlink()
            self.refuse(400, message="content and name differ")
            return False
        path.replace(self.hub.folder / "objects" / oid)
        with self.hub.lock:
            self.hub.objects.add(oid)
            self.hub.news.notify_all()
        return True

    def complete(self, oid):
        parts = self.asked()["parts"]
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, delete=False) as whole:
            for part in sorted(wish["partNumber"] for wish in parts):
                path = self.hub.folder / f"{oid}.{part}"
                whole.write(path.read_bytes())
                digest.update(path.read_bytes())
                path.unlink()
        if self.accept(oid, Path(whole.name), digest.hexdigest()):
            self.answer(200, {})

    def verify(self, oid):
        path = self.hub.folder / "objects" / oid
        if oid in self.hub.objects and path.stat().st_size == self.asked()["size"]:
            self.answer(200, {})
        else:
            self.refuse(404, message="no such object")

    def validate_yaml(self):
        """A card's header must at least be one; the real Hub knows more rules."""
        text = self.asked()["content"]
        wrong = text.startswith("---\n") and not re.match(r"---\n(\s*[\w-]+:.*\n|\s*- .*\n|\s+.*\n|#.*\n|\n)*---\n", text)
        problems = [{"message": "the metadata block is not valid YAML"}] if wrong else []
        self.answer(400 if wrong else 200, {"errors": problems, "warnings": []})

    def commit(self, repo_id, revision):
        repo = self.may_commit(repo_id, revision)
        head = repo and self.commit_of(repo, revision)
        if not head:
            return
        lines = [json.loads(line) for line in io.BytesIO(self.body()) if line.strip()]
        header, propose = next(line["value"] for line in lines if line["key"] == "header"), "create_pr" in self.query
        parent = header.get("parentCommit")
        with self.hub.lock:
            if parent is not None and not propose and parent != repo.find(revision):
                self.refuse(412, message="A commit has happened since. Please refresh and try again.")
                return
            tree = dict(repo.commits[parent or repo.find(revision)])
            if problem := self.apply(tree, lines):
                self.refuse(*problem)
                return
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            ref = f"refs/pr/{number}" if propose else revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            oid = repo.add(ref, tree, header["summary"], header.get("description") or "")
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}",
                          "hookOutput": "", "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}" if propose else None})

    def apply(self, tree, lines):
        """Change `tree` as the lines of a commit say; the refusal's arguments if that is not possible."""
        for value, key in ((line["value"], line["key"]) for line in lines):
            if key == "file":
                tree[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return 422, None, f"LFS object {value['oid']} is missing"
                content = (self.hub.folder / "objects" / value["oid"]).read_bytes()
                tree[value["path"]] = self.hub.keep(content, lfs=True)
            elif key == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    return 404, "EntryNotFound", "A file with this name doesn't exist"
            elif key == "deletedFolder":
                for path in [path for path in tree if path.startswith(value["path"].rstrip("/") + "/")]:
                    del tree[path]
        return None


_ID, _REV = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"/api/models/{_ID}", "info"),
    ("GET", f"/api/models/{_ID}/revision/{_REV}", "info"),
    ("GET", f"/api/models/{_ID}/tree/{_REV}(/(.*))?", "tree"),
    ("POST", f"/api/models/{_ID}/paths-info/{_REV}", "paths_info"),
    ("GET", f"/api/models/{_ID}/refs", "refs"),
    ("GET", f"/api/models/{_ID}/commits/{_REV}", "commits"),
    ("PUT", f"/api/models/{_ID}/settings", "settings"),
    ("POST", f"/api/models/{_ID}/branch/{_REV}", "branch"),
    ("DELETE", f"/api/models/{_ID}/branch/{_REV}", "delete_branch"),
    ("POST", f"/api/models/{_ID}/tag/{_REV}", "tag"),
    ("POST", f"/api/models/{_ID}/preupload/{_REV}", "preupload"),
    ("POST", f"/api/models/{_ID}/commit/{_REV}", "commit"),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/storage/([0-9a-f]{64})(/([0-9]+))?", "store"),
    ("POST", "/complete/([0-9a-f]{64})", "complete"),
    ("POST", "/verify/([0-9a-f]{64})", "verify"),
    ("GET", f"/{_ID}/resolve/{_REV}/(.+)", "resolve"),
    ("HEAD", f"/{_ID}/resolve/{_REV}/(.+)", "resolve"),
]


@contextlib.contextmanager
def running(folder=None):
    """Context with a running `Hub`; its contents are in `folder`, by default a temporary one."""
    place = Path(folder or tempfile.mkdtemp(prefix="hub-"))
    made = Hub(place)
    try:
        yield made
    finally:
        made.close()
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def used_by_this_process(hub, monkeypatch, cache, token="me-writes"):
    """Let `huggingface_hub` in this process talk to `hub` (its constants were read from the environment at import)."""
    from huggingface_hub import constants, hf_api

    for name, value in environment_of(hub, cache, token).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # clients made once keep the address of their first moment
    if "transformers.utils.hub" in sys.modules:
        monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None)
    yield hub


def environment_of(hub, cache, token="me-writes"):
    """What a fresh process needs to talk to `hub`."""
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}


if __name__ == "__main__":
    with running(sys.argv[1] if len(sys.argv) > 1 else None) as served:
        print(served.url, flush=True)
        sys.stdin.read()
