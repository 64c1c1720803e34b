"""A server on loopback with the part of the Hugging Face hub's API that publishing needs.

Accounts, repositories of models and datasets with their commits, preupload, LFS (batch, PUT,
verify), commit, tree, resolve, validate-yaml, settings and collections, with the hub's own status
codes; and faults on request. Point HF_ENDPOINT at `hub.url` and set HF_HUB_DISABLE_XET: the client
is the real one.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".parquet", ".gguf")


@dataclass
class Repo:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=list)
    """The files after each commit."""

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def head(self) -> str:
        return hashlib.sha1(b"commit %d" % len(self.commits)).hexdigest()


@dataclass
class Fault:
    """A fault of the next `times` requests whose "METHOD path" matches."""

    pattern: str
    status: int = 0
    """0: none, only the delay."""
    message: str = ""
    delay_s: float = 0.0
    times: int = 1


class FakeHub:
    """Use as a context manager; the state is plain attributes."""

    def __init__(self) -> None:
        self.accounts: dict[str, tuple[str, str]] = {}
        """Token to (user, "write" or "read")."""
        self.repos: dict[tuple[str, str], Repo] = {}
        """By (type, id)."""
        self.objects: dict[str, bytes] = {}
        """LFS objects by SHA-256."""
        self.collections: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        """Method, path and status, in order of response."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(
        self, repo_id: str, repo_type: str = "model", private: bool = False, **files: str
    ) -> Repo:
        repo = self.repos[repo_type, repo_id] = Repo(private, [{".gitattributes": b"*.bin lfs\n"}])
        repo.files.update({name.replace("__", "."): t.encode() for name, t in files.items()})
        return repo

    def count(self, pattern: str, status: int = 200) -> int:
        return sum(
            s == status and bool(re.search(pattern, f"{m} {p}")) for m, p, s in self.requests
        )

    def take_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **answer: Any):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **answer}


