"""A stand-in for W&B's server on the loopback: what the real client sends is kept and can be looked at.

It answers what wandb 0.31 asks of a server while it writes, resumes and syncs runs, and nothing else: POST /graphql
(Viewer, RunResumeStatus, UpsertBucket, CreateRunFiles; any other query gets empty data), POST
/files/<entity>/<project>/<run>/file_stream (history, events and summary as JSON lines) and PUT on the upload URLs.
"""

import gzip
import json
import re
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "loopback"
API_KEY = "0123456789abcdef" * 2 + "01234567"
"""Any 40 characters will do; these must never turn up in a log."""

_MAX_BODY = 64 << 20
_IDLE_SECONDS = 30.0
_MAX_REQUESTS_KEPT = 10_000


@dataclass
class ServerRun:
    """One run as the server holds it."""

    project: str
    config: dict[str, Any] = field(default_factory=dict)
    """Key -> value, W&B's own `{"value": ...}` wrapping and its `_wandb` entry taken off."""
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """Stream file -> offset -> line."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every row in the order of its offset, as often as it arrived at different offsets."""
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}

    def series(self, key: str) -> list[tuple[int, Any]]:
        """(step, value) of every row that has the key."""
        return [(row["_step"], row[key]) for row in self.history if key in row]


class WandbServer:
    """`with WandbServer() as server:` listens on `server.url`; `stop()` kills it with connections and all."""

    def __init__(self) -> None:
        self.runs: dict[str, ServerRun] = {}
        self.requests: deque[str] = deque(maxlen=_MAX_REQUESTS_KEPT)
        self.alerts: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.alive = True
        self.connections: set[socket.socket] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "WandbServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self._http.shutdown()
        self._http.server_close()
        with self.lock:
            for connection in self.connections:
                connection.close()
        self._thread.join(5)

    def run(self, project: str, run_id: str) -> ServerRun:
        return self.runs.setdefault(run_id, ServerRun(project))

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of one GraphQL request; the caller holds the lock."""
        match re.search(r"(?:query|mutation)\s+(\w+)", query):
            case None:
                return {}
            case found:
                operation = found[1]
        project = variables.get("project") or "uncategorized"
        owner = {"id": "entity", "name": ENTITY}
        if operation == "Viewer":
            viewer = {"id": "viewer", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": [{"node": {"name": ENTITY}}]}}}
        if operation == "RunResumeStatus":
            run_id = variables["name"]
            bucket = _bucket(run_id, self.runs[run_id]) if run_id in self.runs else None
            return {"model": {"id": project, "name": project, "entity": owner, "bucket": bucket}}
        if operation == "UpsertBucket":
            run_id = variables["name"]
            inserted = run_id not in self.runs
            run = self.run(project, run_id)
            config = json.loads(variables.get("config") or "{}")
            run.config.update({key: entry.get("value") for key, entry in config.items() if key != "_wandb"})
            run.name = variables.get("displayName") or run.name
            run.group = variables.get("groupName") or run.group
            run.job_type = variables.get("jobType") or run.job_type
            run.tags = variables.get("tags") or run.tags
            bucket = {**_bucket(run_id, run), "project": {"id": project, "name": project, "entity": owner}}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append({key: variables[key] for key in ("runName", "title", "text")})
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation == "CreateRunFiles":
            base = f"{self.url}/upload/{variables['run']}"
            files = [{"name": name, "uploadUrl": f"{base}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run: ServerRun, message: dict[str, Any]) -> None:
        """Takes one message of the file stream; the caller holds the lock."""
        for name, chunk in (message.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            for index, line in enumerate(chunk.get("content") or ()):
                lines[chunk.get("offset", 0) + index] = line
        if message.get("complete"):
            run.exit_code = message.get("exitcode")


def _bucket(run_id: str, run: ServerRun) -> dict[str, Any]:
    history = run.lines.get("wandb-history.jsonl", {})
    tail = [history[max(history)]] if history else []
    return {
        "id": run_id,
        "name": run_id,
        "displayName": run.name,
        "description": None,
        "sweepName": None,
        "summaryMetrics": json.dumps(run.summary),
        "logLineCount": 0,
        "historyLineCount": len(history),
        "eventsLineCount": len(run.lines.get("wandb-events.jsonl", {})),
        "historyTail": json.dumps(tail),
        "eventsTail": "[]",
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "tags": run.tags,
        "notes": None,
        "wandbConfig": '{"t": 1}',
    }


def _handler_for(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = _IDLE_SECONDS

        def setup(self) -> None:
            super().setup()
            with server.lock:
                server.connections.add(self.connection)

        def finish(self) -> None:
            with server.lock:
                server.connections.discard(self.connection)
            super().finish()

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):  # the other side went away, or stop() closed the socket
                self.close_connection = True

        def body(self) -> bytes:
            length = int(self.headers.get("Content-Length") or 0)
            if length > _MAX_BODY:
                raise ValueError(f"a body of {length} bytes is more than a test sends")
            data = self.rfile.read(length)
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def reply(self, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            message = json.loads(self.body())
            with server.lock:
                server.requests.append(self.path)
                if not server.alive:
                    raise ConnectionAbortedError
                if self.path == "/graphql":
                    value = {"data": server.answer(message["query"], message.get("variables") or {})}
                elif match := re.fullmatch(r"/files/[^/]+/([^/]+)/([^/]+)/file_stream", self.path):
                    server.stream(server.run(match[1], match[2]), message)
                    value = {"limits": {}}
                else:
                    value = {}
            self.reply(value)

        def do_PUT(self) -> None:
            data = self.body()
            with server.lock:
                server.requests.append(self.path)
                _, _, run_id, name = self.path.split("/", 3)
                server.runs[run_id].files[name] = data
            self.reply({})

        def do_GET(self) -> None:
            with server.lock:
                server.requests.append(self.path)
            self.reply({})

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
