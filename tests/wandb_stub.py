"""A local W&B server with the operations that wandb's client needs, and a webhook.

It stores what a run sends, and answers by its mood: normally, slowly, with errors, or not at all.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mood = Literal["fine", "slow", "errors", "refuses", "hangs", "drops"]
SLOW_SECONDS = 0.5
ENTITY = "someone"


@dataclass
class StoredRun:
    """The data of one run on the server."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    """History by the client's line number; a repeated number overwrites."""
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    notes: str = ""
    exit_code: int | None = None

    @property
    def all_rows(self) -> list[dict[str, Any]]:
        """History without the keys that W&B adds."""
        decoded = (json.loads(self.lines[number]) for number in sorted(self.lines))
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in decoded]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """History without the report and the charts."""
        return [row for row in self.all_rows if not any(k.startswith(("report/", "bands/")) for k in row)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""


class WandbStub:
    """The server, running inside its context."""

    def __init__(self, mood: Mood = "fine") -> None:
        self.mood = mood
        self.turn: tuple[str, Mood] | None = None
        """Operation after which the mood changes, and the new mood."""
        self.runs: dict[str, StoredRun] = {}
        self.views: dict[str, dict[str, str]] = {}
        self.posts: list[tuple[str, str]] = []
        """Path and text of each message to the webhook."""
        self.asked: list[str] = []
        """Operations and paths of all requests in order."""
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WandbStub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status, answer = 200, {}
                match stub.mood:
                    case "hangs":
                        stub._over.wait()
                        return
                    case "drops":
                        self.connection.shutdown(socket.SHUT_RDWR)
                        self.close_connection = True
                        return
                    case "errors":
                        status, answer = 500, {"error": "the stub fails"}
                    case "refuses" if self.path.endswith("/file_stream"):
                        status, answer = 403, {"error": "the stub refuses"}
                    case mood:
                        if mood == "slow":
                            time.sleep(SLOW_SECONDS)
                        with stub._lock:
                            answer = stub._take(self.command, self.path, body)
                            if stub.turn is not None and stub.turn[0] in stub.asked:
                                stub.mood = stub.turn[1]
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        return Handler

    def _take(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            assert operation is not None, asked["query"]
            self.asked.append(operation[1])
            return {"data": self._graphql(operation[1], asked.get("variables") or {})}
        self.asked.append(f"{method} {path}")
        if path.endswith("/file_stream"):
            self._stream(self.runs[path.split("/")[-2]], json.loads(body))
        elif method == "POST":
            self.posts.append((path, body.decode()))
        elif method == "PUT":
            _, run_id, name = path.split("/", 2)
            self.runs[run_id].files[name] = body
        return {}

    def _stream(self, run: StoredRun, sent: dict[str, Any]) -> None:
        files = sent.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            run.lines |= dict(enumerate(history["content"], start=history["offset"]))
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    def _graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": ENTITY}}
        match operation:
            case "Viewer":
                teams: dict[str, Any] = {"edges": []}
                viewer = {"id": "v", "entity": ENTITY, "username": ENTITY, "flags": "{}"}
                return {"viewer": {**viewer, "teams": teams}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "RunResumeStatus":
                return {"model": {**project, "bucket": self._resumed(given["name"])}}
            case "UpsertBucket":
                inserted = given["name"] not in self.runs
                run = self.runs.setdefault(given["name"], StoredRun())
                run.notes = given.get("notes") or run.notes
                if given.get("config"):
                    run.config = json.loads(given["config"])
                bucket = {
                    "id": f"id-{given['name']}",
                    "name": given["name"],
                    "displayName": given.get("displayName") or given["name"],
                    "config": json.dumps(run.config),
                    "project": project,
                    "historyLineCount": len(run.lines),
                }
                return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
            case "View":
                edges = [{"node": view} for name, view in self.views.items() if name == given["viewName"]]
                return {"project": {"allViews": {"edges": edges}}}
            case "UpsertView2":
                self.views[given["name"]] = {"id": "v", "displayName": given["displayName"], "spec": given["spec"]}
                return {"upsertView": {"view": {"id": "v", "name": given["name"]}, "inserted": True}}
            case "CreateRunFiles":
                at = f"{self.url}/{given['run']}"
                files = [{"name": name, "uploadUrl": f"{at}/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            case "NotifyScriptableRunAlert":
                alert = (given["title"], given["severity"])
                self.runs[given["runName"]].alerts.append(alert)
                return {"notifyScriptableRunAlert": {"success": True}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                # As if it existed: a table is also among the run's files.
                sequence = {"latestArtifact": None}
                made = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
                return {"createArtifact": {"artifact": made}}
        raise AssertionError(f"the stub does not know {operation}")

    def _resumed(self, run_id: str) -> dict[str, Any] | None:
        run = self.runs.get(run_id)
        if run is None:
            return None
        tail = [run.lines[max(run.lines)]] if run.lines else []
        return {
            "id": f"id-{run_id}",
            "name": run_id,
            "displayName": run_id,
            "summaryMetrics": json.dumps(run.summary),
            "config": json.dumps(run.config),
            "historyLineCount": len(run.lines),
            "historyTail": json.dumps(tail),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
