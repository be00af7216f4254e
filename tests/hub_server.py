"""A stand-in for the Hugging Face hub on the loopback: model and data set repositories with commits, tags and gates.

It answers what huggingface_hub 2.4, transformers 5.23 and datasets 5.2 ask while they read, as the hub does: GET
/api/{models,datasets}/ID[/revision/R], .../tree/R[/FOLDER] and POST .../paths-info/R; HEAD and GET
[/datasets]/ID/resolve/R/FILE, large files by way of a redirect to another host; the hub's own error codes. Anything
else is 404, as of a hub without the data set viewer.
"""

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["models", "datasets"]

LARGE = (".safetensors", ".parquet")
"""Kept apart from the commits and named by sha256 (the hub's LFS)."""
DATE = "2024-01-01T00:00:00.000Z"

_IDLE_SECONDS = 30.0
_MAX_REQUESTS_KEPT = 10_000


@dataclass
class Repository:
    """Its commits, oldest first, and what they are called."""

    kind: Kind
    id: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Commit -> path -> content."""
    names: dict[str, str] = field(default_factory=dict)
    """Branch or tag -> commit."""
    gate: int | None = None
    """Status that files get: 401 as for somebody unknown, 403 as for somebody without access; None: open to all."""

    def commit(self, files: Mapping[str, bytes], *names: str) -> str:
        """A new commit, which `main` and `names` then mean; returns its 40 hex digits."""
        whole = hashlib.sha1(repr((self.id, len(self.commits), sorted(files.items()))).encode())
        digest = whole.hexdigest()
        self.commits[digest] = dict(files)
        self.names |= dict.fromkeys(("main", *names), digest)
        return digest

    def found(self, revision: str) -> str | None:
        """The commit of a branch, a tag, a commit or the beginning of one."""
        if revision in self.names:
            return self.names[revision]
        begin = [commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision)]
        return begin[0] if len(begin) == 1 else None


class HubServer:
    """`with HubServer() as hub:` listens on `hub.url`, which is what HF_ENDPOINT takes."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.contents: dict[str, bytes] = {}
        """sha256 -> content, of large files."""
        self.requests: deque[str] = deque(maxlen=_MAX_REQUESTS_KEPT)
        """`GET /path`, in the order of arrival."""
        self.told_token: set[str] = set()
        """Which of `url` and `store_url` a token was sent to."""
        # Large files lie on a host of their own: to one that it knows the client would follow a HEAD.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self)) for _ in range(2)]
        self.url, self.store_url = (f"http://127.0.0.1:{each.server_address[1]}" for each in self._servers)
        self._threads = [threading.Thread(target=each.serve_forever, args=(0.05,)) for each in self._servers]

    def __enter__(self) -> "HubServer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(5)

    def repository(self, kind: Kind, name: str, gate: int | None = None) -> Repository:
        """A new empty one; `gate` as in Repository."""
        return self.repositories.setdefault((kind, name), Repository(kind, name, gate=gate))


class Refused(Exception):
    """The hub's answer where there is none to give."""

    def __init__(self, status: int, code: str = "", message: str = "Not found") -> None:
        self.status, self.code, self.message = status, code, message
        super().__init__(message)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree shows it."""
    shown: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if path.endswith(LARGE):
        shown["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return shown


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tree(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Everything below a folder, folders too; its direct children alone where not recursive."""
    prefix = f"{folder}/" if folder else ""
    below = [path for path in sorted(files) if path.startswith(prefix)]
    if folder and not below:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist")
    parents = {"/".join(path.split("/")[:depth]) for path in below for depth in range(1, path.count("/") + 1)}
    inside = [path for path in sorted(parents) if path.startswith(prefix)]
    shown = [{"type": "directory", "path": path, "size": 0, "oid": _blob_id(path.encode())} for path in inside]
    shown += [_entry(path, files[path]) for path in below]
    return [each for each in shown if recursive or "/" not in each["path"].removeprefix(prefix)]


_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CONTENT = re.compile(r"/content/([0-9a-f]{64})")