def make_handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def handle_request(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                if fault := hub.take_fault(f"{self.command} {path}"):
                    time.sleep(fault.delay_s)
                    if fault.status:
                        raise Refusal(fault.status, fault.message)
                for pattern, method in ROUTES:
                    if match := re.fullmatch(pattern, f"{self.command} {path}"):
                        return self.answer(200, method(self, *match.groups(), body))
                raise Refusal(404, f"no such route: {self.command} {path}")
            except Refusal as refusal:
                headers = {"X-Error-Message": str(refusal)} if str(refusal) else {}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self.answer(refusal.status, (refusal.body, headers))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def answer(self, status: int, result: Any) -> None:
            content, headers = result if isinstance(result, tuple) else (result, {})
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
                headers = {"Content-Type": "application/json", **headers}
            hub.requests.append((self.command, unquote(urlsplit(self.path).path), status))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def user(self) -> tuple[str, str] | None:
            """(name, role) of the token; None without one."""
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if not token:
                return None
            if token not in hub.accounts:
                raise Refusal(401, "Invalid credentials in Authorization header")
            return hub.accounts[token]

        def writer(self, repo_id: str) -> str:
            user = self.user()
            if user is None:
                raise Refusal(401, "Invalid username or password.")
            if user[1] != "write" or user[0] != repo_id.split("/")[0]:
                raise Refusal(403, f'You don\'t have the rights to write to "{repo_id}"')
            return user[0]

        def repo(self, repo_type: str, repo_id: str) -> Repo:
            repo = hub.repos.get((repo_type.removesuffix("s"), repo_id))
            user = self.user()
            if repo is None or (repo.private and (user or [""])[0] != repo_id.split("/")[0]):
                raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
            return repo

        def whoami(self, body: bytes) -> dict:
            user = self.user()
            if user is None:
                raise Refusal(401, "Invalid username or password.")
            return {"type": "user", "name": user[0], "auth": {"accessToken": {"role": user[1]}}}

        def create(self, body: bytes) -> dict:
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or self.user()[0]}/{wanted['name']}"
            self.writer(repo_id)
            repo_type = wanted.get("type") or "model"
            if (repo_type, repo_id) in hub.repos:
                raise Refusal(409, "You already created this repo")
            hub.add_repo(repo_id, repo_type, wanted.get("visibility") == "private")
            prefix = "" if repo_type == "model" else f"{repo_type}s/"
            return {"url": f"{hub.url}/{prefix}{repo_id}", "id": repo_id}

        def info(self, repo_type: str, repo_id: str, _: str | None, body: bytes) -> dict:
            repo = self.repo(repo_type, repo_id)
            card = re.match(
                r"---\n(.*?)\n---", repo.files.get("README.md", b"").decode(), re.DOTALL
            )
            return {
                "id": repo_id,
                "sha": repo.head,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "cardData": yaml.safe_load(card.group(1)) if card else None,
                "siblings": [{"rfilename": path} for path in repo.files],
            }

        def tree(self, repo_type: str, repo_id: str, _: str, body: bytes) -> list:
            repo = self.repo(repo_type, repo_id)
            return [describe(path, content) for path, content in repo.files.items()]

        def settings(self, repo_type: str, repo_id: str, body: bytes) -> dict:
            self.writer(repo_id)
            repo, wanted = self.repo(repo_type, repo_id), json.loads(body)
            repo.private = wanted.get("visibility", "private") == "private"
            return {}

        def validate(self, body: bytes) -> dict:
            text = json.loads(body)["content"]
            card = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
            if card is None or not isinstance(yaml.safe_load(card.group(1)), dict):
                raise Refusal(400, "", errors=[{"message": "no metadata"}])
            return {"errors": [], "warnings": []}

        def preupload(self, repo_type: str, repo_id: str, _: str, body: bytes) -> dict:
            repo = self.repo(repo_type, repo_id)
            self.writer(repo_id)
            files = []
            for file in json.loads(body)["files"]:
                path = file["path"]
                mode = "lfs" if path.endswith(LARGE) else "regular"
                there = repo.files.get(path)
                oid = there and (sha256(there) if mode == "lfs" else blob_id(there))
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return {"files": files}

        def batch(self, repo_type: str | None, repo_id: str, body: bytes) -> dict:
            self.repo(repo_type or "model", repo_id)
            self.writer(repo_id)
            objects = []
            for wanted in json.loads(body)["objects"]:
                if wanted["oid"] not in hub.objects:
                    wanted["actions"] = {
                        "upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"},
                        "verify": {"href": f"{hub.url}/verify"},
                    }
                objects.append(wanted)
            return {"transfer": "basic", "objects": objects}

        def put(self, oid: str, body: bytes) -> dict:
            if sha256(body) != oid:
                raise Refusal(400, "the content does not match the oid")
            hub.objects[oid] = body
            return {}

        def verify(self, body: bytes) -> dict:
            wanted = json.loads(body)
            if len(hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
                raise Refusal(400, "no such object")
            return {}

        def commit(self, repo_type: str, repo_id: str, _: str, body: bytes) -> dict:
            repo = self.repo(repo_type, repo_id)
            self.writer(repo_id)
            files = dict(repo.files)
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    if value.get("parentCommit") not in (None, repo.head):
                        raise Refusal(412, "A commit has happened since. Please refresh.")
                elif item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    if value["oid"] not in hub.objects:
                        raise Refusal(400, f"{value['path']}: the LFS object was not uploaded")
                    files[value["path"]] = hub.objects[value["oid"]]
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    raise Refusal(400, f"unknown operation {item['key']}")
            repo.commits.append(files)
            url = f"{hub.url}/{repo_id}/commit/{repo.head}"
            return {"commitUrl": url, "commitOid": repo.head}

        def resolve(
            self, repo_type: str | None, repo_id: str, _: str, path: str, body: bytes
        ) -> tuple[bytes, dict]:
            repo = self.repo(repo_type or "model", repo_id)
            if path not in repo.files:
                raise Refusal(404, "Entry not found", "EntryNotFound")
            content = repo.files[path]
            return content, {
                "X-Repo-Commit": repo.head,
                "ETag": f'"{describe(path, content)["oid"]}"',
            }

        def make_collection(self, body: bytes) -> dict:
            wanted = json.loads(body)
            self.writer(f"{wanted['namespace']}/")
            title = wanted["title"].lower().replace(" ", "-")
            slug = f"{wanted['namespace']}/{title}-0123456789abcdef"
            if slug in hub.collections:
                raise Refusal(409, "exists", slug=slug)
            hub.collections[slug] = {
                "slug": slug,
                "title": wanted["title"],
                "owner": {"name": wanted["namespace"]},
                "items": [],
                "lastUpdated": "2026-01-01T00:00:00.000Z",
                "position": 0,
                "private": wanted["private"],
                "theme": "green",
                "upvotes": 0,
            }
            return hub.collections[slug]

        def collection(self, slug: str, body: bytes) -> dict:
            return hub.collections[slug]

        def add_item(self, slug: str, body: bytes) -> dict:
            self.writer(slug)
            item = json.loads(body)["item"]
            items = hub.collections[slug]["items"]
            if item["id"] in {i["id"] for i in items}:
                raise Refusal(409, "exists")
            items.append({"_id": str(len(items)), "position": 0, **item, "repoType": item["type"]})
            return hub.collections[slug]

    repo, kind, rest = r"([^/]+/[^/]+?)", r"(models|datasets)", r"([^/]+)"
    ROUTES = [
        (r"GET /api/whoami-v2", Handler.whoami),
        (r"POST /api/repos/create", Handler.create),
        (r"POST /api/validate-yaml", Handler.validate),
        (rf"GET /api/{kind}/{repo}(?:/revision/{rest})?", Handler.info),
        (rf"GET /api/{kind}/{repo}/tree/{rest}", Handler.tree),
        (rf"PUT /api/{kind}/{repo}/settings", Handler.settings),
        (rf"POST /api/{kind}/{repo}/preupload/{rest}", Handler.preupload),
        (rf"POST /api/{kind}/{repo}/commit/{rest}", Handler.commit),
        (rf"POST /(?:(datasets)/)?{repo}\.git/info/lfs/objects/batch", Handler.batch),
        (rf"PUT /lfs/{rest}", Handler.put),
        (r"POST /verify", Handler.verify),
        (rf"(?:GET|HEAD) /(?:(datasets)/)?{repo}/resolve/{rest}/(.+)", Handler.resolve),
        (r"POST /api/collections", Handler.make_collection),
        (r"GET /api/collections/(.+)", Handler.collection),
        (r"POST /api/collections/(.+)/items", Handler.add_item),
    ]
    return Handler


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(path: str, content: bytes) -> dict[str, Any]:
    """A file's entry in the tree; a large file's is that of its LFS pointer."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    if not path.endswith(LARGE):
        return {**entry, "oid": blob_id(content)}
    oid = sha256(content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
    lfs = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
    return {**entry, "oid": blob_id(pointer.encode()), "lfs": lfs}
