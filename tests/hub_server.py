"""A Hub on the loopback that speaks the protocol of huggingface_hub's client, without Xet, and fails on demand.

What it answers to, by the names that `fault` and `seen` use:

    whoami create settings info auth tree paths preupload batch upload verify commit commits refs branch tag yaml
    resolve download

Small files are git blobs; what is larger than LARGE or safetensors or parquet goes through LFS: batch, upload with the
SHA-256 checked, verify, and a redirect to /cdn on the way back, which takes range requests.
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 100_000
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
OWNER, TOKEN = "ada", "hf_" + "TestTokenOfAda00000000"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Repo:
    """Commits (`oid`, `title`, `parent`, `files`: path -> bytes), newest last, and where branches and tags point."""

    private: bool
    commits: dict[str, dict] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, title: str, files: dict[str, bytes]) -> str:
        refs = self.pulls if ref.startswith("refs/pr/") else self.branches
        parent = refs.get(ref)
        content = repr((parent, title, sorted((path, sha256(data)) for path, data in files.items())))
        oid = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[oid] = {"oid": oid, "title": title, "parent": parent, "files": files}
        refs[ref] = oid
        return oid

    def at(self, revision: str) -> dict | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or self.pulls.get(revision) or revision
        return self.commits.get(oid)

    @property
    def files(self) -> dict[str, bytes]:
        return self.at("main")["files"]


class Hub(ThreadingHTTPServer):
    """`fault(step, number, path)` decides about the number-th request of a step (from 1): None, a status, "lost" (the
    connection is dropped unanswered), "hang", "applied" (done, but the answer is lost) or "corrupt" (a wrong byte)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}/cdn"  # another host to the client, which keeps its token back
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.tokens = {TOKEN: {"name": OWNER, "role": "write", "orgs": []}}
        self.seen: Counter = Counter()
        self.tokens_at_cdn = 0
        self.log: list[tuple[str, str, str]] = []  # step, method, path
        self.error_headers: dict[str, str] = {}
        self.go_on = threading.Event()  # ends what hangs
        self.fault = lambda step, number, path: None

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the tests

    def put(self, repo_id: str, folder, kind: str = "model", private: bool = False, **files: bytes) -> Repo:
        """A repo that is there already: the files of a folder, and others by name."""
        content = {".gitattributes": GITATTRIBUTES, **files}
        paths = sorted(Path(folder).rglob("*")) if folder else []
        content |= {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}
        repo = self.repos[kind, repo_id] = Repo(private)
        repo.add("main", "initial commit", content)
        self.lfs |= (objects := {sha256(data): data for path, data in content.items() if large(path, len(data))})
        self.verified |= objects.keys()
        return repo

    def environment(self, home) -> dict[str, str]:
        """Of a client that has nothing in its cache."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_request(self):
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self.read_body()
        self.applied = False
        routes = [(found, step) for pattern, step in ROUTES if (found := re.fullmatch(pattern, url.path))]
        if not routes:
            return self.answer(404, {"error": "no such route"})
        found, step = routes[0]
        hub = self.server
        with hub.lock:
            hub.seen[step] += 1
            hub.log.append((step, self.command, unquote(self.path)))
            fault = hub.fault(step, hub.seen[step], unquote(url.path))
        self.corrupt = fault == "corrupt"
        if isinstance(fault, int):
            return self.answer(fault, {"error": "told to fail"}, **hub.error_headers)
        if fault == "hang":
            hub.go_on.wait(60)
        if fault in ("lost", "hang"):
            self.close_connection = True
            return None
        self.silent = fault == "applied"
        with hub.lock:
            return getattr(self, f"do_{step}")(*(unquote(group or "") for group in found.groups()))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    # ---- who asks, and for what

    def user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.server.tokens.get(token)

    def may_write(self, repo_id):
        user = self.user()
        return user and user["role"] != "read" and repo_id.split("/")[0] in [user["name"], *user["orgs"]]

    def repo(self, kind, repo_id, write=False):
        """The repo, or None after the refusal that the Hub gives."""
        found = self.server.repos.get((KINDS.get(kind, kind), repo_id))
        if self.headers.get("Authorization") and not self.user():
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if found is None or (found.private and not (self.user() and self.sees(repo_id))):
            return self.refuse(404 if self.user() else 401, "RepoNotFound", "Repository not found")
        if write and not self.may_write(repo_id):
            return self.refuse(403, "", "you must use a write token to upload to a repository")
        return found

    def sees(self, repo_id):
        return repo_id.split("/")[0] in [self.user()["name"], *self.user()["orgs"]]

    def commit_at(self, repo, revision):
        return repo.at(revision) or self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # ---- the routes

    def do_whoami(self):
        user = self.user()
        if not user:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        orgs = [{"name": name, "roleInOrg": "write"} for name in user["orgs"]]
        access = {"displayName": "test", "role": user["role"]}
        return self.answer(200, {"type": "user", "name": user["name"], "orgs": orgs, "auth": {"accessToken": access}})

    def do_create(self):
        asked = json.loads(self.body)
        if not self.user():
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        repo_id = f"{asked.get('organization') or self.user()['name']}/{asked['name']}"
        if not self.may_write(repo_id):
            return self.refuse(403, "", "You don't have the rights to create a model under this namespace")
        key = (asked.get("type", "model"), repo_id)
        prefix = "" if key[0] == "model" else f"{key[0]}s/"
        if key in self.server.repos:
            return self.answer(409, {"error": "You already created this repo", "url": f"{self.server.url}/{repo_id}"})
        repo = self.server.repos[key] = Repo(asked.get("visibility") == "private")
        repo.add("main", "initial commit", {".gitattributes": GITATTRIBUTES})
        return self.answer(200, {"url": f"{self.server.url}/{prefix}{repo_id}", "id": repo_id, "name": repo_id})

    def do_settings(self, kind, repo_id):
        if repo := self.repo(kind, repo_id, write=True):
            asked = json.loads(self.body)
            private = asked.get("private", asked.get("visibility") == "private")
            repo.private = private
            self.answer(200, {"private": private})

    def do_info(self, kind, repo_id, revision):
        if (repo := self.repo(kind, repo_id)) and (commit := self.commit_at(repo, revision or "main")):
            card = re.match(rb"---\n(.*?)\n---", commit["files"].get("README.md", b""), re.S)
            siblings = [{"rfilename": path} | self.described(path, data) for path, data in commit["files"].items()]
            said = {"_id": "1", "id": repo_id, "author": repo_id.split("/")[0], "sha": commit["oid"],
                    "private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
                    "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
                    "tags": [], "siblings": siblings}  # fmt: skip
            if card:
                said["cardData"] = head_of(card[1])
                said["tags"] = said["cardData"].get("tags") or []
            self.answer(200, said)

    def do_auth(self, kind, repo_id, write):
        if self.repo(kind, repo_id, write=bool(write)):
            self.answer(200, {})

    def do_tree(self, kind, repo_id, revision, folder):
        if (repo := self.repo(kind, repo_id)) and (commit := self.commit_at(repo, revision)):
            recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
            entries, inside = {}, f"{folder.strip('/')}/" if folder.strip("/") else ""
            for path, data in commit["files"].items():
                if path.startswith(inside):
                    rest = path.removeprefix(inside)
                    for depth, _ in enumerate(rest.split("/")[:-1], 1):
                        name = inside + "/".join(rest.split("/")[:depth])
                        if recursive or depth == 1:
                            entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                    if recursive or "/" not in rest:
                        entries[path] = {"type": "file", "path": path} | self.described(path, data)
            if inside and not entries:
                return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
            self.answer(200, list(entries.values()))
        return None

    def do_paths(self, kind, repo_id, revision):
        if (repo := self.repo(kind, repo_id)) and (commit := self.commit_at(repo, revision)):
            asked = parse_qs(self.body.decode())["paths"]
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(self.body)["paths"]
            found = []
            for path in asked:
                if path in commit["files"]:
                    found.append({"type": "file", "path": path} | self.described(path, commit["files"][path]))
                elif any(name.startswith(f"{path}/") for name in commit["files"]):
                    found.append({"type": "directory", "path": path, "oid": "0" * 40})
            self.answer(200, found)

    def do_preupload(self, kind, repo_id, revision):
        if (repo := self.repo(kind, repo_id, write=True)) and (commit := self.commit_at(repo, revision)):
            asked = json.loads(self.body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": oid_of(file["path"], commit["files"].get(file["path"])),
                }
                for file in asked
            ]
            self.answer(200, {"files": modes})

    def do_batch(self, kind, repo_id):
        if self.repo(KINDS.get(kind.strip("/"), "model"), repo_id, write=True):
            objects = []
            for asked in json.loads(self.body)["objects"]:
                there = asked["oid"] in self.server.verified
                actions = {
                    "upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs-verify/{asked['oid']}"},
                }
                objects.append({**asked, **({} if there else {"actions": actions})})
            self.answer(200, {"transfer": "basic", "objects": objects})

    def do_upload(self, oid):
        if sha256(self.body) != oid:
            return self.refuse(400, "", "the content has another SHA-256 than was announced")
        self.server.lfs[oid] = self.damaged(self.body)
        return self.answer(200, {})

    def do_verify(self, oid):
        asked = json.loads(self.body)
        if len(self.server.lfs.get(oid, b"")) != asked["size"]:
            return self.refuse(404, "", "the object is not there")
        self.server.verified.add(oid)
        return self.answer(200, {})

    def do_commit(self, kind, repo_id, revision):
        if not (repo := self.repo(kind, repo_id, write=True)) or not (parent := self.commit_at(repo, revision)):
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(parent["files"])
        if header.get("parentCommit") not in (None, parent["oid"]):
            return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.damaged(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.verified:
                    return self.refuse(400, "", "an LFS object is missing")
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        said = {"commitUrl": f"{self.server.url}/{repo_id}/commit/", "hookOutput": "", "success": True}
        if self.query.get("create_pr"):
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = parent["oid"]
            revision = f"refs/pr/{number}"
            prefix = f"{kind}/" if kind != "models" else ""
            said["pullRequestUrl"] = f"{self.server.url}/{prefix}{repo_id}/discussions/{number}"
        oid = repo.add(revision, header["summary"], files)
        return self.answer(200, said | {"commitUrl": said["commitUrl"] + oid, "commitOid": oid})

    def do_refs(self, kind, repo_id):
        if repo := self.repo(kind, repo_id):
            branches, tags = (
                [{"name": name, "ref": f"refs/{what}/{name}", "targetCommit": oid} for name, oid in refs.items()]
                for what, refs in (("heads", repo.branches), ("tags", repo.tags))
            )
            pulls = [{"name": ref, "ref": ref, "targetCommit": oid} for ref, oid in repo.pulls.items()]
            self.answer(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": pulls})

    def do_commits(self, kind, repo_id, revision):
        if (repo := self.repo(kind, repo_id)) and (commit := self.commit_at(repo, revision)):
            found = []
            while commit:
                found.append({"id": commit["oid"], "title": commit["title"], "message": "", "authors": [],
                              "date": "2026-01-01T00:00:00.000Z"})  # fmt: skip
                commit = repo.commits.get(commit["parent"])
            self.answer(200, found)

    def do_branch(self, kind, repo_id, name):
        if repo := self.repo(kind, repo_id, write=True):
            if name in repo.branches:
                return self.answer(409, {"error": f"Reference already exists: refs/heads/{name}"})
            start = json.loads(self.body or b"{}").get("startingPoint", "main")
            repo.branches[name] = repo.at(start)["oid"]
            self.answer(200, {})
        return None

    def do_tag(self, kind, repo_id, revision):
        if (repo := self.repo(kind, repo_id, write=True)) and (commit := self.commit_at(repo, revision)):
            name = json.loads(self.body)["tag"]
            if name in repo.tags:
                return self.answer(409, {"error": "Tag reference exists already"})
            repo.tags[name] = commit["oid"]
            self.answer(200, {})
        return None

    def do_yaml(self):
        content = json.loads(self.body)["content"]
        head = re.match(r"\ufeff?---\n(.*?)\n---", content, re.S)
        fine = head and isinstance(head_of(head[1].encode()), dict)
        errors = [] if fine else [{"message": "no metadata"}]
        self.answer(200 if fine else 400, {"errors": errors, "warnings": []})

    def do_resolve(self, kind, repo_id, revision, path):
        repo = self.repo(KINDS.get(kind.strip("/"), "model"), repo_id)
        if not repo or not (commit := self.commit_at(repo, revision)):
            return None
        headers = {"X-Repo-Commit": commit["oid"], "Accept-Ranges": "bytes"}
        if path not in commit["files"]:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist", **headers)
        data = commit["files"][path]
        if not large(path, len(data)):
            return self.send_data(data, ETag=f'"{oid_of(path, data)}"', **headers)
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
        self.server.lfs.setdefault(sha256(data), data)
        return self.answer(302, b"", Location=f"{self.server.cdn}/{sha256(data)}", **headers, **linked)

    def do_download(self, oid):
        self.server.tokens_at_cdn += "Authorization" in self.headers
        return self.send_data(self.server.lfs[oid], ETag=f'"{oid}"')

    # ---- answers

    def described(self, path, data):
        entry = {"size": len(data), "oid": git_sha1(data), "blobId": git_sha1(data)}
        if large(path, len(data)):
            entry["lfs"] = {"oid": sha256(data), "sha256": sha256(data), "size": len(data), "pointerSize": 134}
        return entry

    def damaged(self, data):
        return data[:-1] + bytes([data[-1] ^ 1]) if self.corrupt and data else data

    def refuse(self, status, code, message, **headers):
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.answer(status, {"error": message}, **named)

    def send_data(self, data, **headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        data, whole = self.damaged(data), len(data)
        if not asked:
            return self.answer(200, data, **headers)
        first, last = int(asked[1]), int(asked[2] or whole - 1)
        if first >= whole:
            return self.answer(416, b"", **headers, **{"Content-Range": f"bytes */{whole}"})
        part = {"Content-Range": f"bytes {first}-{min(last, whole - 1)}/{whole}"}
        return self.answer(206, data[first : last + 1], **headers, **part)

    def answer(self, status, content, **headers):
        if getattr(self, "silent", False):
            self.close_connection = True
            return
        written = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if written is content else "application/json")
        self.send_header("Content-Length", str(len(written)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(written)

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_):
        pass


API, REPO = r"/api/(models|datasets|spaces)", r"([^/]+/[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "yaml"),
    (rf"{API}/{REPO}/settings", "settings"),
    (rf"{API}/{REPO}/auth-check(/write)?", "auth"),
    (rf"{API}/{REPO}/tree/([^/]+)(/.*)?", "tree"),
    (rf"{API}/{REPO}/paths-info/([^/]+)", "paths"),
    (rf"{API}/{REPO}/preupload/([^/]+)", "preupload"),
    (rf"{API}/{REPO}/commit/([^/]+)", "commit"),
    (rf"{API}/{REPO}/commits/([^/]+)", "commits"),
    (rf"{API}/{REPO}/refs", "refs"),
    (rf"{API}/{REPO}/branch/([^/]+)", "branch"),
    (rf"{API}/{REPO}/tag/([^/]+)", "tag"),
    (rf"{API}/{REPO}(?:/revision/([^/]+))?", "info"),
    (rf"/(datasets/|spaces/)?{REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"/lfs/(\w+)", "upload"),
    (r"/lfs-verify/(\w+)", "verify"),
    (r"/cdn/(\w+)", "download"),
    (rf"/(datasets/|spaces/)?{REPO}/resolve/([^/]+)/(.+)", "resolve"),
]


@functools.cache  # it is asked for many times
def head_of(card: bytes) -> dict:
    import yaml

    return yaml.safe_load(card)


def large(path: str, size: int) -> bool:
    return size > LARGE or path.endswith((".safetensors", ".parquet"))


def oid_of(path: str, data: bytes | None) -> str | None:
    """What the client compares: git's hash of a small file, the SHA-256 of a large one."""
    if data is None:
        return None
    return sha256(data) if large(path, len(data)) else git_sha1(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def start() -> Hub:
    """A running Hub; `shutdown()` and `server_close()` end it."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    return hub


@contextlib.contextmanager
def spoken_to(monkeypatch, folder: Path) -> Iterator[Hub]:
    """A Hub that this process's client speaks to, with an empty cache in the folder and no pauses."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, close_session

    from rlhf_recipes.publish import upload

    started = start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_ENDPOINT", started.url)
    for name, value in (
        ("ENDPOINT", started.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", started.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(folder / "cache")),
        ("HF_TOKEN_PATH", str(folder / "no token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(upload, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)  # 40 ms, and nothing for http
    close_session()
    yield started
    close_session()
    started.shutdown()
    started.server_close()