def _handler_for(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = _IDLE_SECONDS

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # the other side went away
                self.close_connection = True

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.requests.append(f"{self.command} {self.path}")
            if "Authorization" in self.headers:
                server.told_token.add(f"http://{self.headers['Host']}")
            address = urlsplit(self.path)
            try:
                self.answer(address.path, parse_qs(address.query), body)
            except Refused as no:
                codes = {"X-Error-Code": no.code} if no.code else {}
                self.reply(no.status, b"", {"X-Error-Message": no.message} | codes)

        do_HEAD = do_POST = do_GET

        def answer(self, path: str, asked: dict[str, list[str]], body: bytes) -> None:
            if match := _API.fullmatch(path):
                kind, name, kind_of_path, revision, inside = match.groups()
                self.tell(kind, name, kind_of_path, revision, unquote(inside or ""), asked, body)
            elif match := _RESOLVE.fullmatch(path):
                self.resolve("datasets" if match[1] else "models", match[2], match[3], unquote(match[4]))
            elif (match := _CONTENT.fullmatch(path)) and match[1] in server.contents:
                self.send(server.contents[match[1]], {"ETag": f'"{match[1]}"'})
            else:
                raise Refused(404)

        def commit(self, kind: str, name: str, revision: str | None) -> tuple[Repository, str]:
            if (kind, name) not in server.repositories:
                # Not to tell strangers what exists, the hub gives them 401 for it.
                status = 404 if "Authorization" in self.headers else 401
                raise Refused(status, "RepoNotFound", "Repository not found")
            repository = server.repositories[kind, name]
            commit = repository.found(unquote(revision or "main"))
            if commit is None:
                raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return repository, commit

        def tell(
            self,
            kind: str,
            name: str,
            kind_of_path: str | None,
            revision: str | None,
            inside: str,
            asked: dict[str, list[str]],
            body: bytes,
        ) -> None:
            repository, commit = self.commit(kind, name, revision)
            files = repository.commits[commit]
            value: Any
            if kind_of_path == "tree":
                value = _tree(files, inside, asked.get("recursive", [""])[0].lower() == "true")
            elif kind_of_path == "paths-info":
                wanted = parse_qs(body.decode()).get("paths", [])
                if "json" in self.headers.get("Content-Type", ""):
                    wanted = json.loads(body)["paths"]
                whole = _tree(files, "", True)
                value = [each for path in wanted for each in whole if each["path"] == path]
            else:
                siblings = [{"rfilename": path} for path in sorted(files)]
                common = {"id": name, "sha": commit, "private": False, "disabled": False, "downloads": 0, "likes": 0}
                gated = "manual" if repository.gate else False
                more = {"tags": [], "siblings": siblings, "lastModified": DATE, "createdAt": DATE, "gated": gated}
                value = common | more
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
            repository, commit = self.commit(kind, name, revision)
            # The card of a gated repository is open to all: who asks for access must know for what.
            if repository.gate is not None and path not in repository.commits[commit].keys() & {"README.md"}:
                raise Refused(repository.gate, "GatedRepo", f"Access to {kind} {name} is restricted")
            held = {"X-Repo-Commit": commit}
            if path not in repository.commits[commit]:
                self.reply(404, b"", held | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
                return
            content = repository.commits[commit][path]
            if not path.endswith(LARGE):
                self.send(content, held | {"ETag": f'"{_blob_id(content)}"'})
                return
            mark = _sha256(content)
            server.contents[mark] = content
            held |= {"X-Linked-ETag": f'"{mark}"', "X-Linked-Size": str(len(content))}
            self.reply(302, b"", held | {"Location": f"{server.store_url}/content/{mark}"})

        def send(self, content: bytes, headers: dict[str, str]) -> None:
            """The content, or the stretch of it that Range asks for."""
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if match is None:
                self.reply(200, content, headers | {"Accept-Ranges": "bytes"})
                return
            first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            if first > last:
                raise Refused(416, "", "Range not satisfiable")
            stretch = f"bytes {first}-{last}/{len(content)}"
            self.reply(206, content[first : last + 1], headers | {"Content-Range": stretch})

        def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/octet-stream"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
