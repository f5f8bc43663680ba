"""A small Hugging Face hub on the loopback interface: just what the `datasets` client asks for.

It serves one dataset repository from memory: its revision, its file tree and its files, whole or
in ranges. Everything else, and every other repository, is answered 404 as the hub answers it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
_DATE = "2026-01-01T00:00:00.000Z"


class Hub:
    """A context manager: the server runs between enter and exit, at `endpoint`.

    `dies_at`: once a file with this path is asked for, the server closes every connection without
    an answer, as one does that lost its power.
    """

    def __init__(
        self, repository: str, files: Mapping[str, bytes], dies_at: str | None = None
    ) -> None:
        self.repository = repository
        self.files = dict(files)
        self.dies_at = dies_at
        self.requests: list[str] = []
        self.dead = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def tree(self, folder: str) -> list[dict[str, Any]]:
        """The entries below a folder, as the hub's tree lists them; each file with its etag."""
        inside = f"{folder}/" if folder else ""
        names = [name for name in self.files if name.startswith(inside)]
        folders = {
            name[: name.index("/", len(inside))] for name in names if "/" in name[len(inside) :]
        }
        return [self.entry(name) for name in names] + [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            for name in sorted(folders)
        ]

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": etag(data)}


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    api = f"/api/datasets/{hub.repository}"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range') or ''}")
            if hub.dies_at and path.endswith(hub.dies_at) and self.headers.get("Range"):
                hub.dead.set()
            if hub.dead.is_set():
                self.close_connection = True
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{REVISION}"):
                siblings = [{"rfilename": name} for name in hub.files]
                self.json({"id": hub.repository, "sha": REVISION, "siblings": siblings})
            elif path.startswith(f"{api}/tree/"):
                folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
                self.json(hub.tree(folder))
            elif path == f"{api}/paths-info/{REVISION}":
                wanted = json.loads(body)["paths"]
                self.json([hub.entry(name) for name in wanted if name in hub.files])
            elif path.startswith(f"/datasets/{hub.repository}/resolve/"):
                name = path.removeprefix(f"/datasets/{hub.repository}/resolve/").partition("/")[2]
                self.file(name)
            else:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_GET = do_HEAD = do_POST = answer

        def file(self, name: str) -> None:
            if name not in hub.files:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = hub.files[name]
            headers = {
                "ETag": f'"{etag(data)}"',
                "X-Repo-Commit": REVISION,
                "Accept-Ranges": "bytes",
            }
            asked = self.headers.get("Range")
            if asked is None:
                self.send(200, data, headers)
                return
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            self.send(206, data[begin : end + 1], headers)

        def json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are kept in hub.requests; the test's output stays clean."""

    return Handler
